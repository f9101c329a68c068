"""The C API as Cython sees it; other packages reach it by ``from pagealloc cimport ...``.

Threads, ownership and mistakes are as in ``include/pagealloc.h``, whose table holds these same
functions.  Cython compares the signatures when it imports the module, so what is here may be added
to but not changed: a structure is not compared at all.  Nothing of the heap's own declarations is
seen here, and no header is needed to compile against it.
"""

from libc.stdint cimport int64_t

cdef extern from * nogil:
    """
    struct pagealloc_heap;
    """
    cdef struct PageHeap "pagealloc_heap":  # opaque: the allocator of one PageAllocator
        pass

cdef enum:                      # what page_free answers
    PAGE_FREED = 0
    PAGE_NOT_OURS = 1           # no block of this heap starts there; nothing was changed
    PAGE_NOT_LIVE = 2           # a block that is free already; nothing was changed

cdef struct PageStats:          # field by field the header's pagealloc_stats
    int64_t reserved_bytes      # address space
    int64_t committed_bytes     # what may be backed by memory; never above the budget
    int64_t live_bytes          # of live blocks, each as long as its slot or pages
    int64_t idle_bytes          # of free slots kept for the threads' next requests
    int64_t n_live              # blocks, those of Python's Buffers included
    int64_t n_allocs            # since the heap was made
    int64_t n_frees
    int64_t n_failed            # requests refused by the budget or the kernel

cdef PageHeap *page_heap_of(object allocator) except NULL
cdef void *page_alloc(PageHeap *heap, size_t nbytes, size_t align_bytes) noexcept nogil
cdef int page_free(PageHeap *heap, void *address) noexcept nogil
cdef int page_alloc_many(
    PageHeap *heap, size_t nbytes, size_t align_bytes, size_t n, void **addresses
) noexcept nogil
cdef size_t page_free_many(PageHeap *heap, void **addresses, size_t n) noexcept nogil
cdef size_t page_usable_bytes(PageHeap *heap, const void *address) noexcept nogil
cdef PageStats page_stats(PageHeap *heap) noexcept nogil
