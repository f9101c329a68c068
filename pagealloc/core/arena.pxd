"""One arena: a large reserved range, and which of it may be backed now."""

from libc.stdint cimport int32_t, int64_t, uint64_t

from pagealloc.core.backing cimport placement_t
from pagealloc.core.page_run cimport run_t

cdef struct arena_t:
    char *address
    size_t nbytes               # reserved
    int64_t serial              # grows from one arena of a heap to the next
    int64_t n_pages
    size_t page_bytes
    run_t **run_of_page         # first and last page of every run (every page of a slab), else NULL
    int achieved_backing
    bint collapses
    int64_t granule_pages       # what one touch backs: a page, or a huge page that is not split
    uint64_t *committed         # a bit a page: may be backed
    int64_t n_committed
    uint64_t *split             # a bit a huge page: it was split, a touch backs a page of it
    int64_t piece_pages         # a chunk, or a huge page if that is longer
    int64_t n_pieces
    int32_t *freed_at           # a piece: tick of the last free into it; 0: purged since
    int64_t n_dirty             # pieces with a tick
    bint dedicated              # made for one request; unmapped when that is freed
    arena_t *next
    arena_t *previous

cdef arena_t *arena_new(
    const placement_t *placement, size_t nbytes, size_t align_bytes, int *error
) noexcept nogil
cdef int arena_delete(arena_t *arena) noexcept nogil
cdef void arena_abandon(arena_t *arena) noexcept nogil
cdef void arena_forget(arena_t *arena) noexcept nogil

cdef int64_t arena_missing_pages(
    const arena_t *arena, const char *address, int64_t nbytes
) noexcept nogil
cdef bint arena_commit(arena_t *arena, const char *address, int64_t nbytes) noexcept nogil
cdef int64_t arena_purge(arena_t *arena, int64_t first, int64_t end) noexcept nogil
cdef bint arena_may_split(const arena_t *arena, int64_t page) noexcept nogil
cdef bint arena_split(arena_t *arena, int64_t page) noexcept nogil
cdef int64_t arena_held_bytes(const arena_t *arena) noexcept nogil
cdef int arena_node(const arena_t *arena) noexcept nogil
cdef void arena_note_free(
    arena_t *arena, const char *address, int64_t nbytes, int32_t tick
) noexcept nogil
cdef void arena_note_kept(arena_t *arena, const char *address, int64_t nbytes) noexcept nogil
cdef bint arena_check(const arena_t *arena) noexcept nogil
