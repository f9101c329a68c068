"""WindowRows, for rooms that touch the rows of a window."""

from libc.stdint cimport int64_t

from pagealloc cimport Window
from pagealloc.kv.row_copy cimport rows_t
from pagealloc.kv.row_table cimport RowTable


cdef class WindowRows:
    cdef readonly Window _window
    cdef RowTable table
    cdef int64_t *lengths       # of each layer; stale while n_even >= 0
    cdef int64_t *ready         # of each layer; see row_pages
    cdef int64_t n_even         # length that all layers have; -1 while they differ
    cdef int64_t least_ready    # min(ready)
    cdef int64_t ring_tokens    # token t lies at t % ring_tokens; 0: at t

    cdef int set_up(self, RowTable table, Window window, int64_t ring_tokens) except -1
    cdef int64_t length_of(self, int64_t layer) noexcept
    cdef void set_length(self, int64_t layer, int64_t n_tokens) noexcept
    cdef char *base(self) except NULL
    cdef void write(
        self, char *window, int64_t layer, int64_t kv, int64_t start, const rows_t *rows
    ) noexcept nogil
    cdef void read(
        self, const char *window, int64_t layer, int64_t kv, int64_t start, int64_t end,
        char *target
    ) noexcept nogil


cdef inline int64_t slot_of(int64_t token, int64_t ring_tokens) noexcept nogil:
    """Where in a window a token lies, counted in tokens."""
    return token if ring_tokens == 0 else token % ring_tokens


cdef inline int64_t piece_end(int64_t token, int64_t end, int64_t ring_tokens) noexcept nogil:
    """Up to which token the tokens from this one on lie one behind the other, at most `end`."""
    if ring_tokens == 0:
        return end
    return min(end, token - token % ring_tokens + ring_tokens)
