"""ExactClass.

Purpose
    Serve one block size of a caller's own without rounding it up: records, rows, descriptors.
Structure
    allocator.exact(1000) -> ExactClass -> class of slots of 1,000 bytes, or exact page runs
Invariants
    size_class != 0 <=> the blocks are slots; all ExactClasses of a heap and size share one class
Locking
    None of its own.
Units
    Bytes.
"""

cimport cython

from pagealloc.core.buffer cimport Buffer, new_buffer, new_buffer_of_class
from pagealloc.core.heap_owner cimport Heap
from pagealloc.core.heap_state cimport heap_exact_class
from pagealloc.core.size_class cimport SLOT_UNIT_BYTES

from pagealloc.units import format_bytes


@cython.final
@cython.auto_pickle(False)
cdef class ExactClass:
    """Blocks of one size, not rounded: `PageAllocator.exact` makes it.

    Blocks of up to half a page lie side by side in slabs, none over a page's end.  They start on
    the largest power of two that divides `nbytes`, 64 at most.  Larger blocks take exactly the
    pages they need, as every allocation does.

    Attributes
    ----------
    nbytes : int
        Length of a block.

    Notes
    -----
    Thread-safe.  It keeps the allocator alive, and stays of use until that is closed.
    """

    cdef readonly size_t nbytes
    cdef size_t size_class          # 0: page runs
    cdef Heap owner

    def __init__(self):
        raise TypeError("only PageAllocator.exact() makes an ExactClass")

    @property
    def allocator(self):
        """The allocator the blocks come from."""
        return self.owner

    def alloc(self) -> Buffer:
        """Allocate one block.

        Raises
        ------
        OutOfMemoryError, BackingUnavailableError, ClosedError
            As `PageAllocator.alloc`.
        """
        if self.owner is None:
            raise TypeError("only PageAllocator.exact() makes an ExactClass")
        if self.size_class:
            return new_buffer_of_class(self.owner, self.nbytes, self.size_class)
        return new_buffer(self.owner, self.nbytes, 0)

    def __repr__(self):
        return f"<ExactClass of {format_bytes(self.nbytes)}>"


def exact_class(Heap heap, nbytes: int) -> ExactClass:
    """Return the ExactClass of a heap for `nbytes`, which is a size; see `PageAllocator.exact`."""
    cdef ExactClass exact = ExactClass.__new__(ExactClass)
    heap.open_heap()
    if nbytes < SLOT_UNIT_BYTES:
        raise ValueError(
            f"nbytes={nbytes}: blocks of an exact class have {SLOT_UNIT_BYTES} bytes at least; "
            f"alloc() serves smaller ones"
        )
    exact.owner = heap
    exact.nbytes = nbytes
    if nbytes <= heap.heap.classes.largest_bytes:
        exact.size_class = heap_exact_class(heap.heap, nbytes)
        if exact.size_class == 0:
            raise ValueError(
                f"nbytes={nbytes}: this allocator has as many classes of slots as it can have; "
                f"use one ExactClass for several sizes, or another allocator"
            )
    return exact
