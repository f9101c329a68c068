"""What a heap may use: the ledger of its page heap against its budget.

Purpose
    Say whether a run can be used within the budget; give back what lies free to make it so; enter
    what is used.
Invariants
    committed_bytes <= budget_bytes, unless that is negative: no budget
Locking
    The page heap's mutex, held by the caller.
Units
    Pages; bytes where named.
"""

from libc.stdint cimport int64_t

from pagealloc.core.arena cimport arena_commit, arena_missing_pages, arena_t
from pagealloc.core.arenas cimport arenas_purge, page_heap_t
from pagealloc.core.free_runs cimport aligned_start
from pagealloc.core.page_run cimport RUN_FREE, RUN_LIVE, run_t


cdef void page_budget_purge(
    page_heap_t *pages, int64_t enough_bytes, const run_t *spared
) noexcept nogil:
    """Give back what free runs hold until committed_bytes is down to `enough_bytes`.

    `spared` is about to be used.
    """
    cdef int64_t page
    cdef arena_t *arena = pages.arenas
    cdef run_t *run
    while arena != NULL:
        page = 0
        while page < arena.n_pages and pages.committed_bytes > enough_bytes:
            run = arena.run_of_page[page]
            if run.state == RUN_FREE and run != spared:
                arenas_purge(pages, arena, run)
            page = arena.n_pages if arena.dedicated else page + run.n_pages
        arena = arena.next


cdef bint page_budget_allows(
    const page_heap_t *pages, const run_t *run, const char *start, int64_t nbytes
) noexcept nogil:
    cdef const arena_t *arena = <const arena_t *>run.arena
    return pages.budget_bytes < 0 or (
        pages.committed_bytes
        + arena_missing_pages(arena, start, nbytes) * <int64_t>pages.page_bytes
        <= pages.budget_bytes
    )


cdef run_t *page_budget_find(
    page_heap_t *pages, run_t *best, int64_t n_pages, size_t align_bytes
) noexcept nogil:
    """A free run whose use keeps to the budget: the best fit, after purging what is needed.

    The best fit itself is purged last, for its pages are about to be used.  Failing that, any run
    that lies in granules which are committed already, as parts of a huge page do whose other
    parts are in use.  NULL if there is none.
    """
    cdef int64_t nbytes = n_pages * <int64_t>pages.page_bytes
    cdef int64_t missing_bytes = <int64_t>pages.page_bytes * arena_missing_pages(
        <arena_t *>best.arena, aligned_start(best, align_bytes), nbytes
    )
    cdef arena_t *arena = pages.arenas
    cdef run_t *run
    cdef int64_t page
    cdef char *start
    page_budget_purge(pages, pages.budget_bytes - missing_bytes, best)
    if page_budget_allows(pages, best, aligned_start(best, align_bytes), nbytes):
        return best
    page_budget_purge(pages, 0, NULL)
    if page_budget_allows(pages, best, aligned_start(best, align_bytes), nbytes):
        return best
    while arena != NULL:
        page = 0
        while page < arena.n_pages:
            run = arena.run_of_page[page]
            start = aligned_start(run, align_bytes)
            if (
                run.state == RUN_FREE
                and start + nbytes <= run.address + run.n_pages * <int64_t>pages.page_bytes
                and page_budget_allows(pages, run, start, nbytes)
            ):
                return run
            page = arena.n_pages if arena.dedicated else page + run.n_pages
        arena = arena.next
    return NULL


cdef void page_budget_commit(page_heap_t *pages, const run_t *run, bint *fresh) noexcept nogil:
    cdef arena_t *arena = <arena_t *>run.arena
    cdef int64_t n_committed = arena.n_committed
    fresh[0] = arena_commit(arena, run.address, run.n_pages * <int64_t>pages.page_bytes)
    pages.committed_bytes += (arena.n_committed - n_committed) * <int64_t>arena.page_bytes
    pages.used_pages += run.n_pages
    pages.n_runs_out += run.state == RUN_LIVE
