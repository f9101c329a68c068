"""Changing what stands behind the pages of a window, all-or-nothing.

Conventions: each function takes the store's mutex, and returns 0, an errno value, or a code of
`extent_pages` or `window_pages`.  Pages throughout.
"""

from libc.stdint cimport int64_t

from pagealloc.core.extent_pages cimport extent_t, window_t

ctypedef struct shift_t:
    int64_t first_page
    int64_t n_pages
    int64_t target_page     # < first_page; or where it lies in another process's file

cdef int window_commit(window_t *window, int64_t first_page, int64_t n_pages) noexcept nogil
cdef int window_release(window_t *window, int64_t first_page, int64_t n_pages) noexcept nogil
cdef int window_share(
    window_t *window, window_t *other, int64_t first_page, int64_t n_pages
) noexcept nogil
cdef int window_share_foreign(
    window_t *window, extent_t *extent, const shift_t *runs, int64_t n_runs
) noexcept nogil
cdef int window_make_private(
    window_t *window, int64_t first_page, int64_t n_pages, int64_t *n_copied_pages
) noexcept nogil
cdef int window_shift(window_t *window, const shift_t *shifts, int64_t n_shifts) noexcept nogil
