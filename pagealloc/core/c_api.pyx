"""The C API: heaps for other people's native code.

Purpose
    Let C, C++ and Cython code of other packages allocate without Python and without the GIL: check
    what they ask for, and pass it on to the heap.
Structure
    Cython:  from pagealloc cimport page_alloc  -> page_alloc ->  heap.pyx
    C, C++:  capsule `table` -> pagealloc_api   -> page_alloc ->  heap.pyx
Invariants
    a caller's wrong size, alignment or address, or a heap that is NULL, ends in an answer that says
    so, never in a crash
    the table is filled before the capsule exists, and never changes
    within one ABI version nothing but additions (see include/pagealloc.h)
Locking
    None of its own.
Units
    Bytes.
"""

from cpython.pycapsule cimport PyCapsule_New
from libc.stdint cimport uint32_t
from libc.string cimport memcpy, memset

from pagealloc.core.heap cimport (
    heap_alloc_checked,
    heap_alloc_many,
    heap_free_checked,
    heap_free_many,
    heap_usable_bytes,
)
from pagealloc.core.heap_counts cimport heap_counts, heap_counts_t
from pagealloc.core.heap_owner cimport Heap
from pagealloc.core.heap_state cimport heap_t

from pathlib import Path as _Path

cdef extern from "pagealloc.h":
    cdef enum:
        PAGEALLOC_ABI_VERSION
        PAGEALLOC_N_FUNCTIONS
    ctypedef struct pagealloc_stats:
        pass
    ctypedef struct pagealloc_api:
        uint32_t abi_version
        uint32_t n_functions
        PageHeap *(*heap_of)(object allocator) except NULL
        void *(*alloc)(PageHeap *heap, size_t nbytes, size_t align_bytes) noexcept nogil
        int (*free)(PageHeap *heap, void *address) noexcept nogil
        int (*alloc_many)(
            PageHeap *heap, size_t nbytes, size_t align_bytes, size_t n, void **addresses
        ) noexcept nogil
        size_t (*free_many)(PageHeap *heap, void *const *addresses, size_t n) noexcept nogil
        size_t (*usable_bytes)(PageHeap *heap, const void *address) noexcept nogil
        void (*stats)(PageHeap *heap, pagealloc_stats *stats) noexcept nogil

cdef extern from * nogil:
    """
    /* The header and the rooms below say the same in their own words. */
    #include <assert.h>
    static_assert(PAGEALLOC_FREED == 0 && PAGEALLOC_NOT_OURS == 1 && PAGEALLOC_NOT_LIVE == 2,
                  "the codes of page_heap.pxd and c_api.pxd");
    static_assert(sizeof(pagealloc_stats) == 8 * sizeof(int64_t), "PageStats of c_api.pxd");
    static_assert(offsetof(pagealloc_api, heap_of) + PAGEALLOC_N_FUNCTIONS * sizeof(void *)
                  == sizeof(pagealloc_api), "PAGEALLOC_N_FUNCTIONS counts the table's functions");
    """

cdef extern from * nogil:
    """
    #define PAGEALLOC_MAX_NBYTES ((size_t)1 << 47)      /* as pagealloc.units has it */
    #define PAGEALLOC_MAX_ALIGN_BYTES ((size_t)1 << 30)
    """
    const size_t MAX_NBYTES "PAGEALLOC_MAX_NBYTES"
    const size_t MAX_ALIGN_BYTES "PAGEALLOC_MAX_ALIGN_BYTES"


# ---------------------------------------------------------------------------------------------
# The functions.  Thin; alloc and free of the table are the heap's own, for inner loops

cdef inline bint is_possible(
    const PageHeap *heap, size_t nbytes, size_t align_bytes
) noexcept nogil:
    return (
        heap != NULL
        and nbytes - 1 < MAX_NBYTES         # 0 wraps around
        and align_bytes & (align_bytes - 1) == 0
        and align_bytes <= MAX_ALIGN_BYTES
    )


cdef PageHeap *page_heap_of(object allocator) except NULL:
    """The heap of a `PageAllocator`, valid until that is closed or collected: keep a reference.

    Raises TypeError for another object, and ClosedError after `close()`.
    """
    if not isinstance(allocator, Heap):
        raise TypeError(
            f"allocator must be a pagealloc.PageAllocator, such as pagealloc.default_allocator(), "
            f"not {type(allocator).__name__}"
        )
    return <PageHeap *>(<Heap>allocator).open_heap()


cdef void *page_alloc(PageHeap *heap, size_t nbytes, size_t align_bytes) noexcept nogil:
    """Memory of `nbytes`, from 1 on; NULL if refused, or if an argument is out of its range.

    `align_bytes` is a power of two of at most 1 GiB; 0: a page for lengths from a page on,
    64 bytes below.
    """
    return heap_alloc_checked(<heap_t *>heap, nbytes, align_bytes)


cdef int page_free(PageHeap *heap, void *address) noexcept nogil:
    """Give a block back, in any thread: PAGE_FREED, or another code and nothing was changed."""
    return heap_free_checked(<heap_t *>heap, address)


cdef int page_alloc_many(
    PageHeap *heap, size_t nbytes, size_t align_bytes, size_t n, void **addresses
) noexcept nogil:
    """`n` blocks as by page_alloc: 0, or -1 and none; `addresses` has room for `n`."""
    cdef int error
    if addresses == NULL or not is_possible(heap, nbytes, align_bytes):
        return -1
    return heap_alloc_many(
        <heap_t *>heap, nbytes, align_bytes, n, <char **>addresses, &error
    )


cdef size_t page_free_many(PageHeap *heap, void **addresses, size_t n) noexcept nogil:
    """Free `n` blocks and return how many were; what page_free would refuse is left alone."""
    if heap == NULL or addresses == NULL:
        return 0
    return heap_free_many(<heap_t *>heap, <char *const *>addresses, n)


cdef size_t free_many(PageHeap *heap, void *const *addresses, size_t n) noexcept nogil:
    """As page_free_many, for the header's callers, whose array may be constant."""
    return page_free_many(heap, <void **>addresses, n)


cdef size_t page_usable_bytes(PageHeap *heap, const void *address) noexcept nogil:
    """How long the live block at `address` is, at least what was asked for; 0 if none starts there.
    """
    if heap == NULL:
        return 0
    return heap_usable_bytes(<heap_t *>heap, <const char *>address)


cdef PageStats page_stats(PageHeap *heap) noexcept nogil:
    """What the heap holds; takes every lock of it in turn.  All zero for NULL."""
    cdef PageStats stats
    cdef heap_counts_t counts
    if heap == NULL:
        memset(&stats, 0, sizeof(stats))
        return stats
    counts = heap_counts(<heap_t *>heap)
    stats.reserved_bytes = counts.reserved_bytes
    stats.committed_bytes = counts.committed_bytes
    stats.live_bytes = counts.live_bytes
    stats.idle_bytes = counts.idle_bytes
    stats.n_live = counts.n_live
    stats.n_allocs = counts.n_allocs
    stats.n_frees = counts.n_frees
    stats.n_failed = counts.n_failed
    return stats


cdef void fill_stats(PageHeap *heap, pagealloc_stats *stats) noexcept nogil:
    """As page_stats, in the header's words."""
    cdef PageStats filled = page_stats(heap)
    if stats != NULL:
        memcpy(stats, &filled, sizeof(filled))


# ---------------------------------------------------------------------------------------------
# The table

cdef pagealloc_api api

api.abi_version = PAGEALLOC_ABI_VERSION
api.n_functions = PAGEALLOC_N_FUNCTIONS
api.heap_of = page_heap_of
api.alloc = <void *(*)(PageHeap *, size_t, size_t) noexcept nogil>heap_alloc_checked
api.free = <int (*)(PageHeap *, void *) noexcept nogil>heap_free_checked
api.alloc_many = page_alloc_many
api.free_many = free_many
api.usable_bytes = page_usable_bytes
api.stats = fill_stats

table = PyCapsule_New(&api, "pagealloc.core.c_api.table", NULL)


def get_include() -> str:
    """Return the folder of ``pagealloc.h``, for the ``include_dirs`` of an extension in C or C++.

    An extension in Cython does not need it: ``from pagealloc cimport page_alloc``.
    """
    return str(_Path(__file__).parent.parent / "include")
