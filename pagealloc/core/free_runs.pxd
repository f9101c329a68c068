"""The free page runs of all arenas of one heap: fit, carve, merge."""

from libc.stdint cimport int64_t, uint8_t

from pagealloc.core.arena cimport arena_t
from pagealloc.core.page_run cimport run_pool_t, run_t

cdef struct free_runs_t:
    run_pool_t pool         # descriptors of all runs, free or not
    run_t *tree
    int64_t n_runs
    int64_t page_bytes

cdef void free_runs_init(free_runs_t *free, int64_t page_bytes) noexcept nogil
cdef void free_runs_destroy(free_runs_t *free) noexcept nogil
cdef int free_runs_add_arena(free_runs_t *free, arena_t *arena, int64_t n_pages) noexcept nogil
cdef void free_runs_remove_arena(free_runs_t *free, arena_t *arena) noexcept nogil
cdef run_t *free_runs_fit(
    free_runs_t *free, int64_t n_pages, size_t align_bytes
) noexcept nogil
cdef char *aligned_start(const run_t *run, size_t align_bytes) noexcept nogil
cdef bint free_runs_carve(
    free_runs_t *free, run_t *run, char *start, int64_t n_pages, uint8_t state, void *slab
) noexcept nogil
cdef bint free_runs_cut(free_runs_t *free, run_t *run, int64_t n_pages) noexcept nogil
cdef void free_runs_join(free_runs_t *free, run_t *run, run_t *tail) noexcept nogil
cdef void free_runs_merge(free_runs_t *free, run_t *run) noexcept nogil
cdef const char *free_runs_check_arena(
    const free_runs_t *free, arena_t *arena, int64_t *n_free, int64_t *n_live, int64_t *used_pages
) noexcept nogil
