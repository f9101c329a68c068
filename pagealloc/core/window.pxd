"""Window, for rooms that compute on window memory without the GIL.

`Window.pages.address` is fixed for the life of the window.
"""

from libc.stdint cimport int64_t

from pagealloc.core.extent_pages cimport window_t
from pagealloc.core.extents cimport ExtentStore
from pagealloc.core.window_view cimport WindowView


cdef class Window:
    cdef readonly ExtentStore store
    cdef window_t *pages
    cdef readonly int64_t noted_bytes    # committed while blocks were noted: what heap profiles saw
    cdef object __weakref__

    cdef char *memory(self) noexcept
    cdef int64_t n_bytes(self) noexcept
    cdef bint is_frozen(self) noexcept
    cdef WindowView view_of(self, int64_t offset_bytes, int64_t nbytes, int64_t mark)
    cdef bint is_one_run(self, int64_t offset_bytes, int64_t nbytes) noexcept
    cdef int find(
        self, object offset, object nbytes, bint is_aligned, int64_t *first_page, int64_t *n_pages
    ) except -1
    cdef int require(self, int code, str action, object offset, object nbytes) except -1
