"""Arrays (T, H, D) of a layer's rows: over a window, empty, or for a copy.  All are read-only."""

from libc.stdint cimport int64_t

from pagealloc cimport WindowView
from pagealloc.kv.row_table cimport RowTable

cdef object array_over(
    RowTable table, WindowView view, int64_t layer, int64_t kv, int64_t n_tokens
)
cdef object empty_rows(RowTable table, int64_t layer, int64_t kv)
cdef object new_rows(
    int64_t n_tokens, int64_t n_heads, int64_t head_dim, int64_t row_bytes, int type_number
)
