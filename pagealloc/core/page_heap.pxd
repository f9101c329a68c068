"""The page runs of all arenas of one heap: best fit, coalescing, growth, budget."""

from libc.stdint cimport int64_t, uint16_t, uintptr_t

from pagealloc.core.arenas cimport page_heap_t
from pagealloc.core.backing cimport placement_t
from pagealloc.core.page_map cimport CHUNK_BYTES, block_t, page_map_chunk, page_map_t, page_t
from pagealloc.core.page_run cimport run_t

cdef enum:                      # what a free by address comes to
    FREED = 0
    NOT_OURS = 1                # no slot or run of this heap starts there
    NOT_LIVE = 2                # it is free already

cdef enum:                      # what is known of pages that are freed
    FREED_NOW = 0
    FREED_LONG_AGO = 1          # nobody has needed them for a while: the purger's at once
    FREED_TO_STAY = 2           # somebody will need them: not the purger's until they were used

cdef void page_heap_init(
    page_heap_t *pages, page_map_t *map, void *owner, size_t page_bytes, size_t arena_bytes,
    const placement_t *placement, int64_t budget_bytes
) noexcept nogil
cdef int page_heap_destroy(page_heap_t *pages) noexcept nogil
cdef run_t *page_heap_alloc(
    page_heap_t *pages, int64_t n_pages, size_t align_bytes, uint16_t size_class, void *slab,
    bint may_grow, bint *fresh, int *error
) noexcept nogil
cdef int page_heap_grow(page_heap_t *pages, size_t nbytes) noexcept nogil
cdef void page_heap_free(
    page_heap_t *pages, const block_t *blocks, int64_t n, int freed
) noexcept nogil
cdef size_t page_heap_run_bytes(page_heap_t *pages, const char *address) noexcept nogil
cdef bint page_heap_has_own_arena(
    const page_heap_t *pages, int64_t n_pages, size_t align_bytes
) noexcept nogil
cdef void page_heap_set_class(
    page_heap_t *pages, const run_t *run, uint16_t size_class
) noexcept nogil
cdef const char *page_heap_check(page_heap_t *pages) noexcept nogil


cdef inline page_t *page_heap_entry(page_heap_t *pages, const char *address) noexcept nogil:
    """What the page map has of a page of this heap."""
    return &page_map_chunk(pages.map, address).pages[
        (<uintptr_t>address & (CHUNK_BYTES - 1)) // pages.page_bytes
    ]


cdef struct arena_report_t:
    char *address
    int64_t reserved_bytes
    int64_t committed_bytes
    int64_t held_bytes          # -1: the kernel refused to say
    int64_t huge_bytes          # -1: it does not say that
    int node                    # negative: of none, or it does not say
    int achieved_backing
    bint dedicated

cdef int64_t page_heap_report(
    page_heap_t *pages, arena_report_t *reports, int64_t n_reports
) noexcept nogil
