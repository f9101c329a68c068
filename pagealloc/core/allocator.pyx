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
import os

cimport cython
from cpython.long cimport PyLong_AsSsize_t, PyLong_CheckExact

from pagealloc.core.batch cimport Batch, new_batch
from pagealloc.core.buffer cimport Buffer, new_buffer
from pagealloc.core.heap_latency cimport heap_latencies
from pagealloc.core.heap_owner cimport Heap
from pagealloc.core.heap_state cimport heap_t
from pagealloc.core.prefault cimport prefault_buffer, prefault_heap

from pagealloc.core.exact import exact_class
from pagealloc.errors import OutOfMemoryError
from pagealloc.options import option_value
from pagealloc.units import format_bytes, parse_align, parse_bytes

cdef Py_ssize_t MAX_BATCH_BLOCKS = 1 << 32
cdef Py_ssize_t MAX_PLAIN_BYTES = 1 << 47       # as pagealloc.units has it
cdef Py_ssize_t MACHINE_BYTES = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


cdef inline size_t size_of(object nbytes) except 0:
    """`nbytes` as a number; parse_bytes sees to all but a plain int that is possible."""
    cdef Py_ssize_t plain_nbytes
    if PyLong_CheckExact(nbytes):
        try:
            plain_nbytes = PyLong_AsSsize_t(nbytes)
        except OverflowError:
            plain_nbytes = 0
        if 0 < plain_nbytes <= MAX_PLAIN_BYTES:
            return <size_t>plain_nbytes
    return parse_bytes(nbytes)


cdef Py_ssize_t checked_count(object n_blocks, size_t block_bytes) except 0:
    """`n_blocks` as a number; refused if that many blocks are more than the machine's memory.

    A single block may be larger: until it is touched it costs nothing.  Each of many costs its
    entries in tables, so that the kernel would end the process before anything is touched.
    """
    cdef object count, all_bytes, machine_bytes
    try:
        count = operator.index(n_blocks)
    except TypeError:
        raise TypeError(f"n_blocks must be a number, not {type(n_blocks).__name__}") from None
    if not 0 < count <= MAX_BATCH_BLOCKS:
        raise ValueError(f"n_blocks={n_blocks}: from 1 to {MAX_BATCH_BLOCKS} are possible")
    all_bytes = count * <object>block_bytes
    if all_bytes > MACHINE_BYTES:
        import psutil               # takes longer than all else here, and is seldom needed

        machine_bytes = MACHINE_BYTES + psutil.swap_memory().total
        if all_bytes > machine_bytes:
            raise OutOfMemoryError(
                f"asked for {count} blocks that take {format_bytes(block_bytes)} each, "
                f"{format_bytes(all_bytes)} together: this machine has "
                f"{format_bytes(machine_bytes)} of memory and swap; ask for fewer, or for one "
                f"block, which takes no memory where it is not touched"
            )
    return count


@cython.auto_pickle(False)
cdef class PageAllocator(Heap):
    """Page-aligned memory straight from the kernel.

    Parameters
    ----------
    backing : {"auto", "hugetlb", "thp", "base"}
        What stands behind the arenas.  ``"auto"`` takes the best that can be had, in this order,
        and base pages where `budget_bytes` is below one arena; a backing asked for by name is had
        or refused.  ``stats().arenas`` tells what was achieved.
    arena_bytes : int or str
        How much address space is reserved at a time; rounded up to 2 MiB.  A request above half
        of it gets an arena of its own.  Where so much is refused, half of it is tried, and so on.
    budget_bytes : int or str, optional
        Hard limit of what is handed out or kept for reuse; None: no limit.  ``"auto"``: what the
        machine and the memory cgroups of this process have left now.
    purge_after_s : float or None
        What lies idle for this long goes back to the kernel by itself, after half as much again at
        the latest, also if the process makes no call: a thread of the process sees to it.  None:
        only `trim` gives memory back.
    huge_page_bytes : int or str, optional
        Which huge pages ``backing="hugetlb"`` takes, such as ``"1GiB"``; None: the usual ones.
    numa_node : int, optional
        Memory comes from this NUMA node and from no other.
    preferred : int, optional
        Memory comes from this NUMA node as long as it has some.
    on_fork : {"inherit", "dontfork"}
        Whether a forked child gets a copy of the memory.  ``"dontfork"``: it finds zeros there, and
        the fork takes less time the more memory there is.
    zero_on_reuse : bool
        Memory that was in use before is filled with zeros before it is handed out again.
    guard : {None, "slot", "freed", "slot+freed"}
        For the search of errors; every block takes whole pages of its own then, and system calls.
        ``"slot"``: the page behind each block cannot be accessed.  A block shorter than a page ends
        right before it, up to the multiple of 64 bytes or `align`; a longer one starts on a page,
        and the rest of its last page is not guarded.  ``"freed"``: what was freed cannot be
        accessed until it is used again.  Such an access ends the process by SIGSEGV; Python's
        `faulthandler` shows where.
    time_every : int
        One allocation in about so many has its time taken, for `latencies`; 0: none.  It can be set
        later as well.

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

    @cython.binding(False)
    def alloc(self, nbytes, *, align=None, prefault=False):
        """Allocate memory.

        Parameters
        ----------
        nbytes : int or str
            Length, at least 1, such as ``4096`` or ``"64KiB"``.
        align : int or str, optional
            What the address is a multiple of: a power of two up to 1 GiB.  None: a page for
            lengths from a page on, else 64 bytes.
        prefault : bool
            Have the kernel back all of it now, by several threads, so that no first touch has to
            wait for it: as many as there are CPUs, 8 at most.

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
        cdef Buffer buffer = new_buffer(
            self, size_of(nbytes), 0 if align is None else parse_align(align)
        )
        if prefault:
            prefault_buffer(buffer)
        return buffer

    def prefault(self, nbytes, *, n_threads=None, progress=None, cancel=None) -> int:
        """Have the kernel back free memory now, so that later allocations cause no page faults.

        Parameters
        ----------
        nbytes : int or str
            How much, such as ``"4GiB"``.  Free memory that is backed already counts.
        n_threads : int, optional
            How many threads do it, the calling one included; None: as many as there are CPUs, 8 at
            most.
        progress : callable, optional
            Called now and then with the bytes that are backed, and with all that will be; in the
            calling thread.  What it raises ends the work, and is raised.
        cancel : threading.Event, optional
            Once it is set, the work ends after a few milliseconds.

        Returns
        -------
        int
            How many bytes are backed: all of them, in whole pages, unless cancelled.

        Raises
        ------
        TypeError, ValueError
            `nbytes` is no size, or `n_threads` below 1, or the allocator has ``guard=``.
        OutOfMemoryError, BackingUnavailableError, ClosedError
            As `alloc`; then nothing more than before is kept.

        Notes
        -----
        The memory waits for as long as it takes; once it was used and freed, `purge_after_s` holds
        for it as for all else.  `trim` gives it back.  It serves requests of up to half of
        `arena_bytes`; for larger ones, which get arenas of their own, say ``alloc(…,
        prefault=True)``.  Thread-safe.
        """
        return prefault_heap(self, size_of(nbytes), n_threads, progress, cancel)

    def alloc_many(self, nbytes, n_blocks, *, align=None) -> Batch:
        """Allocate many blocks of one size by one call.

        Parameters
        ----------
        nbytes : int or str
            Length of each block, as for `alloc`.
        n_blocks : int
            How many, at least 1.
        align : int or str, optional
            As for `alloc`.

        Returns
        -------
        Batch
            All of them; they are freed together.

        Raises
        ------
        TypeError, ValueError
            `nbytes` or `align` is none, or `n_blocks` is no positive number.
        OutOfMemoryError, BackingUnavailableError, ClosedError
            As `alloc`, or all blocks together are more than the machine's memory and swap; then
            none was allocated.
        """
        cdef size_t block_bytes = size_of(nbytes)
        cdef size_t align_bytes = 0 if align is None else parse_align(align)
        cdef Py_ssize_t count = checked_count(n_blocks, max(block_bytes, align_bytes))
        return new_batch(self, block_bytes, align_bytes, count)

    def exact(self, nbytes):
        """Return the class of blocks of exactly `nbytes`, for many of one odd size.

        Parameters
        ----------
        nbytes : int or str
            Length of a block, from 64 on.

        Returns
        -------
        ExactClass
            ``alloc()`` of it costs what any allocation does.

        Raises
        ------
        TypeError, ValueError
            `nbytes` is no size, or too small, or there are more than about a hundred sizes.
        ClosedError
            The allocator is closed.

        Examples
        --------
        >>> records = PageAllocator().exact(1000)       # alloc(1000) takes slots of 1,024 bytes
        >>> with records.alloc() as record:
        ...     record.nbytes
        1000
        """
        return exact_class(self, size_of(nbytes))

    def latencies(self):
        """Return how long allocations took, as a tuple of `LatencyHistogram`.

        One for each size group and NUMA node that has samples: the size classes below a page, and
        page runs by the power of two of their length.  Samples are one allocation in `time_every`,
        at irregular distances; the two readings of the clock are in each (20 to 50 ns).
        Thread-safe.
        """
        cdef heap_t *heap = self.enter()    # which makes objects, so another thread may come in
        try:
            return tuple(heap_latencies(heap))
        finally:
            self.leave()

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

    Its settings are the options ``backing``, ``arena_bytes``, ``budget_bytes`` and
    ``purge_after_s`` (see `pagealloc.options`), which environment variables can set.  Thread-safe.
    """
    # No lock: a child forked while another thread holds it would wait forever.
    if not _default_allocators:
        purge_after_s = option_value("purge_after_s")
        _default_allocators.setdefault("default", PageAllocator(
            backing=option_value("backing"),
            arena_bytes=option_value("arena_bytes"),
            budget_bytes=option_value("budget_bytes"),
            purge_after_s=None if purge_after_s == "never" else purge_after_s,
        ))
    return _default_allocators["default"]
