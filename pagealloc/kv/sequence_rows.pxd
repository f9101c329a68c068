"""SequenceRows, for rooms that append to several sequences at once."""

from libc.stdint cimport int64_t

from pagealloc.kv.row_copy cimport rows_t
from pagealloc.kv.sequence_arrays cimport SequenceArrays
from pagealloc.kv.token_positions cimport TokenPositions


cdef class SequenceRows(SequenceArrays):
    cdef TokenPositions tokens
    cdef int64_t cool_at        # at this length rows are to be packed, or looked for

    cdef int make_token_ready(self, int64_t start) except -1
    cdef int add_token(self, int64_t start, int64_t first) except -1
    cdef int append_pairs(self, object pairs, object position) except -1
    cdef int write_quantised(
        self, char *base, int64_t layer, int64_t start, const rows_t *k, const rows_t *v,
        bint is_large
    ) except -1
    cdef int cool(self) except -1
