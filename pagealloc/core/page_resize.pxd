"""Page runs made longer or shorter."""

from libc.stdint cimport int64_t, uint16_t

from pagealloc.core.arenas cimport page_heap_t

cdef bint page_heap_resize(
    page_heap_t *pages, const char *address, int64_t n_pages, uint16_t size_class
) noexcept nogil
cdef char *page_heap_move(
    page_heap_t *pages, const char *address, int64_t n_pages, size_t align_bytes,
    uint16_t size_class
) noexcept nogil
