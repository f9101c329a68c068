"""SequenceRows, for rooms that work on the rows of several sequences at once."""

from libc.stdint cimport int64_t

from pagealloc cimport Window
from pagealloc.kv.row_table cimport RowTable
from pagealloc.kv.token_positions cimport TokenPositions


cdef class SequenceRows:
    cdef readonly Window _window
    cdef RowTable table
    cdef public bint _is_closed
    cdef public bint _was_evicted
    cdef int64_t *lengths       # of each layer; stale while n_even >= 0
    cdef int64_t *ready         # of each layer; see row_pages
    cdef int64_t n_even         # length that all layers have; -1 while they differ
    cdef int64_t least_ready    # min(ready)
    cdef int64_t n_cuts         # goes up whenever rows are dropped or moved
    cdef TokenPositions tokens

    cdef int64_t length_of(self, int64_t layer) noexcept
    cdef void set_length(self, int64_t layer, int64_t n_tokens) noexcept
    cdef int require_open(self) except -1
    cdef int require_writable(self) except -1
    cdef object rows_array(
        self, object layer, int64_t kv, object start, object end, str on_cross
    )
    cdef int64_t committed_word(self, object offset) except -1
    cdef int64_t layer_index(self, object layer) except -1
    cdef char *base(self) except NULL
    cdef int make_token_ready(self, int64_t start) except -1
    cdef int append_pairs(self, object pairs, object position) except -1
