"""Page runs made longer or shorter, without a copy of what is in them.

Purpose
    Cut a run, or give it the free pages behind it; move a run that has an arena of its own into a
    longer or shorter one by its page tables.
Structure
    page_heap_resize:  | run 3 | free 5 | ...  ->  | run 6    | free 2 | ...
    page_heap_move:    mremap(arena) -> new arena; the old one is forgotten
Invariants
    those of page_heap; committed_bytes is never above the budget, in the middle of a move neither
    a dedicated arena is one mapping of the kernel's, also after it was moved: so it is moved whole
Locking
    Every function here takes the page heap's mutex.
Units
    Pages.
"""

from libc.stdint cimport int64_t, uint16_t

from pagealloc.core.arena cimport arena_missing_pages, arena_t
from pagealloc.core.arenas cimport (
    arenas_add,
    arenas_drop,
    arenas_note_free,
    arenas_replace,
    page_heap_t,
)
from pagealloc.core.atomics cimport atomic_store_u16
from pagealloc.core.backing cimport BACKING_HUGETLB
from pagealloc.core.free_runs cimport (
    free_runs_carve,
    free_runs_cut,
    free_runs_join,
    free_runs_merge,
)
from pagealloc.core.lock_waits cimport lock_shared
from pagealloc.core.mutex cimport mutex_unlock
from pagealloc.core.page_budget cimport (
    page_budget_allows,
    page_budget_commit,
    page_budget_purge,
)
from pagealloc.core.page_heap cimport (
    page_heap_entry,
    page_heap_has_own_arena,
    page_heap_set_class,
)
from pagealloc.core.page_map cimport page_map_arena, page_t
from pagealloc.core.page_run cimport RUN_FREE, RUN_LIVE, run_t

cdef extern from "poison.h" nogil:
    void poison "pagealloc_poison"(void *address, size_t nbytes)


cdef bint page_heap_resize(
    page_heap_t *pages, const char *address, int64_t n_pages, uint16_t size_class
) noexcept nogil:
    """Make a run `n_pages` long, and of `size_class`, where it is.

    False, and nothing changed, if what follows is not free, or the budget or an arena of its own
    is in the way.
    """
    cdef arena_t *arena
    cdef run_t *run
    cdef bint done = False
    lock_shared(&pages.mutex)
    arena = <arena_t *>page_map_arena(pages.map, address, pages.owner)
    run = arena.run_of_page[(address - arena.address) // <int64_t>pages.page_bytes]
    if not arena.dedicated and not page_heap_has_own_arena(pages, n_pages, pages.page_bytes):
        if n_pages < run.n_pages:
            done = shrink(pages, run, n_pages)
        else:
            done = grow(pages, arena, run, n_pages - run.n_pages)
        if done:
            page_heap_set_class(pages, run, size_class)
    mutex_unlock(&pages.mutex)
    return done


cdef bint shrink(page_heap_t *pages, run_t *run, int64_t n_pages) noexcept nogil:
    cdef int64_t page_bytes = <int64_t>pages.page_bytes
    cdef run_t freed = run[0]
    freed.address += n_pages * page_bytes
    freed.n_pages -= n_pages
    if not free_runs_cut(&pages.free, run, n_pages):
        return False
    poison(freed.address, <size_t>(freed.n_pages * page_bytes))
    arenas_note_free(pages, &freed, pages.tick)
    pages.used_pages -= freed.n_pages
    return True


cdef bint grow(page_heap_t *pages, arena_t *arena, run_t *run, int64_t n_more) noexcept nogil:
    cdef int64_t more_bytes = n_more * <int64_t>pages.page_bytes
    cdef int64_t end = (run.address - arena.address) // <int64_t>pages.page_bytes + run.n_pages
    cdef run_t *tail
    cdef bint _fresh
    if end == arena.n_pages:
        return False
    tail = arena.run_of_page[end]
    if tail.state != RUN_FREE or tail.n_pages < n_more:
        return False
    if not page_budget_allows(pages, tail, tail.address, more_bytes):
        page_budget_purge(pages, pages.budget_bytes - more_bytes, tail)
        if not page_budget_allows(pages, tail, tail.address, more_bytes):
            return False
    if not free_runs_carve(&pages.free, tail, tail.address, n_more, RUN_LIVE, NULL):
        return False
    page_budget_commit(pages, tail, &_fresh)
    pages.n_runs_out -= 1
    free_runs_join(&pages.free, run, tail)
    return True


cdef char *page_heap_move(
    page_heap_t *pages, const char *address, int64_t n_pages, size_t align_bytes,
    uint16_t size_class
) noexcept nogil:
    """Move a run that has an arena of its own into one of another length: where it is now.

    Its state in the page map goes along.  NULL, and nothing changed, where that cannot be.
    """
    cdef int64_t page_bytes = <int64_t>pages.page_bytes
    cdef int64_t old_bytes
    cdef arena_t *old
    cdef arena_t *new = NULL
    cdef char *moved = NULL
    cdef int _error = 0
    lock_shared(&pages.mutex)
    old = <arena_t *>page_map_arena(pages.map, address, pages.owner)
    if (
        old.dedicated and page_heap_has_own_arena(pages, n_pages, align_bytes)
        and old.achieved_backing != BACKING_HUGETLB and not old.collapses
    ):
        old_bytes = old.n_committed * page_bytes
        if 0 <= pages.budget_bytes < pages.committed_bytes - old_bytes + n_pages * page_bytes:
            page_budget_purge(pages, pages.budget_bytes - n_pages * page_bytes + old_bytes, NULL)
        new = arenas_add(
            pages, <size_t>(n_pages * page_bytes), align_bytes, True, &_error
        )
    if new != NULL:
        moved = move_into(pages, old, new, size_class)
        if moved == NULL:
            arenas_drop(pages, new)
    mutex_unlock(&pages.mutex)
    return moved


cdef char *move_into(
    page_heap_t *pages, arena_t *old, arena_t *new, uint16_t size_class
) noexcept nogil:
    cdef run_t *run = old.run_of_page[0]
    cdef run_t *moved = new.run_of_page[0]
    cdef page_t *entry = page_heap_entry(pages, run.address)
    cdef page_t saved = entry[0]
    cdef int64_t n_pages = run.n_pages
    cdef bint _fresh
    if (
        new.achieved_backing != old.achieved_backing or new.collapses
        or 0 <= pages.budget_bytes < pages.committed_bytes + <int64_t>pages.page_bytes * (
            arena_missing_pages(
                new, moved.address, moved.n_pages * <int64_t>pages.page_bytes
            ) - old.n_committed
        )
    ):
        return NULL
    # All of the new arena's run: that takes no descriptor, and is not refused.
    free_runs_carve(&pages.free, moved, moved.address, moved.n_pages, RUN_LIVE, NULL)
    atomic_store_u16(&entry.size_class, 0)
    atomic_store_u16(&entry.state, 0)
    if arenas_replace(pages, old, new) != 0:
        atomic_store_u16(&entry.state, saved.state)
        atomic_store_u16(&entry.size_class, saved.size_class)
        free_runs_merge(&pages.free, moved)
        return NULL
    pages.used_pages -= n_pages
    pages.n_runs_out -= 1
    page_budget_commit(pages, moved, &_fresh)
    page_heap_set_class(pages, moved, size_class)
    atomic_store_u16(&page_heap_entry(pages, moved.address).state, saved.state)
    return moved.address
