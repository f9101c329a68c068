"""Window, for rooms that compute on window memory without the GIL.

`Window.pages.address` is fixed for the life of the window.
"""

from libc.stdint cimport int64_t

from pagealloc.core.extent_pages cimport window_t
from pagealloc.core.extents cimport ExtentStore


cdef class Window:
    cdef readonly ExtentStore store
    cdef window_t *pages

    cdef int find(
        self, object offset, object nbytes, bint is_aligned, int64_t *first_page, int64_t *n_pages
    ) except -1
    cdef int require(self, int code, str action, object offset, object nbytes) except -1
