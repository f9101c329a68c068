"""Batch.

Purpose
    Allocate and free many blocks of one size by one call each: what a request takes for its prompt,
    and gives back when it ends.
Structure
    memoryview --export--> BlockView(i) --keeps--> Batch --owns--> blocks[0 .. n)
Invariants
    blocks != NULL <=> all of them are live in the heap; n_exports > 0 => blocks != NULL
    only new_batch() makes one: a Batch never has memory it does not own
Locking
    The GIL for the object's fields; the heap locks itself.
Units
    Bytes; blocks.
"""

cimport cython
from libc.stdint cimport int64_t, uintptr_t
from libc.stdlib cimport calloc, free

from pagealloc.core.export cimport fill_buffer
from pagealloc.core.heap cimport heap_alloc_many, heap_free_many
from pagealloc.core.heap_owner cimport Heap
from pagealloc.core.heap_state cimport heap_t
from pagealloc.core.noted cimport blocks_are_noted, note_block, observed

from pagealloc.errors import ClosedError, OutOfMemoryError
from pagealloc.units import format_bytes


@cython.final
@cython.no_gc_clear
@cython.auto_pickle(False)
cdef class BlockView:
    """One block of a Batch, for the memoryview that `Batch.__getitem__` returns."""

    cdef Batch batch
    cdef Py_ssize_t index

    def __init__(self):
        raise TypeError("only a Batch makes a BlockView: batch[i]")

    def __getbuffer__(self, Py_buffer *view, int flags):
        if self.batch is None:
            raise TypeError("only a Batch makes a BlockView: batch[i]")
        self.batch.open_blocks()
        fill_buffer(
            view, self, self.batch.blocks[self.index], <Py_ssize_t>self.batch.nbytes, False, flags
        )
        self.batch.n_exports += 1

    def __releasebuffer__(self, Py_buffer *view):
        self.batch.n_exports -= 1


@cython.final
@cython.no_gc_clear
cdef class Batch:
    """Blocks of one size, allocated together and freed together.

    `PageAllocator.alloc_many` makes one.  ``batch[i]`` is a writable memoryview of a block, which
    ``numpy.frombuffer`` takes; `addresses` is for native code.  `close()` or the last reference
    gives all blocks back.

    Attributes
    ----------
    nbytes : int
        Length of each block, as asked for.

    Notes
    -----
    May be passed between threads, and closed in any.  A block costs a few nanoseconds, a `Buffer`
    several times that.
    """

    def __init__(self):
        raise TypeError("only PageAllocator.alloc_many() makes a Batch")

    def __dealloc__(self):
        # No exports are left: each of them holds a reference to this object.
        if self.blocks != NULL:
            self.free_blocks()

    @property
    def addresses(self) -> list[int]:
        """Where the blocks start.  Raises `ClosedError` after `close()`."""
        cdef Py_ssize_t i
        self.open_blocks()
        return [<uintptr_t>self.blocks[i] for i in range(self.n_blocks)]

    @property
    def closed(self) -> bool:
        """True after `close()`."""
        return self.blocks == NULL

    @property
    def allocator(self):
        """The allocator the blocks came from."""
        return self.owner

    cdef int open_blocks(self) except -1:
        if self.blocks == NULL:
            raise ClosedError(
                f"this Batch of {self.n_blocks} blocks of {format_bytes(self.nbytes)} is closed"
            )
        return 0

    def close(self) -> None:
        """Give all blocks back; closing twice is fine.

        Raises
        ------
        BufferError
            Views of blocks (a memoryview, a NumPy array) are alive; nothing was changed.
        """
        if self.blocks == NULL:
            return
        if self.n_exports:
            raise BufferError(
                f"{self.n_exports} view{'s' if self.n_exports > 1 else ''} of this Batch's blocks "
                f"(memoryview, NumPy array) still alive: drop them first"
            )
        self.free_blocks()

    cdef void free_blocks(self) noexcept:
        cdef heap_t *heap = self.owner.heap     # open, for these blocks are live in it
        cdef char **blocks = self.blocks
        self.blocks = NULL
        self.owner.begin_call()
        with nogil:
            heap_free_many(heap, blocks, <size_t>self.n_blocks)
        self.owner.leave()
        free(blocks)

    def __getitem__(self, index):
        """Return a writable memoryview of a block; negative indices count from the end."""
        cdef Py_ssize_t i = index
        cdef BlockView view
        self.open_blocks()
        if i < 0:
            i += self.n_blocks
        if not 0 <= i < self.n_blocks:
            raise IndexError(f"block {index}: this Batch has {self.n_blocks}")
        view = BlockView.__new__(BlockView)
        view.batch = self
        view.index = i
        return memoryview(view)

    def __len__(self):
        return self.n_blocks

    def __enter__(self):
        self.open_blocks()
        return self

    def __exit__(self, exc_type, *exc_info):
        try:
            self.close()
        except BufferError:
            if exc_type is None:    # else what the block raised matters more, and holds the views
                raise

    def __reduce_ex__(self, protocol):
        raise TypeError("a Batch owns memory of this process: no copy, no pickle")

    def __repr__(self):
        return (
            f"<Batch of {self.n_blocks} blocks of {format_bytes(self.nbytes)}"
            f"{', closed' if self.blocks == NULL else ''}>"
        )


cdef Batch new_batch(Heap heap, size_t nbytes, size_t align_bytes, Py_ssize_t n_blocks):
    """Allocate all or none; raises what `Heap.refusal` says if refused."""
    # The object first: once the memory is had, nothing may fail before it has an owner.
    cdef Batch batch = Batch.__new__(Batch)
    cdef heap_t *c_heap = heap.open_heap()
    cdef char **blocks = <char **>calloc(n_blocks, sizeof(char *))
    cdef int refused, error = 0, n_asked = 0
    if blocks == NULL:
        raise OutOfMemoryError(f"no memory for the addresses of {n_blocks} blocks")
    batch.owner = heap
    batch.nbytes = nbytes
    batch.n_blocks = n_blocks
    heap.enter()
    try:
        while True:
            with nogil:
                refused = heap_alloc_many(
                    c_heap, nbytes, align_bytes, <size_t>n_blocks, blocks, &error
                )
            if not refused:
                batch.blocks = blocks
                break
            heap.relieve(nbytes, align_bytes, error, n_blocks, &n_asked)
    except BaseException:
        free(blocks)
        raise
    finally:
        heap.leave()
    if observed(blocks_are_noted):
        note_block(batch, <int64_t>nbytes * n_blocks, n_blocks)
    return batch
