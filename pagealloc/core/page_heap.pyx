"""Page runs of one heap.

Purpose
    Hand out runs of exactly the pages asked for, from the arenas there are or a new one; merge
    what comes back; keep within the budget.
Structure
    page_heap_alloc -> a free run that fits?  -> carve it
                    -> a new arena, within the budget (of its own for a large request)
    page_heap_free  -> merge with free neighbours; a dedicated arena goes back at once
Invariants
    those of arenas and free_runs
    a page's class is that of the run that starts there or the slab that covers it, else 0
    used_pages = sum of pages of runs that are out and of slabs; n_runs_out = number of the former
    committed_bytes <= budget_bytes
Locking
    Every function here takes `mutex` itself, but for those that say "locked".  A caller may hold
    a central list's mutex; nothing else is taken under this one but the page map's.
Units
    Pages within, bytes in the ledger.
"""

from libc.errno cimport ENOMEM
from libc.stdint cimport int32_t, int64_t, uint16_t
from libc.string cimport memset

from pagealloc.core.arena cimport arena_held_bytes, arena_node, arena_t
from pagealloc.core.arenas cimport (
    FIRST_TICK,
    IDLE_TICKS,
    arenas_add,
    arenas_drop,
    arenas_note_free,
    arenas_note_kept,
    mapped_bytes,
    page_heap_t,
)
from pagealloc.core.backing cimport ERROR_BUDGET, ERROR_GROWTH, placement_t, round_up
from pagealloc.core.free_runs cimport (
    aligned_start,
    free_runs_carve,
    free_runs_check_arena,
    free_runs_destroy,
    free_runs_fit,
    free_runs_init,
    free_runs_merge,
)
from pagealloc.core.atomics cimport atomic_store_u16
from pagealloc.core.lock_waits cimport lock_shared
from pagealloc.core.mutex cimport mutex_destroy, mutex_init, mutex_unlock
from pagealloc.core.os_pages cimport os_huge_bytes
from pagealloc.core.page_budget cimport (
    page_budget_allows,
    page_budget_any,
    page_budget_commit,
    page_budget_find,
    page_budget_purge,
)
from pagealloc.core.page_map cimport CHUNK_BYTES, block_t, page_map_arena, page_map_t
from pagealloc.core.page_run cimport RUN_LIVE, RUN_SLAB, run_t, run_tree_check

cdef extern from "poison.h" nogil:
    void poison "pagealloc_poison"(void *address, size_t nbytes)


cdef void page_heap_init(
    page_heap_t *pages, page_map_t *map, void *owner, size_t page_bytes, size_t arena_bytes,
    const placement_t *placement, int64_t budget_bytes
) noexcept nogil:
    memset(pages, 0, sizeof(page_heap_t))
    mutex_init(&pages.mutex)
    free_runs_init(&pages.free, <int64_t>page_bytes)
    pages.map = map
    pages.owner = owner
    pages.page_bytes = page_bytes
    pages.arena_bytes = arena_bytes
    pages.placement = placement[0]
    pages.tick = FIRST_TICK
    pages.budget_bytes = budget_bytes


cdef int page_heap_destroy(page_heap_t *pages) noexcept nogil:
    """Unmap every arena; nothing may be live.  On refusal an errno value; what is left is kept."""
    cdef int error = 0
    lock_shared(&pages.mutex)
    while pages.arenas != NULL and error == 0:
        error = arenas_drop(pages, pages.arenas)
    mutex_unlock(&pages.mutex)
    if error == 0:
        free_runs_destroy(&pages.free)
        mutex_destroy(&pages.mutex)
    return error


# ---------------------------------------------------------------------------------------------
# What others call

cdef void page_heap_set_class(
    page_heap_t *pages, const run_t *run, uint16_t size_class
) noexcept nogil:
    """Enter a run's class at its first page, a slab's at each of its pages."""
    cdef int64_t page_bytes = <int64_t>pages.page_bytes
    cdef int64_t n_pages = run.n_pages if run.state == RUN_SLAB else 1
    cdef int64_t _i
    cdef char *address = run.address
    for _i in range(n_pages):
        atomic_store_u16(&page_heap_entry(pages, address).size_class, size_class)
        address += page_bytes


cdef bint page_heap_has_own_arena(
    const page_heap_t *pages, int64_t n_pages, size_t align_bytes
) noexcept nogil:
    """True for a request that gets an arena made for it."""
    return <size_t>n_pages * pages.page_bytes > pages.arena_bytes // 2 or align_bytes > CHUNK_BYTES


cdef arena_t *grow(
    page_heap_t *pages, size_t nbytes, size_t align_bytes, bint dedicated, int *error
) noexcept nogil:
    """A new arena for a request: of its own, or else a shorter one where a full one is refused."""
    cdef size_t arena_bytes = nbytes if dedicated else pages.arena_bytes
    cdef int error_of_shorter = 0
    cdef arena_t *arena = arenas_add(pages, arena_bytes, align_bytes, dedicated, error)
    if arena != NULL or (error[0] != ENOMEM and error[0] != ERROR_BUDGET):
        return arena
    while arena == NULL and arena_bytes > CHUNK_BYTES and arena_bytes // 2 >= nbytes:
        arena_bytes //= 2
        arena = arenas_add(pages, arena_bytes, align_bytes, dedicated, &error_of_shorter)
    if arena == NULL and error[0] == ERROR_BUDGET:
        page_budget_purge(
            pages,
            pages.budget_bytes - <int64_t>round_up(nbytes, pages.placement.hugetlb_bytes), NULL
        )
        arena = arenas_add(pages, nbytes, align_bytes, dedicated, &error_of_shorter)
    if arena != NULL:
        error[0] = 0
    return arena


cdef run_t *page_heap_alloc(
    page_heap_t *pages, int64_t n_pages, size_t align_bytes, uint16_t size_class, void *slab,
    bint may_grow, bint *fresh, int *error
) noexcept nogil:
    """A run of exactly `n_pages` of `size_class` that starts on `align_bytes`; `slab`'s, if any.

    `fresh` tells that the memory is untouched since the kernel gave it, so zero.  NULL with
    ERROR_BUDGET, ERROR_GROWTH or an errno value in `error` if it cannot be had; nothing has changed
    then.
    """
    cdef size_t nbytes = <size_t>n_pages * pages.page_bytes
    cdef bint dedicated = page_heap_has_own_arena(pages, n_pages, align_bytes)
    cdef run_t *run = NULL
    cdef arena_t *grown = NULL
    cdef char *start
    error[0] = 0
    lock_shared(&pages.mutex)
    if 0 <= pages.budget_bytes < <int64_t>nbytes:
        error[0] = ERROR_BUDGET     # before the kernel is asked for what can never be used
    else:
        if not dedicated:
            run = free_runs_fit(&pages.free, n_pages, align_bytes)
        if run == NULL and not may_grow:
            error[0] = ERROR_GROWTH
        elif run == NULL:
            grown = grow(pages, nbytes, align_bytes, dedicated, error)
            if grown != NULL:
                run = grown.run_of_page[0]
            elif error[0] == ERROR_BUDGET:
                run = page_budget_any(pages, n_pages, align_bytes)
                error[0] = 0 if run != NULL else ERROR_BUDGET
    if run != NULL and not page_budget_allows(
        pages, run, aligned_start(run, align_bytes), <int64_t>nbytes
    ):
        run = page_budget_find(pages, run, &grown, n_pages, align_bytes)
        if run == NULL:
            error[0] = ERROR_BUDGET
    if run != NULL:
        start = aligned_start(run, align_bytes)
        if free_runs_carve(
            &pages.free, run, start, n_pages, RUN_LIVE if slab == NULL else RUN_SLAB, slab
        ):
            page_budget_commit(pages, run, fresh)
            page_heap_set_class(pages, run, size_class)
        else:
            error[0] = ENOMEM
    if error[0] and grown != NULL:
        arenas_drop(pages, grown)
    mutex_unlock(&pages.mutex)
    return run if error[0] == 0 else NULL


cdef int page_heap_grow(page_heap_t *pages, size_t nbytes) noexcept nogil:
    """One more arena, for requests of any size; an errno value or ERROR_* if it cannot be had."""
    cdef int error = 0
    lock_shared(&pages.mutex)
    arenas_add(pages, nbytes, 0, False, &error)
    mutex_unlock(&pages.mutex)
    return error


cdef void page_heap_free(
    page_heap_t *pages, const block_t *blocks, int64_t n, int freed
) noexcept nogil:
    """Take back runs and slabs by where they start, and merge each with its free neighbours.

    `freed` is one of FREED_*.  A dedicated arena goes back to the kernel in any case; refused, it
    stays for the next request.
    """
    cdef int32_t tick
    cdef int64_t i
    cdef arena_t *arena
    cdef run_t *run
    lock_shared(&pages.mutex)
    tick = pages.tick - IDLE_TICKS if freed == FREED_LONG_AGO else pages.tick
    for i in range(n):
        arena = <arena_t *>page_map_arena(pages.map, blocks[i].address, pages.owner)
        run = arena.run_of_page[
            (blocks[i].address - arena.address) // <int64_t>pages.page_bytes
        ]
        poison(run.address, <size_t>run.n_pages * pages.page_bytes)
        page_heap_set_class(pages, run, 0)
        pages.used_pages -= run.n_pages
        pages.n_runs_out -= run.state == RUN_LIVE
        if freed == FREED_TO_STAY and not arena.dedicated:
            arenas_note_kept(pages, run)
        elif not arena.dedicated:
            arenas_note_free(pages, run, tick)
        free_runs_merge(&pages.free, run)
        if arena.dedicated:
            arenas_drop(pages, arena)
    mutex_unlock(&pages.mutex)


cdef size_t page_heap_run_bytes(page_heap_t *pages, const char *address) noexcept nogil:
    """The length of the run that is out and starts at `address`."""
    cdef size_t nbytes
    cdef arena_t *arena
    lock_shared(&pages.mutex)
    arena = <arena_t *>page_map_arena(pages.map, address, pages.owner)
    nbytes = <size_t>arena.run_of_page[
        (address - arena.address) // <int64_t>pages.page_bytes
    ].n_pages * pages.page_bytes
    mutex_unlock(&pages.mutex)
    return nbytes


cdef int64_t page_heap_report(
    page_heap_t *pages, arena_report_t *reports, int64_t n_reports
) noexcept nogil:
    """Fill one report an arena, up to `n_reports`; returns how many arenas there are."""
    cdef int64_t i = 0
    cdef arena_t *arena
    lock_shared(&pages.mutex)
    arena = pages.arenas
    while arena != NULL:
        if i < n_reports:
            reports[i].address = arena.address
            reports[i].reserved_bytes = <int64_t>arena.nbytes
            reports[i].committed_bytes = arena.n_committed * <int64_t>arena.page_bytes
            reports[i].held_bytes = arena_held_bytes(arena)
            reports[i].huge_bytes = os_huge_bytes(arena.address, arena.nbytes)
            reports[i].node = arena_node(arena)
            reports[i].achieved_backing = arena.achieved_backing
            reports[i].dedicated = arena.dedicated
        i += 1
        arena = arena.next
    mutex_unlock(&pages.mutex)
    return i


cdef const char *check_classes(page_heap_t *pages, const arena_t *arena) noexcept nogil:
    """What the page map says of each page, against the run it belongs to."""
    cdef int64_t page, page_bytes = <int64_t>pages.page_bytes
    cdef run_t *run = NULL
    cdef char *address = arena.address
    cdef bint is_start
    for page in range(<int64_t>mapped_bytes(arena) // page_bytes):
        if arena.run_of_page[page] != NULL:
            run = arena.run_of_page[page]
        is_start = run.state == RUN_SLAB or (run.state == RUN_LIVE and run.address == address)
        if (page_heap_entry(pages, address).size_class != 0) != is_start:
            return "a page's class is not that of the run or slab it belongs to"
        address += page_bytes
    return NULL


cdef const char *page_heap_check(page_heap_t *pages) noexcept nogil:
    """NULL, or which invariant is broken."""
    cdef int64_t n_free = 0, n_live = 0, used_pages = 0, reserved_bytes = 0, committed_bytes = 0
    cdef int64_t n_dirty = 0
    cdef const char *broken = NULL
    cdef arena_t *arena
    lock_shared(&pages.mutex)
    arena = pages.arenas
    while arena != NULL and broken == NULL:
        broken = free_runs_check_arena(&pages.free, arena, &n_free, &n_live, &used_pages)
        if broken == NULL and (
            page_map_arena(pages.map, arena.address, pages.owner) != arena
            or page_map_arena(
                pages.map, arena.address + mapped_bytes(arena) - 1, pages.owner
            ) != arena
        ):
            broken = "the page map does not lead to an arena"
        if broken == NULL:
            broken = check_classes(pages, arena)
        reserved_bytes += <int64_t>arena.nbytes
        n_dirty += arena.n_dirty
        committed_bytes += arena.n_committed * <int64_t>arena.page_bytes
        arena = arena.next
    if broken == NULL:
        if run_tree_check(pages.free.tree, NULL, NULL) != n_free or n_free != pages.free.n_runs:
            broken = "the tree does not hold exactly the free runs"
        elif used_pages != pages.used_pages:
            broken = "used_pages is not the sum of live runs and slabs"
        elif n_live != pages.n_runs_out:
            broken = "n_runs_out is not the number of runs in use"
        elif reserved_bytes != pages.reserved_bytes:
            broken = "reserved_bytes is not the sum of the arenas"
        elif committed_bytes != pages.committed_bytes:
            broken = "committed_bytes is not the sum of the committed granules"
        elif n_dirty != pages.n_dirty:
            broken = "n_dirty is not the sum of the arenas"
        elif 0 <= pages.budget_bytes < committed_bytes:
            broken = "committed_bytes is above the budget"
    mutex_unlock(&pages.mutex)
    return broken
