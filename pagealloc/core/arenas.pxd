"""The arenas of one heap: how they come, go, and give back what lies free in them."""

from libc.stdint cimport int32_t, int64_t

from pagealloc.core.arena cimport arena_t
from pagealloc.core.backing cimport placement_t
from pagealloc.core.free_runs cimport free_runs_t
from pagealloc.core.mutex cimport mutex_t
from pagealloc.core.page_map cimport CHUNK_BYTES, page_map_t
from pagealloc.core.page_run cimport RUN_FREE, run_t

cdef enum:
    IDLE_TICKS = 2              # what was freed so many ticks ago is idle,
    FIRST_TICK = 3              # ... and can be, from the first tick on

cdef struct page_heap_t:
    mutex_t mutex
    page_map_t *map             # the process's; this heap's arenas are entered into it
    int64_t number              # of the heap, in traces
    void *owner                 # what the map's arenas lead to: the heap_t
    size_t arena_bytes
    size_t page_bytes
    placement_t placement       # how its arenas are had
    int64_t budget_bytes        # -1: none
    # All below: guarded by `mutex`.
    free_runs_t free
    arena_t *arenas             # the newest first
    int64_t last_serial
    int32_t tick                # passes of the purger so far, from FIRST_TICK on
    int32_t n_trims             # trims under way: they count what is unmapped meanwhile
    int64_t n_dirty             # pieces of arenas into which memory was freed since their purge
    int64_t purged_bytes        # that went back to the kernel since the start, as far as counted
    int64_t reserved_bytes
    int64_t committed_bytes     # what may be backed; never above the budget
    int64_t used_pages          # in runs that are live or slabs
    int64_t n_runs_out          # runs that are not slabs: live, or free in a magazine or a list

cdef arena_t *arenas_add(
    page_heap_t *pages, size_t nbytes, size_t align_bytes, bint dedicated, int *error
) noexcept nogil
cdef int arenas_drop(page_heap_t *pages, arena_t *arena) noexcept nogil
cdef int arenas_replace(page_heap_t *pages, arena_t *old, arena_t *new) noexcept nogil
cdef int64_t arenas_purge(page_heap_t *pages, arena_t *arena, run_t *run) noexcept nogil
cdef int64_t arenas_purge_pages(
    page_heap_t *pages, arena_t *arena, int64_t first, int64_t end
) noexcept nogil
cdef void arenas_leave_hugetlb(page_heap_t *pages) noexcept nogil
cdef void arenas_note_free(page_heap_t *pages, const run_t *run, int32_t tick) noexcept nogil
cdef void arenas_note_kept(page_heap_t *pages, const run_t *run) noexcept nogil


cdef inline size_t mapped_bytes(const arena_t *arena) noexcept nogil:
    """How much of an arena is in the page map: nothing starts in a dedicated one's other chunks."""
    return CHUNK_BYTES if arena.dedicated else arena.nbytes


cdef inline bint is_one_free_run(const arena_t *arena) noexcept nogil:
    cdef run_t *run = arena.run_of_page[0]
    return run.state == RUN_FREE and (arena.dedicated or run.n_pages == arena.n_pages)
