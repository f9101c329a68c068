"""SequenceArrays, for rooms that work on the rows of several sequences at once."""

from libc.stdint cimport int64_t

from pagealloc.kv.cold_rows cimport ColdRows
from pagealloc.kv.quant cimport plain_t
from pagealloc.kv.row_codecs cimport RowCodecs
from pagealloc.kv.window_rows cimport WindowRows


cdef class SequenceArrays(WindowRows):
    cdef RowCodecs codecs
    cdef readonly ColdRows _cold    # None: no row is stored otherwise than it came
    cdef public bint _is_closed
    cdef public bint _was_evicted
    cdef int64_t n_cuts             # goes up whenever rows are dropped or moved

    cdef int require_open(self) except -1
    cdef int require_writable(self) except -1
    cdef int64_t layer_index(self, object layer) except -1
    cdef int64_t cold_length(self, int64_t layer) noexcept
    cdef object rows_array(
        self, object layer, int64_t kv, object start, object end, str on_cross
    )
    cdef object converted(
        self, object layer, int64_t kv, object start, object end, object dtype, object out
    )
    cdef bint fill(
        self, int64_t layer, int64_t kv, int64_t first, int64_t last, int64_t n_tokens,
        int64_t n_cuts, char *target, const plain_t *wanted
    ) except -1
    cdef int64_t committed_word(self, object offset) except -1
