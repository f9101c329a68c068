"""Huge pages behind windows.  Both want the store's mutex; both are mere attempts."""

from libc.stdint cimport int64_t

from pagealloc.core.extent_pages cimport window_t

cdef void populate_huge_pages(
    window_t *window, int64_t first_page, int64_t n_pages
) noexcept nogil
cdef void collapse_completed_huge_pages(
    window_t *window, int64_t first_page, int64_t n_pages
) noexcept nogil
