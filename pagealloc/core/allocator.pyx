"""PageAllocator: the Python face of a heap.

Purpose
    Check what the caller asks for, say what is wrong with it, and hand out Buffers and arrays.
Structure
    alloc / empty / zeros -> size and alignment as numbers -> new_buffer -> heap
Locking
    None of its own.
Units
    Bytes.
"""

import operator

from pagealloc.core.buffer cimport Buffer, new_buffer
from pagealloc.core.heap_owner cimport Heap

from pagealloc.options import option_value
from pagealloc.units import format_bytes, parse_bytes

cdef size_t MAX_ALIGN_BYTES = 1 << 30


cdef size_t checked_align(object align) except 0:
    """`align` as a power of two."""
    cdef object align_bytes = parse_bytes(align, name="align")
    if align_bytes & (align_bytes - 1) or align_bytes > MAX_ALIGN_BYTES:
        raise ValueError(
            f"align={align!r}: an alignment is a power of two of at most "
            f"{format_bytes(MAX_ALIGN_BYTES)}"
        )
    return align_bytes


class PageAllocator(Heap):
    """Page-aligned memory straight from the kernel.

    Parameters
    ----------
    backing : {"auto", "hugetlb", "thp", "base"}
        What stands behind the arenas.  ``"auto"`` takes the best that can be had, in this order,
        and base pages where `budget_bytes` is below one arena; a backing asked for by name is had
        or refused.  ``stats().arenas`` tells what was achieved.
    arena_bytes : int or str
        How much address space is reserved at a time; rounded up to 2 MiB.  A request above half
        of it gets an arena of its own.
    budget_bytes : int or str, optional
        Hard limit of what is handed out or kept for reuse; None: no limit.

    Raises
    ------
    TypeError, ValueError
        A parameter is no size, or no such backing.

    Notes
    -----
    All methods are thread-safe, and release the GIL while the kernel works.  `close` refuses while
    another thread is inside one of them.
    Addresses are page-aligned from a page on and 64-byte-aligned below, unless `align` asks for
    more.  Sizes from a page on cost whole pages and not one more.

    Examples
    --------
    >>> allocator = PageAllocator(budget_bytes="1GiB")
    >>> with allocator.alloc("64KiB") as buffer:
    ...     memoryview(buffer)[:5] = b"hello"
    """

    __slots__ = ()

    def alloc(self, nbytes, *, align=None) -> Buffer:
        """Allocate memory.

        Parameters
        ----------
        nbytes : int or str
            Length, at least 1, such as ``4096`` or ``"64KiB"``.
        align : int or str, optional
            What the address is a multiple of: a power of two up to 1 GiB.  None: a page for
            lengths from a page on, else 64 bytes.

        Returns
        -------
        Buffer
            Its content is undefined; it is zero if ``buffer.fresh``.

        Raises
        ------
        TypeError, ValueError
            `nbytes` or `align` is none.
        OutOfMemoryError
            The budget or the kernel refused.
        BackingUnavailableError
            The backing asked for by name cannot be had.
        ClosedError
            The allocator is closed.
        """
        cdef size_t length = parse_bytes(nbytes)
        return new_buffer(self, length, 0 if align is None else checked_align(align))

    def empty(self, shape, dtype="float64"):
        """Return a new uninitialised array, C-contiguous and aligned as by `alloc`.

        Parameters
        ----------
        shape : int or tuple of int
        dtype : numpy dtype-like
            Any without Python objects.

        Returns
        -------
        numpy.ndarray
            It and every view of it keep its Buffer alive; the memory goes back with the last.

        Raises
        ------
        TypeError, ValueError
            A negative shape, or a dtype that holds Python objects.
        OutOfMemoryError, BackingUnavailableError, ClosedError
            As `alloc`.
        """
        return new_array(self, shape, dtype, False)

    def zeros(self, shape, dtype="float64"):
        """Return a new array of zeros; as `empty` otherwise.

        Memory that comes fresh from the kernel is zero already and stays untouched.
        """
        return new_array(self, shape, dtype, True)


cdef object new_array(Heap heap, object shape, object dtype, bint zeroed):
    import numpy as np

    cdef Buffer buffer
    cdef object n_items = 1, sizes, size
    heap.open_heap()
    dtype = np.dtype(dtype)
    if dtype.hasobject:
        raise TypeError(f"dtype={dtype} holds Python objects, which need NumPy's own memory")
    try:
        sizes = tuple(shape) if hasattr(shape, "__iter__") else (shape,)
        sizes = tuple([operator.index(size) for size in sizes])
    except TypeError:
        raise TypeError(
            f"shape={shape!r}: a shape is an integer or a tuple of integers"
        ) from None
    for size in sizes:
        if size < 0:
            raise ValueError(f"shape={shape!r}: a dimension is negative")
        n_items *= size
    if n_items * dtype.itemsize == 0:
        return np.empty(sizes, dtype)   # nothing to own
    try:
        nbytes = parse_bytes(n_items * dtype.itemsize)
    except ValueError as error:
        raise ValueError(f"shape={shape!r} of {dtype}: {error}") from None
    buffer = new_buffer(heap, nbytes, 0)
    bytes_view = np.frombuffer(buffer, np.uint8)    # this export keeps close() from freeing it
    if zeroed and not buffer.fresh:
        bytes_view.fill(0)
    return np.ndarray(sizes, dtype, bytes_view)


_default_allocators = {}    # at most one; a dict, for its setdefault() is atomic


def default_allocator() -> PageAllocator:
    """Return the process's shared allocator, made at the first call.

    Its settings are the options ``backing``, ``arena_bytes`` and ``budget_bytes`` (see
    `pagealloc.options`), which environment variables can set.  Thread-safe.
    """
    # No lock: a child forked while another thread holds it would wait forever.
    if not _default_allocators:
        _default_allocators.setdefault("default", PageAllocator(
            backing=option_value("backing"),
            arena_bytes=option_value("arena_bytes"),
            budget_bytes=option_value("budget_bytes"),
        ))
    return _default_allocators["default"]
