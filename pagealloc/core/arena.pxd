"""One arena: a large reserved range, what backs it, and which of it may be backed now."""

from libc.stdint cimport int64_t, uint64_t

from pagealloc.core.page_run cimport run_t

cdef enum:                      # rungs of the ladder; a set of them is what a heap may use
    BACKING_HUGETLB = 1
    BACKING_THP = 2
    BACKING_BASE = 4

cdef enum:                      # beside errno values, which are positive
    ERROR_BUDGET = -1
    ERROR_NO_HUGE_PAGES = -2    # the backing asked for by name cannot be had
    ERROR_ALIGNMENT = -3        # hugetlb memory starts on a huge page, and on nothing larger
    ERROR_GROWTH = -4           # it takes a new arena, and that was not allowed
    ERROR_RETRY = -5            # the size class has become that of another size meanwhile

cdef struct arena_t:
    char *address
    size_t nbytes               # reserved
    int64_t n_pages
    run_t **run_of_page         # first and last page of every run (every page of a slab), else NULL
    int achieved_backing
    size_t granule_bytes        # what one touch backs: a page, or a huge page
    int64_t n_granules
    uint64_t *committed         # a bit a granule: may be backed
    int64_t n_committed
    bint dedicated              # made for one request; unmapped when that is freed
    arena_t *next
    arena_t *previous

cdef arena_t *arena_new(
    size_t nbytes, size_t align_bytes, int ladder, int *error
) noexcept nogil
cdef int arena_delete(arena_t *arena) noexcept nogil
cdef void arena_abandon(arena_t *arena) noexcept nogil

cdef int64_t arena_missing_bytes(
    const arena_t *arena, const char *address, int64_t nbytes
) noexcept nogil
cdef bint arena_commit(arena_t *arena, const char *address, int64_t nbytes) noexcept nogil
cdef int64_t arena_purge(arena_t *arena, char *address, int64_t nbytes) noexcept nogil
cdef int64_t arena_held_bytes(const arena_t *arena) noexcept nogil
cdef bint arena_check(const arena_t *arena) noexcept nogil
