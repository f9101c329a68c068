"""WindowView: a range of a window's bytes, exported through the buffer protocol."""

from libc.stdint cimport int64_t

from pagealloc.core.extent_pages cimport view_t, window_t
from pagealloc.core.extents cimport ExtentStore


cdef class WindowView:
    cdef readonly object window     # keeps it open
    cdef ExtentStore store
    cdef window_t *pages
    cdef view_t entry

    cdef int attach(
        self, object window, ExtentStore store, window_t *pages, int64_t first_page, int64_t n_pages
    ) noexcept
    cdef char *memory(self) except NULL
