"""The public cimport API: page-aligned memory for other packages' Cython code, nogil.

    from pagealloc cimport PageHeap, page_alloc, page_free, page_heap_of

    cdef PageHeap *heap = page_heap_of(allocator)   # keep a reference to the allocator
    with nogil:
        memory = page_alloc(heap, 4096, 0)          # NULL: refused
        page_free(heap, memory)

What each function does, who owns what and what a mistake comes to: docs/c_api.md, or
``include/pagealloc.h``.  No header and no include folder is needed.

`Window` and `WindowView` are there for rooms that compute on window memory without the GIL.
"""

from pagealloc.core.c_api cimport (
    PAGE_FREED,
    PAGE_NOT_LIVE,
    PAGE_NOT_OURS,
    PageHeap,
    PageStats,
    page_alloc,
    page_alloc_many,
    page_free,
    page_free_many,
    page_heap_of,
    page_stats,
    page_usable_bytes,
)
from pagealloc.core.window cimport Window
from pagealloc.core.window_view cimport WindowView
