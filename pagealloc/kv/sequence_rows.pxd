"""SequenceRows, for rooms that work on the rows of several sequences at once."""

from libc.stdint cimport int32_t, int64_t

from pagealloc cimport Window, WindowView
from pagealloc.kv.row_table cimport RowTable, kind_t


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
    cdef int32_t *positions     # of each token; max(lengths) of them
    cdef int64_t n_positions
    cdef int64_t positions_capacity
    cdef int64_t largest_position   # -1 without tokens

    cdef int64_t length_of(self, int64_t layer) noexcept
    cdef void set_length(self, int64_t layer, int64_t n_tokens) noexcept
    cdef int require_open(self) except -1
    cdef int require_writable(self) except -1
    cdef int64_t first_position(self, int64_t start, int64_t end, object position) except -1
    cdef void add_positions(self, int64_t end, int64_t first) noexcept
    cdef int reserve_positions(self, int64_t n_tokens) except -1
    cdef object rows_array(
        self, object layer, int64_t kv, object start, object end, str on_cross
    )
    cdef int64_t committed_word(self, object offset) except -1
    cdef int64_t layer_index(self, object layer) except -1
    cdef char *base(self) except NULL
    cdef int make_token_ready(self, int64_t start) except -1
    cdef int append_pairs(self, object pairs, object position) except -1
    cdef object array_over(
        self, WindowView view, const kind_t *kind, int64_t kv, int64_t n_tokens
    )
    cdef object empty_rows(self, int64_t layer, int64_t kv)
    cdef object copied_rows(self, int64_t layer, int64_t kv, int64_t first, int64_t last)
