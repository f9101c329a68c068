"""What a heap may use: the ledger of its page heap against its budget.

Purpose
    Say whether a run can be used within the budget; give back what lies free to make it so; enter
    what is used.
Structure
    over the budget -> purge other free runs -> purge this one -> a free run in granules that are
    committed already -> split huge pages that are partly free, as trim() does -> refused
Invariants
    committed_bytes <= budget_bytes, unless that is negative: no budget
Locking
    The page heap's mutex, held by the caller.
Units
    Pages; bytes where named.
"""

from libc.stdint cimport int64_t

from pagealloc.core.arena cimport arena_commit, arena_missing_pages, arena_t
from pagealloc.core.arenas cimport (
    arenas_drop,
    arenas_purge,
    is_one_free_run,
    page_heap_t,
)
from pagealloc.core.backing cimport BACKING_HUGETLB
from pagealloc.core.free_runs cimport aligned_start
from pagealloc.core.page_purge cimport page_purge_split
from pagealloc.core.page_run cimport RUN_FREE, RUN_LIVE, run_t


cdef void page_budget_purge(
    page_heap_t *pages, int64_t enough_bytes, const run_t *spared
) noexcept nogil:
    """Give back what free runs hold until committed_bytes is down to `enough_bytes`.

    `spared` is about to be used.  Hugetlb memory goes back by the arena only.
    """
    cdef int64_t page
    cdef arena_t *next_arena
    cdef arena_t *arena = pages.arenas
    cdef run_t *run
    while arena != NULL and pages.committed_bytes > enough_bytes:
        next_arena = arena.next
        page = 0
        while page < arena.n_pages and pages.committed_bytes > enough_bytes:
            run = arena.run_of_page[page]
            if run.state == RUN_FREE and run != spared:
                arenas_purge(pages, arena, run)
            page = arena.n_pages if arena.dedicated else page + run.n_pages
        if (
            arena.achieved_backing == BACKING_HUGETLB and is_one_free_run(arena)
            and arena.run_of_page[0] != spared
        ):
            arenas_drop(pages, arena)
        arena = next_arena


cdef bint page_budget_allows(
    const page_heap_t *pages, const run_t *run, const char *start, int64_t nbytes
) noexcept nogil:
    cdef const arena_t *arena = <const arena_t *>run.arena
    return pages.budget_bytes < 0 or (
        pages.committed_bytes
        + arena_missing_pages(arena, start, nbytes) * <int64_t>pages.page_bytes
        <= pages.budget_bytes
    )


cdef bint allows(
    const page_heap_t *pages, const run_t *run, int64_t n_pages, size_t align_bytes
) noexcept nogil:
    return page_budget_allows(
        pages, run, aligned_start(run, align_bytes), n_pages * <int64_t>pages.page_bytes
    )


cdef run_t *page_budget_any(
    page_heap_t *pages, int64_t n_pages, size_t align_bytes
) noexcept nogil:
    """Any free run whose use keeps to the budget as it is; NULL if there is none.

    It may lie in granules that are committed already, as parts of a huge page do whose other parts
    are in use.
    """
    cdef int64_t page, nbytes = n_pages * <int64_t>pages.page_bytes
    cdef arena_t *arena = pages.arenas
    cdef run_t *run
    while arena != NULL:
        page = 0
        while page < arena.n_pages and not arena.dedicated:
            run = arena.run_of_page[page]
            if (
                run.state == RUN_FREE
                and aligned_start(run, align_bytes) + nbytes
                <= run.address + run.n_pages * <int64_t>pages.page_bytes
                and allows(pages, run, n_pages, align_bytes)
            ):
                return run
            page += run.n_pages
        arena = arena.next
    return NULL


cdef void split_sparse(
    page_heap_t *pages, const run_t *best, int64_t n_pages, size_t align_bytes
) noexcept nogil:
    """Split huge pages that are partly free, until the budget allows for `best`."""
    cdef int64_t piece
    cdef arena_t *arena = pages.arenas
    if (pages.used_pages + n_pages) * <int64_t>pages.page_bytes > pages.budget_bytes:
        return      # in vain
    while arena != NULL:
        for piece in range(0 if arena.dedicated else arena.n_pieces):
            if page_purge_split(pages, arena, piece) and allows(pages, best, n_pages, align_bytes):
                return
        arena = arena.next


cdef run_t *page_budget_find(
    page_heap_t *pages, run_t *best, arena_t **grown, int64_t n_pages, size_t align_bytes
) noexcept nogil:
    """A free run whose use keeps to the budget: the best fit, after giving back what is needed.

    The best fit itself is purged last, for its pages are about to be used.  If it is that of an
    arena grown for it, and does not serve, that arena is dropped, and `grown` is NULL after that.
    NULL if the budget is spent.
    """
    cdef run_t *run = best
    page_budget_purge(
        pages,
        pages.budget_bytes - <int64_t>pages.page_bytes * arena_missing_pages(
            <arena_t *>best.arena, aligned_start(best, align_bytes),
            n_pages * <int64_t>pages.page_bytes
        ),
        best
    )
    if not allows(pages, best, n_pages, align_bytes):
        arenas_purge(pages, <arena_t *>best.arena, best)
        if not allows(pages, best, n_pages, align_bytes):
            run = page_budget_any(pages, n_pages, align_bytes)
    if run == NULL:
        split_sparse(pages, best, n_pages, align_bytes)
        run = best if allows(pages, best, n_pages, align_bytes) else page_budget_any(
            pages, n_pages, align_bytes
        )
    if grown[0] != NULL and (run == NULL or run.arena != grown[0]):
        arenas_drop(pages, grown[0])
        grown[0] = NULL
    return run


cdef void page_budget_commit(page_heap_t *pages, const run_t *run, bint *fresh) noexcept nogil:
    cdef arena_t *arena = <arena_t *>run.arena
    cdef int64_t n_committed = arena.n_committed
    fresh[0] = arena_commit(arena, run.address, run.n_pages * <int64_t>pages.page_bytes)
    pages.committed_bytes += (arena.n_committed - n_committed) * <int64_t>arena.page_bytes
    pages.used_pages += run.n_pages
    pages.n_runs_out += run.state == RUN_LIVE
