"""Buffer.

Purpose
    Give Python one piece of memory, with an owner, a length, and views that keep it alive.
Structure
    numpy array / memoryview --export--> Buffer --owns--> slot or run --of--> Heap
Invariants
    memory != NULL <=> it is live in the heap, or foreign and kept by `keeper`
    n_exports > 0 => memory != NULL
    only new_buffer() and from_foreign() make one
Locking
    The GIL for the object's fields; the heap locks itself.
Units
    Bytes.
"""

import operator

cimport cython
from libc.errno cimport ENOMEM, errno
from libc.stdint cimport int64_t, uint32_t, uintptr_t

from pagealloc.core.export cimport fill_buffer
from pagealloc.core.heap cimport (
    heap_alloc_class,
    heap_alloc_fast,
    heap_alloc_slow,
    heap_free_fast,
    heap_free_slow,
)
from pagealloc.core.heap_owner cimport Heap
from pagealloc.core.heap_resize cimport heap_resize
from pagealloc.core.heap_state cimport heap_t
from pagealloc.core.noted cimport blocks_are_noted, note_block, note_growth, observed
from pagealloc.core.os_memory cimport os_real_page_bytes, os_resident_bytes
from pagealloc.core.page_heap cimport FREED

from pagealloc.errors import ClosedError
from pagealloc.units import format_bytes, parse_align, parse_bytes


@cython.final
@cython.no_gc_clear
@cython.freelist(256)
cdef class Buffer:
    """Memory of an allocator: `PageAllocator.alloc` makes one, `close()` or the last reference
    gives it back.

    Supports the buffer protocol (writable bytes) and DLPack, so ``memoryview``,
    ``numpy.frombuffer``, ``torch.from_dlpack`` and file reads work on it in place.  Not to be
    copied or pickled: it owns memory of this process.

    Attributes
    ----------
    nbytes : int
        Its length, as asked for.
    fresh : bool
        True if the memory came untouched from the kernel, hence was zero when handed out.

    Notes
    -----
    A Buffer may be passed between threads, and closed in any.  What several threads write into it
    at the same time is theirs to order.
    """

    def __init__(self):
        raise TypeError("only PageAllocator.alloc() and Buffer.from_foreign() make a Buffer")

    def __dealloc__(self):
        # No exports are left: each of them holds a reference to this object.
        if self.memory != NULL:
            self.free_memory()

    @property
    def address(self) -> int:
        """Where the memory starts.  Raises `ClosedError` after `close()`."""
        return <uintptr_t>self.open_memory()

    @property
    def closed(self) -> bool:
        """True after `close()`."""
        return self.memory == NULL

    @property
    def allocator(self):
        """The allocator it came from; None: its memory is foreign."""
        return self.owner

    @staticmethod
    def from_foreign(address, nbytes, owner, *, align=64):
        """Wrap memory that somebody else owns, such as a driver or a C library.

        Parameters
        ----------
        address : int
            Where it starts.
        nbytes : int or str
            Its length, at least 1.
        owner : object
            Whatever keeps the memory as long as it is alive: it is referenced until `close`, and
            its memory is never freed from here.
        align : int or str
            What `address` must be a multiple of, a power of two: 256 for CUDA, say.

        Returns
        -------
        Buffer
            Written in place; ``buffer.allocator`` is None.

        Raises
        ------
        TypeError
            `owner` is None, or a parameter is of no use.
        ValueError
            The memory is not aligned, or not all of its addresses are mapped.

        Notes
        -----
        Whether the memory may be written cannot be told from here: memory that is mapped for
        reading only ends the process at the first write.
        """
        return foreign_buffer(address, nbytes, owner, align)

    cdef char *open_memory(self) except NULL:
        if self.memory == NULL:
            raise ClosedError(f"this Buffer of {self.nbytes} bytes is closed")
        return self.memory

    def close(self) -> None:
        """Give the memory back; closing twice is fine.

        Raises
        ------
        BufferError
            Views of it (a memoryview, a NumPy array) are alive; nothing was changed.
        """
        cdef char *memory = self.memory
        if memory == NULL:
            return
        self.check_no_views()
        if self.free_memory() != FREED:
            raise SystemError(
                f"the heap does not know the live address {<uintptr_t>memory:#x}: "
                f"memory outside the Buffers was overwritten"
            )

    cdef int check_no_views(self) except -1:
        if self.n_exports:
            raise BufferError(
                f"{self.n_exports} view{'s' if self.n_exports > 1 else ''} of this Buffer "
                f"(memoryview, NumPy array) still alive: drop them first"
            )
        return 0

    def resize(self, nbytes) -> None:
        """Make it longer or shorter, and keep what is in it as far as that goes.

        Parameters
        ----------
        nbytes : int or str
            The new length, at least 1.  What is beyond the old one is undefined, unless the
            allocator zeroes on reuse.

        Raises
        ------
        TypeError, ValueError
            `nbytes` is no size, or the memory is foreign.
        BufferError
            Views of it are alive: the address may change.
        OutOfMemoryError, BackingUnavailableError
            As for `PageAllocator.alloc`; then nothing was changed.
        ClosedError
            It is closed.

        Notes
        -----
        Nothing is copied where the same block serves, where free pages follow, or where it has an
        arena of its own, whose pages are moved by the kernel.  The alignment asked for is kept.
        While it lasts, the Buffer is closed to other threads.
        """
        cdef size_t new_bytes = parse_bytes(nbytes)
        cdef char *memory = self.open_memory()
        cdef char *moved
        cdef heap_t *heap
        cdef int64_t n_more = 0
        cdef int error = 0, n_asked = 0
        self.check_no_views()
        if self.is_foreign:
            raise TypeError("the memory of this Buffer is foreign: its owner alone can resize it")
        heap = self.owner.enter()
        self.memory = NULL      # nobody else looks at it, or takes a view of it, meanwhile
        try:
            while True:
                with nogil:
                    moved = heap_resize(
                        heap, memory, self.nbytes, new_bytes, self.align_bytes, &error
                    )
                if moved != NULL:
                    memory = moved
                    n_more = <int64_t>new_bytes - <int64_t>self.nbytes
                    self.nbytes = new_bytes
                    self.fresh = False
                    break
                self.owner.relieve(new_bytes, self.align_bytes, error, 1, &n_asked)
        finally:
            self.memory = memory
            self.owner.leave()
        if observed(blocks_are_noted):
            note_growth(self, n_more, 0)

    cdef int free_memory(self) noexcept:
        """Give the memory back: the heap's answer."""
        cdef heap_t *heap
        cdef char *memory = self.memory
        cdef int outcome = FREED
        self.memory = NULL
        if self.is_foreign:
            self.keeper = None
            return FREED
        heap = self.owner.heap      # open, for this memory is live in it
        if not heap_free_fast(heap, memory):
            self.owner.begin_call()
            with nogil:
                outcome = heap_free_slow(heap, memory)
            self.owner.leave()
        return outcome

    def __getbuffer__(self, Py_buffer *view, int flags):
        fill_buffer(view, self, self.open_memory(), <Py_ssize_t>self.nbytes, False, flags)
        self.n_exports += 1

    def __releasebuffer__(self, Py_buffer *view):
        self.n_exports -= 1

    def __dlpack__(self, *, stream=None, max_version=None, dl_device=None, copy=None):
        """Export the bytes by DLPack, as an array of uint8; NumPy's export keeps the Buffer open.

        The parameters are those of the array API standard.  Raises `ClosedError` after `close()`.
        """
        import numpy as np

        asked = {
            "stream": stream, "max_version": max_version, "dl_device": dl_device, "copy": copy
        }
        # NumPy 1.26 knows `stream` alone.
        asked = {name: value for name, value in asked.items() if value is not None}
        return np.frombuffer(self, np.uint8).__dlpack__(**asked)

    def __dlpack_device__(self) -> tuple[int, int]:
        """Where DLPack says the memory is: ``(1, 0)``, the CPU."""
        self.open_memory()
        return 1, 0

    def __len__(self):
        return self.nbytes

    def __enter__(self):
        self.open_memory()
        return self

    def __exit__(self, exc_type, *exc_info):
        try:
            self.close()
        except BufferError:
            if exc_type is None:    # else what the block raised matters more, and holds the views
                raise

    def __reduce_ex__(self, protocol):
        raise TypeError(
            "a Buffer owns memory of this process: no copy, no pickle; use bytes(buffer)"
        )

    def __repr__(self):
        if self.memory == NULL:
            return f"<Buffer of {format_bytes(self.nbytes)}, closed>"
        return f"<Buffer of {format_bytes(self.nbytes)} at {<uintptr_t>self.memory:#x}>"


cdef Buffer new_buffer(Heap heap, size_t nbytes, size_t align_bytes):
    """Allocate and wrap; raises what `Heap.refusal` says if refused."""
    # The object first: once the memory is had, nothing may fail before it has an owner.
    cdef Buffer buffer = Buffer.__new__(Buffer)
    buffer.owner = heap
    buffer.nbytes = nbytes
    buffer.align_bytes = <uint32_t>align_bytes
    if heap.heap != NULL:
        buffer.memory = heap_alloc_fast(heap.heap, nbytes, align_bytes)
    if buffer.memory == NULL:
        fill_slow(buffer, heap, nbytes, align_bytes, 0)
    if observed(blocks_are_noted):
        note_block(buffer, nbytes, 1)
    return buffer


cdef Buffer new_buffer_of_class(Heap heap, size_t nbytes, size_t slot_class):
    """The same with a slot of the class of exactly `nbytes`."""
    cdef Buffer buffer = Buffer.__new__(Buffer)
    buffer.owner = heap
    buffer.nbytes = nbytes
    if heap.heap != NULL:
        buffer.memory = heap_alloc_class(heap.heap, slot_class)
    if buffer.memory == NULL:
        fill_slow(buffer, heap, nbytes, 0, slot_class)
    if observed(blocks_are_noted):
        note_block(buffer, nbytes, 1)
    return buffer


cdef int fill_slow(
    Buffer buffer, Heap heap, size_t nbytes, size_t align_bytes, size_t slot_class
) except -1:
    """Let go of the GIL while the kernel may have to work."""
    cdef heap_t *c_heap = heap.enter()
    cdef bint fresh = False
    cdef int error = 0, n_asked = 0
    try:
        while True:
            with nogil:
                buffer.memory = heap_alloc_slow(
                    c_heap, nbytes, align_bytes, slot_class, &fresh, &error
                )
            if buffer.memory != NULL:
                buffer.fresh = fresh
                break
            heap.relieve(nbytes, align_bytes, error, 1, &n_asked)
    finally:
        heap.leave()
    return 0


cdef Buffer foreign_buffer(object address, object nbytes, object owner, object align):
    cdef Buffer buffer = Buffer.__new__(Buffer)
    cdef object start = operator.index(address)
    cdef object length = parse_bytes(nbytes)
    cdef size_t align_bytes = parse_align(align)
    cdef size_t page_bytes = os_real_page_bytes()
    cdef size_t first_page, end
    if owner is None:
        raise TypeError("owner=None: pass the object that keeps the memory at this address alive")
    if not 0 < start <= (1 << 64) - length:
        raise ValueError(f"address={address:#x}, nbytes={length}: no such range of addresses")
    if start % align_bytes:
        raise ValueError(
            f"address={start:#x} is no multiple of align={align_bytes}, but of {start & -start}: "
            f"have it allocated with that alignment, or ask for less"
        )
    first_page = <size_t>start & ~(page_bytes - 1)
    end = (<size_t>(start + length) + page_bytes - 1) & ~(page_bytes - 1)
    if os_resident_bytes(<void *>first_page, end - first_page) < 0 and errno == ENOMEM:
        raise ValueError(
            f"address={start:#x}, nbytes={length}: not all of this memory is mapped"
        )
    buffer.memory = <char *><size_t>start
    buffer.nbytes = length
    buffer.align_bytes = <uint32_t>align_bytes
    buffer.keeper = owner
    buffer.is_foreign = True
    return buffer
