"""How free pages go back to the kernel.

Purpose
    Purge what has been free for a while; purge all that is free, also where that takes splitting
    huge pages, and say how much the machine got back.
Structure
    arenas, newest first -> pieces -> free runs in a piece -> arena_purge
    a piece at a time under the mutex: who allocates meanwhile waits for one purge at most
Invariants
    in the background, huge pages are given back as a whole or not at all: a part of one lowers the
    RSS and gives the machine nothing
    a huge page is split by MADV_COLD on a page of it that is in use, once its free pages are gone;
    what goes back that way counts only as far as the kernel has counted a split
Locking
    Every function here takes the page heap's mutex, and lets go of it between two pieces; but for
    page_purge_split, whose caller holds it.
Units
    Pages within; bytes in answers; ticks of the purger.
"""

from libc.stdint cimport INT64_MAX, int32_t, int64_t

from pagealloc.core.arena cimport arena_may_split, arena_split, arena_t
from pagealloc.core.arenas cimport (
    IDLE_TICKS,
    arenas_drop,
    arenas_purge_pages,
    is_one_free_run,
    page_heap_t,
)
from pagealloc.core.backing cimport BACKING_HUGETLB
from pagealloc.core.event_ring cimport EVENT_PURGE, EVENT_TRIM
from pagealloc.core.lock_waits cimport lock_shared
from pagealloc.core.mutex cimport mutex_unlock
from pagealloc.core.os_memory cimport MADV_COLD, os_advise
from pagealloc.core.os_pages cimport os_n_huge_pages_split
from pagealloc.core.page_run cimport RUN_FREE, run_t
from pagealloc.core.trace cimport trace_now_ns, trace_purge

cdef enum:
    SPARSE_SHARE = 32       # a huge page with at least one page in so many free is worth a split

cdef struct place_t:        # of a walk that lets go of the mutex
    int64_t serial          # the arena's, or what is left if it is gone
    int64_t piece


cdef arena_t *arena_at(page_heap_t *pages, place_t *place) noexcept nogil:
    """The arena the walk is at, or the next one; NULL at the end."""
    cdef arena_t *arena = pages.arenas
    while arena != NULL and arena.serial > place.serial:
        arena = arena.next
    if arena != NULL and arena.serial < place.serial:
        place.serial = arena.serial
        place.piece = 0
    return arena


cdef inline int64_t piece_end(const arena_t *arena, int64_t piece) noexcept nogil:
    cdef int64_t end = (piece + 1) * arena.piece_pages
    return end if end < arena.n_pages else arena.n_pages


cdef run_t *run_at(const arena_t *arena, int64_t page) noexcept nogil:
    """The run that holds a page."""
    while arena.run_of_page[page] == NULL:
        page -= 1
    return arena.run_of_page[page]


cdef int64_t purge_piece(page_heap_t *pages, arena_t *arena, int64_t piece) noexcept nogil:
    """Give back what is free in a piece; the physical bytes that went back."""
    cdef int64_t first = piece * arena.piece_pages
    cdef int64_t end = piece_end(arena, piece)
    cdef int64_t page = first, run_end, purged_bytes = 0
    cdef run_t *run
    while page < end:
        run = run_at(arena, page)
        run_end = (run.address - arena.address) // <int64_t>arena.page_bytes + run.n_pages
        if run.state == RUN_FREE:
            purged_bytes += arenas_purge_pages(
                pages, arena, page, run_end if run_end < end else end
            )
        page = run_end
    if arena.freed_at[piece]:
        arena.freed_at[piece] = 0
        arena.n_dirty -= 1
        pages.n_dirty -= 1
    return purged_bytes


# ---------------------------------------------------------------------------------------------
# In the background

cdef inline bint is_due(const arena_t *arena, int64_t piece, int32_t tick) noexcept nogil:
    return 0 < arena.freed_at[piece] <= tick - IDLE_TICKS


cdef inline bint is_spent(const arena_t *arena) noexcept nogil:
    """True if an arena is free and purged, as far as it can be."""
    return is_one_free_run(arena) and arena.n_dirty == 0 and (
        arena.n_committed == 0 or arena.achieved_backing == BACKING_HUGETLB
    )


cdef int64_t page_heap_purge_idle(page_heap_t *pages) noexcept nogil:
    """One tick of the purger: give back what was freed IDLE_TICKS ago and is free still.

    An arena that holds nothing any more is unmapped.  Returns the physical bytes that went back.
    """
    cdef int64_t purged_bytes = 0, begun_at_ns = trace_now_ns()
    cdef place_t place
    cdef arena_t *arena
    cdef int32_t tick
    place.serial = INT64_MAX
    place.piece = 0
    lock_shared(&pages.mutex)
    pages.tick += 1
    tick = pages.tick
    while pages.n_dirty:
        arena = arena_at(pages, &place)
        if arena == NULL:
            break
        while place.piece < arena.n_pieces and not is_due(arena, place.piece, tick):
            place.piece += 1
        if place.piece < arena.n_pieces and not arena.dedicated:
            purged_bytes += purge_piece(pages, arena, place.piece)
            place.piece += 1
            if is_spent(arena):
                arenas_drop(pages, arena)
        else:
            place.serial -= 1
            place.piece = 0
        mutex_unlock(&pages.mutex)
        lock_shared(&pages.mutex)
    if purged_bytes:
        trace_purge(
            pages.number, EVENT_PURGE, purged_bytes, begun_at_ns, pages.committed_bytes,
            pages.reserved_bytes
        )
    mutex_unlock(&pages.mutex)
    return purged_bytes


# ---------------------------------------------------------------------------------------------
# All at once

cdef int64_t page_heap_begin_trim(page_heap_t *pages) noexcept nogil:
    """From now on, count also what is unmapped; what it returns is for page_heap_end_trim."""
    cdef int64_t begun_at_bytes
    lock_shared(&pages.mutex)
    pages.n_trims += 1
    begun_at_bytes = pages.purged_bytes
    mutex_unlock(&pages.mutex)
    return begun_at_bytes


cdef void find_sparse(
    const arena_t *arena, int64_t piece, int64_t *n_free, int64_t *live_page
) noexcept nogil:
    """How many pages of a piece are free, and one that is not; -1: none."""
    cdef int64_t page = piece * arena.piece_pages
    cdef int64_t end = piece_end(arena, piece)
    cdef int64_t run_end
    cdef run_t *run
    n_free[0] = 0
    live_page[0] = -1
    while page < end:
        run = run_at(arena, page)
        run_end = (run.address - arena.address) // <int64_t>arena.page_bytes + run.n_pages
        if run.state == RUN_FREE:
            n_free[0] += (run_end if run_end < end else end) - page
        else:
            live_page[0] = page
        page = run_end


cdef int64_t page_purge_split(
    page_heap_t *pages, arena_t *arena, int64_t piece
) noexcept nogil:
    """Split a piece's huge page and give back what is free in it; the physical bytes of that.

    0 if it is no huge page, or none of which enough is free.
    """
    cdef int64_t n_free = 0, live_page = -1, purged_bytes
    if not arena_may_split(arena, piece * arena.piece_pages):
        return 0
    find_sparse(arena, piece, &n_free, &live_page)
    if (
        live_page < 0 or n_free * SPARSE_SHARE < arena.piece_pages
        or not arena_split(arena, piece * arena.piece_pages)
    ):
        return 0
    purged_bytes = purge_piece(pages, arena, piece)
    if purged_bytes:
        os_advise(
            arena.address + live_page * <int64_t>arena.page_bytes, arena.page_bytes, MADV_COLD
        )
    return purged_bytes


cdef int64_t page_heap_end_trim(page_heap_t *pages, int64_t begun_at_bytes) noexcept nogil:
    """Purge all that is free and unmap empty arenas.

    Returns the physical bytes that went back since the trim began, also by what others freed.
    """
    cdef int64_t n_splits_before = os_n_huge_pages_split(), n_seen, unseen_bytes = 0, purged_bytes
    cdef int64_t begun_at_ns = trace_now_ns(), n_splits = 0, split_bytes = 0
    cdef place_t place
    cdef arena_t *arena
    place.serial = INT64_MAX
    place.piece = 0
    lock_shared(&pages.mutex)
    while True:
        arena = arena_at(pages, &place)
        if arena == NULL:
            break
        if place.piece < arena.n_pieces and not arena.dedicated:
            purged_bytes = page_purge_split(pages, arena, place.piece)
            if purged_bytes:
                n_splits += 1
                split_bytes += purged_bytes
            else:
                purge_piece(pages, arena, place.piece)
            place.piece += 1
        else:
            if is_one_free_run(arena):
                arenas_drop(pages, arena)
            place.serial -= 1
            place.piece = 0
        mutex_unlock(&pages.mutex)
        lock_shared(&pages.mutex)
    if n_splits:
        n_seen = os_n_huge_pages_split() - n_splits_before if n_splits_before >= 0 else 0
        if n_seen < n_splits:       # the rest goes back when the machine runs short of memory
            unseen_bytes = split_bytes // n_splits * (n_splits - max(n_seen, <int64_t>0))
    pages.n_trims -= 1
    pages.purged_bytes -= unseen_bytes
    purged_bytes = pages.purged_bytes - begun_at_bytes
    trace_purge(
        pages.number, EVENT_TRIM, purged_bytes, begun_at_ns, pages.committed_bytes,
        pages.reserved_bytes
    )
    mutex_unlock(&pages.mutex)
    return purged_bytes
