"""Free page runs: fit, carve, merge.

Purpose
    Keep the runs of every arena in order: which pages belong to which run, and which runs are free.
Structure
    arena:  | live 3 | free 5 | slab 16 | free 488 | ...     runs tile the arena
                         \\                   /
                          tree: best fit over all arenas
Invariants
    the runs of an arena tile it (a dedicated arena has one run, and pages after it that are
    never touched); no two free runs are neighbours
    run_of_page[first] = run_of_page[last] = run, all of them for a slab, NULL inside others
    a run is in the tree iff its state is RUN_FREE; n_runs = number of runs in the tree
Locking
    The page heap's mutex.
Units
    Pages; addresses.
"""

from libc.errno cimport ENOMEM
from libc.stdint cimport int64_t, uint8_t, uintptr_t

from pagealloc.core.arena cimport arena_check, arena_t
from pagealloc.core.page_run cimport (
    RUN_FREE,
    RUN_LIVE,
    RUN_SLAB,
    run_delete,
    run_new,
    run_pool_destroy,
    run_pool_init,
    run_t,
    run_tree_best,
    run_tree_insert,
    run_tree_remove,
)


cdef void free_runs_init(free_runs_t *free, int64_t page_bytes) noexcept nogil:
    run_pool_init(&free.pool)
    free.tree = NULL
    free.n_runs = 0
    free.page_bytes = page_bytes


cdef void free_runs_destroy(free_runs_t *free) noexcept nogil:
    run_pool_destroy(&free.pool)


# ---------------------------------------------------------------------------------------------
# Which page belongs to which run

cdef inline int64_t page_of(const free_runs_t *free, const run_t *run) noexcept nogil:
    """The run's first page, counted from its arena's start."""
    return (run.address - (<arena_t *>run.arena).address) // free.page_bytes


cdef void mark(const free_runs_t *free, run_t *run, run_t *value) noexcept nogil:
    """Set the run's entries of run_of_page: every page of a slab, else the first and the last."""
    cdef run_t **run_of_page = (<arena_t *>run.arena).run_of_page
    cdef int64_t first = page_of(free, run)
    cdef int64_t i
    run_of_page[first] = value
    run_of_page[first + run.n_pages - 1] = value
    if run.state == RUN_SLAB:
        for i in range(first + 1, first + run.n_pages - 1):
            run_of_page[i] = value


cdef void enter(free_runs_t *free, run_t *run) noexcept nogil:
    run.state = RUN_FREE
    mark(free, run, run)
    run_tree_insert(&free.tree, run)
    free.n_runs += 1


cdef void leave(free_runs_t *free, run_t *run) noexcept nogil:
    run_tree_remove(&free.tree, run)
    free.n_runs -= 1
    mark(free, run, NULL)


cdef int free_runs_add_arena(free_runs_t *free, arena_t *arena, int64_t n_pages) noexcept nogil:
    """Enter the first `n_pages` of a new arena as one free run; ENOMEM without a descriptor."""
    cdef run_t *run = run_new(&free.pool)
    if run == NULL:
        return ENOMEM
    run.arena = arena
    run.address = arena.address
    run.n_pages = n_pages
    enter(free, run)
    return 0


cdef void free_runs_remove_arena(free_runs_t *free, arena_t *arena) noexcept nogil:
    """Forget an arena that is one free run."""
    cdef run_t *run = arena.run_of_page[0]
    leave(free, run)
    run_delete(&free.pool, run)


# ---------------------------------------------------------------------------------------------
# Fit, carve, merge

cdef char *aligned_start(const run_t *run, size_t align_bytes) noexcept nogil:
    return <char *>((<uintptr_t>run.address + align_bytes - 1) & ~<uintptr_t>(align_bytes - 1))


cdef run_t *free_runs_fit(
    free_runs_t *free, int64_t n_pages, size_t align_bytes
) noexcept nogil:
    """The best free run that holds `n_pages` from an aligned start on; NULL if none does."""
    cdef run_t *run = run_tree_best(free.tree, n_pages)
    if run == NULL or align_bytes <= <size_t>free.page_bytes:
        return run
    if aligned_start(run, align_bytes) + n_pages * free.page_bytes <= (
        run.address + run.n_pages * free.page_bytes
    ):
        return run
    # A run this much longer holds an aligned start wherever it begins.
    return run_tree_best(free.tree, n_pages + <int64_t>align_bytes // free.page_bytes - 1)


cdef bint free_runs_carve(
    free_runs_t *free, run_t *run, char *start, int64_t n_pages, uint8_t state, void *slab
) noexcept nogil:
    """Make `run` the `n_pages` at `start`, in `state`; what is left on both sides stays free.

    False, and nothing changed, if there is no descriptor to be had for what is left.
    """
    cdef int64_t n_head = (start - run.address) // free.page_bytes
    cdef int64_t n_tail = run.n_pages - n_head - n_pages
    cdef run_t *head = run_new(&free.pool) if n_head else NULL
    cdef run_t *tail = run_new(&free.pool) if n_tail else NULL
    if (n_head and head == NULL) or (n_tail and tail == NULL):
        if head != NULL:
            run_delete(&free.pool, head)
        if tail != NULL:
            run_delete(&free.pool, tail)
        return False
    leave(free, run)
    if n_head:
        head.arena = run.arena
        head.address = run.address
        head.n_pages = n_head
        enter(free, head)
    if n_tail:
        tail.arena = run.arena
        tail.address = start + n_pages * free.page_bytes
        tail.n_pages = n_tail
        enter(free, tail)
    run.address = start
    run.n_pages = n_pages
    run.slab = slab
    run.state = state
    mark(free, run, run)
    return True


cdef void absorb(free_runs_t *free, run_t *run, run_t *neighbour) noexcept nogil:
    """Add a free neighbour's pages to a run that is in no place at the moment."""
    if neighbour == NULL or neighbour.state != RUN_FREE:
        return
    leave(free, neighbour)
    run.n_pages += neighbour.n_pages
    if neighbour.address < run.address:
        run.address = neighbour.address
    run_delete(&free.pool, neighbour)


cdef void free_runs_merge(free_runs_t *free, run_t *run) noexcept nogil:
    """Enter a run that was live or a slab, together with its free neighbours."""
    cdef arena_t *arena = <arena_t *>run.arena
    cdef int64_t first = page_of(free, run)
    cdef int64_t end = first + run.n_pages
    mark(free, run, NULL)
    run.slab = NULL
    run.state = RUN_FREE
    # The pages after a dedicated arena's run are nobody's: NULL, hence no neighbour.
    absorb(free, run, arena.run_of_page[end] if end < arena.n_pages else NULL)
    absorb(free, run, arena.run_of_page[first - 1] if first > 0 else NULL)
    enter(free, run)


cdef bint free_runs_cut(free_runs_t *free, run_t *run, int64_t n_pages) noexcept nogil:
    """Leave a live run its first `n_pages`, and free the others; False if that is refused."""
    cdef run_t *tail = run_new(&free.pool)
    if tail == NULL:
        return False
    mark(free, run, NULL)
    tail.arena = run.arena
    tail.address = run.address + n_pages * free.page_bytes
    tail.n_pages = run.n_pages - n_pages
    run.n_pages = n_pages
    mark(free, run, run)
    free_runs_merge(free, tail)
    return True


cdef void free_runs_join(free_runs_t *free, run_t *run, run_t *tail) noexcept nogil:
    """Make one live run of two that are neighbours."""
    mark(free, run, NULL)
    mark(free, tail, NULL)
    run.n_pages += tail.n_pages
    run_delete(&free.pool, tail)
    mark(free, run, run)


cdef const char *free_runs_check_arena(
    const free_runs_t *free, arena_t *arena, int64_t *n_free, int64_t *n_live, int64_t *used_pages
) noexcept nogil:
    cdef int64_t page = 0, i
    cdef bint previous_free = False
    cdef run_t *run
    if not arena_check(arena):
        return "an arena's count of committed granules is not its number of set bits"
    while page < arena.n_pages:
        run = arena.run_of_page[page]
        if run == NULL or run.arena != arena or page_of(free, run) != page or run.n_pages < 1:
            return "the runs of an arena do not tile it"
        if run.state == RUN_FREE:
            if previous_free:
                return "two neighbouring free runs are not merged"
            n_free[0] += 1
        elif run.state == RUN_LIVE or run.state == RUN_SLAB:
            used_pages[0] += run.n_pages
            n_live[0] += run.state == RUN_LIVE
        else:
            return "a run of an arena is in no state"
        if arena.run_of_page[page + run.n_pages - 1] != run:
            return "a run's last page does not lead to it"
        for i in range(page + 1, page + run.n_pages - 1):
            if arena.run_of_page[i] != (run if run.state == RUN_SLAB else NULL):
                return "a page inside a run leads elsewhere"
        if arena.dedicated:
            for i in range(page + run.n_pages, arena.n_pages):
                if arena.run_of_page[i] != NULL:
                    return "a page after a dedicated arena's run is somebody's"
            break
        previous_free = run.state == RUN_FREE
        page += run.n_pages
    return NULL
