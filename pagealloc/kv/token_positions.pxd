"""TokenPositions: where each token of a sequence stands in its conversation."""

cimport cython
from libc.stdint cimport int32_t, int64_t


@cython.final
cdef class TokenPositions:
    cdef int32_t *positions     # of each token, in the order of storage
    cdef int64_t n_tokens
    cdef int64_t capacity
    cdef int64_t largest        # -1 without tokens

    cdef int64_t first_of(self, int64_t start, int64_t end, object position) except -1
    cdef void add(self, int64_t end, int64_t first) noexcept
    cdef int reserve(self, int64_t n_tokens) except -1
    cdef int64_t smallest(self) noexcept
    cdef object as_array(self)
    cdef int replace(self, object positions) except -1
