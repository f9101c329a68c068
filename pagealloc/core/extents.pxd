"""ExtentStore, for rooms that put windows over it.

`require` turns a code of `extent_pages` into the exception it means.
"""

from libc.stdint cimport int64_t

from pagealloc.core.extent_pages cimport store_t


cdef class ExtentStore:
    cdef store_t *books
    cdef readonly str name

    cdef void lock(self) noexcept
    cdef int64_t read(self, const int64_t *count) noexcept
    cdef int require(self, int code, str action, int64_t asked_bytes) except -1
