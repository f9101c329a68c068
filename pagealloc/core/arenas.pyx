"""The arenas of one heap.

Purpose
    Reserve arenas and enter them into the page map and among the free runs, forget them when they
    are unmapped, and give back what a free run holds.
Invariants
    each arena is in the page map from its first to its last chunk (a dedicated one with its first)
    reserved_bytes = sum(arena.nbytes); committed_bytes = sum(n_committed * page_bytes);
    n_dirty = sum(arena.n_dirty)
    serials fall along the list: a walk that let go of the mutex finds its place again
Locking
    The page heap's mutex, held by the caller; the page map's is taken under it.
Units
    Bytes; pages where named.
"""

from libc.stdint cimport int32_t, int64_t

from pagealloc.core.arena cimport (
    arena_abandon,
    arena_delete,
    arena_forget,
    arena_held_bytes,
    arena_new,
    arena_note_free,
    arena_note_kept,
    arena_purge,
    arena_t,
)
from pagealloc.core.backing cimport (
    BACKING_BASE,
    BACKING_HUGETLB,
    ERROR_BUDGET,
    placement_t,
    round_up,
)
from pagealloc.core.free_runs cimport (
    free_runs_add_arena,
    free_runs_merge,
    free_runs_remove_arena,
)
from pagealloc.core.page_map cimport (
    chunk_t,
    page_map_add,
    page_map_attach,
    page_map_detach,
    page_map_recycle,
)
from pagealloc.core.os_memory cimport os_abandon, os_reserve
from pagealloc.core.os_pages cimport os_copy, os_guard, os_move_onto
from pagealloc.core.page_run cimport RUN_FREE, run_t
from pagealloc.core.trace cimport trace_arena, trace_now_ns

cdef extern from "poison.h" nogil:
    void poison "pagealloc_poison"(void *address, size_t nbytes)
    void unpoison "pagealloc_unpoison"(void *address, size_t nbytes)


cdef arena_t *arenas_add(
    page_heap_t *pages, size_t nbytes, size_t align_bytes, bint dedicated, int *error
) noexcept nogil:
    """Reserve an arena and enter it as one free run (of `nbytes` exactly if it is dedicated)."""
    cdef arena_t *arena
    cdef placement_t placement = pages.placement
    cdef int64_t begun_at_ns = trace_now_ns()
    if (
        placement.ladder & BACKING_HUGETLB and 0 <= pages.budget_bytes
        < pages.committed_bytes + <int64_t>round_up(nbytes, placement.hugetlb_bytes)
    ):
        placement.ladder &= ~BACKING_HUGETLB    # which commits all of an arena when it is made
        if placement.ladder == 0:
            error[0] = ERROR_BUDGET
            return NULL
    arena = arena_new(&placement, nbytes, align_bytes, error)
    if arena == NULL:
        return NULL
    arena.dedicated = dedicated
    error[0] = page_map_add(
        pages.map, arena.address, mapped_bytes(arena), pages.owner, arena
    )
    if error[0] == 0:
        error[0] = free_runs_add_arena(
            &pages.free, arena,
            <int64_t>(nbytes // pages.page_bytes) if dedicated else arena.n_pages
        )
        if error[0]:
            page_map_recycle(
                pages.map, page_map_detach(pages.map, arena.address, mapped_bytes(arena))
            )
    if error[0]:
        arena_abandon(arena)
        return NULL
    pages.last_serial += 1
    arena.serial = pages.last_serial
    arena.next = pages.arenas
    if arena.next != NULL:
        arena.next.previous = arena
    pages.arenas = arena
    pages.reserved_bytes += <int64_t>arena.nbytes
    pages.committed_bytes += arena.n_committed * <int64_t>arena.page_bytes
    poison(arena.address, arena.nbytes)
    trace_arena(
        pages.number, <int64_t>arena.nbytes, arena.achieved_backing, begun_at_ns,
        pages.reserved_bytes
    )
    return arena


cdef bint keep_arena(page_heap_t *pages, arena_t *arena, chunk_t *chunks) noexcept nogil:
    """Enter an arena again that the kernel refused to unmap; False if there is no memory to.

    It is entered as a whole, also if it was made for one request.
    """
    cdef size_t nbytes = mapped_bytes(arena)
    if nbytes < arena.nbytes and page_map_add(
        pages.map, arena.address + nbytes, arena.nbytes - nbytes, pages.owner, arena
    ) != 0:
        return False
    page_map_attach(pages.map, arena.address, chunks, pages.owner, arena)
    arena.dedicated = False
    free_runs_add_arena(&pages.free, arena, arena.n_pages)  # with the descriptor just given up
    arenas_note_free(pages, arena.run_of_page[0], pages.tick)
    poison(arena.address, arena.nbytes)
    return True


cdef void unlink(page_heap_t *pages, arena_t *arena, int64_t held_bytes) noexcept nogil:
    """Forget an arena whose memory is gone, but for its struct and tables."""
    if arena.next != NULL:
        arena.next.previous = arena.previous
    if arena.previous != NULL:
        arena.previous.next = arena.next
    else:
        pages.arenas = arena.next
    pages.reserved_bytes -= <int64_t>arena.nbytes
    pages.n_dirty -= arena.n_dirty
    pages.purged_bytes += held_bytes
    pages.committed_bytes -= arena.n_committed * <int64_t>arena.page_bytes


cdef int arenas_drop(page_heap_t *pages, arena_t *arena) noexcept nogil:
    """Unmap an arena that is one free run.

    If the kernel refuses, its errno value is returned and the arena stays, as an ordinary one
    whose pages serve the next request.
    """
    cdef arena_t gone = arena[0]
    cdef int64_t held_bytes = arena_held_bytes(arena) if pages.n_trims else 0
    cdef chunk_t *chunks
    cdef int error
    # Out of the map first: once unmapped, the addresses may become another heap's at any moment.
    chunks = page_map_detach(pages.map, gone.address, mapped_bytes(arena))
    free_runs_remove_arena(&pages.free, arena)
    unpoison(gone.address, gone.nbytes)
    error = arena_delete(arena)
    if error and keep_arena(pages, arena, chunks):
        return error
    if error:
        arena_abandon(arena)
    page_map_recycle(pages.map, chunks)
    unlink(pages, &gone, held_bytes if held_bytes > 0 else 0)
    return 0


cdef int arenas_replace(page_heap_t *pages, arena_t *old, arena_t *new) noexcept nogil:
    """Move a dedicated arena's memory to where a new one is, and forget the old one.

    Both are one run that is live.  An errno value, and nothing changed, if the kernel refuses.
    """
    # Out of the map first, as in arenas_drop.
    cdef chunk_t *chunks = page_map_detach(pages.map, old.address, mapped_bytes(old))
    cdef int error = os_move_onto(old.address, old.nbytes, new.address, new.nbytes)
    if error:
        page_map_attach(pages.map, old.address, chunks, pages.owner, old)
        return error
    page_map_recycle(pages.map, chunks)
    free_runs_merge(&pages.free, old.run_of_page[0])
    free_runs_remove_arena(&pages.free, old)
    unpoison(old.address, old.nbytes)
    unlink(pages, old, 0)
    arena_forget(old)
    return 0


cdef int64_t arenas_purge(page_heap_t *pages, arena_t *arena, run_t *run) noexcept nogil:
    """Give back what a free run holds, as far as that helps; the physical bytes that went back."""
    cdef int64_t first = (run.address - arena.address) // <int64_t>arena.page_bytes
    return arenas_purge_pages(pages, arena, first, first + run.n_pages)


cdef int64_t arenas_purge_pages(
    page_heap_t *pages, arena_t *arena, int64_t first, int64_t end
) noexcept nogil:
    """The same for pages of a free run."""
    cdef int64_t n_committed = arena.n_committed
    cdef int64_t purged_bytes = arena_purge(arena, first, end)
    pages.committed_bytes -= (n_committed - arena.n_committed) * <int64_t>arena.page_bytes
    pages.purged_bytes += purged_bytes
    return purged_bytes


cdef void arenas_note_free(page_heap_t *pages, const run_t *run, int32_t tick) noexcept nogil:
    """Note when a run was freed, which is not dedicated."""
    cdef arena_t *arena = <arena_t *>run.arena
    cdef int64_t n_dirty = arena.n_dirty
    arena_note_free(arena, run.address, run.n_pages * <int64_t>pages.page_bytes, tick)
    pages.n_dirty += arena.n_dirty - n_dirty


cdef void arenas_note_kept(page_heap_t *pages, const run_t *run) noexcept nogil:
    """Note that a run is kept, though it is free; it is not dedicated."""
    cdef arena_t *arena = <arena_t *>run.arena
    cdef int64_t n_dirty = arena.n_dirty
    arena_note_kept(arena, run.address, run.n_pages * <int64_t>pages.page_bytes)
    pages.n_dirty += arena.n_dirty - n_dirty


# ---------------------------------------------------------------------------------------------
# In a forked child

cdef void copy_runs(const arena_t *arena, char *copy) noexcept nogil:
    """Copy what is in use; what cannot be read is not to be accessed any more."""
    cdef int64_t page = 0, end = 1 if arena.dedicated else arena.n_pages
    cdef size_t nbytes, n_copied
    cdef run_t *run
    while page < end:
        run = arena.run_of_page[page]
        if run.state != RUN_FREE:
            nbytes = <size_t>run.n_pages * arena.page_bytes
            n_copied = os_copy(copy + (run.address - arena.address), run.address, nbytes)
            n_copied -= n_copied % arena.page_bytes
            if n_copied < nbytes:
                os_guard(copy + (run.address - arena.address) + n_copied, nbytes - n_copied)
        page += run.n_pages


cdef void arenas_leave_hugetlb(page_heap_t *pages) noexcept nogil:
    """Put base pages in the place of hugetlb pages.

    The child has no reservation in the pool: its first write into a page it shares, or a write of
    the parent's, could find the pool empty, and that is SIGBUS for the child.  Refused memory for
    the copy, it stays as it is.
    """
    cdef arena_t *arena = pages.arenas
    cdef char *copy
    while arena != NULL:
        copy = NULL
        if arena.achieved_backing == BACKING_HUGETLB:
            copy = <char *>os_reserve(arena.nbytes, arena.page_bytes)
        if copy != NULL:
            if not pages.placement.is_wiped_on_fork:
                copy_runs(arena, copy)
            if os_move_onto(copy, arena.nbytes, arena.address, arena.nbytes) == 0:
                arena.achieved_backing = BACKING_BASE
                arena.granule_pages = 1
            else:
                os_abandon(copy, arena.nbytes)
        arena = arena.next
