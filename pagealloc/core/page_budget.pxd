"""What a heap may use: the ledger of its page heap against its budget."""

from libc.stdint cimport int64_t

from pagealloc.core.arena cimport arena_t
from pagealloc.core.arenas cimport page_heap_t
from pagealloc.core.page_run cimport run_t

cdef bint page_budget_allows(
    const page_heap_t *pages, const run_t *run, const char *start, int64_t nbytes
) noexcept nogil
cdef void page_budget_purge(
    page_heap_t *pages, int64_t enough_bytes, const run_t *spared
) noexcept nogil
cdef run_t *page_budget_any(
    page_heap_t *pages, int64_t n_pages, size_t align_bytes
) noexcept nogil
cdef run_t *page_budget_find(
    page_heap_t *pages, run_t *best, arena_t **grown, int64_t n_pages, size_t align_bytes
) noexcept nogil
cdef void page_budget_commit(page_heap_t *pages, const run_t *run, bint *fresh) noexcept nogil
