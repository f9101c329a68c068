"""How free pages go back to the kernel: by themselves, or all at once."""

from libc.stdint cimport int64_t

from pagealloc.core.arena cimport arena_t
from pagealloc.core.arenas cimport page_heap_t

cdef int64_t page_heap_purge_idle(page_heap_t *pages) noexcept nogil
cdef int64_t page_heap_begin_trim(page_heap_t *pages) noexcept nogil
cdef int64_t page_heap_end_trim(page_heap_t *pages, int64_t begun_at_bytes) noexcept nogil
cdef int64_t page_purge_split(
    page_heap_t *pages, arena_t *arena, int64_t piece
) noexcept nogil
