"""Arrays (T, H, D) of a layer's rows: over a window, empty, or a copy.  All are read-only."""

from libc.stdint cimport int64_t

from pagealloc cimport WindowView
from pagealloc.kv.row_table cimport RowTable

cdef object array_over(
    RowTable table, WindowView view, int64_t layer, int64_t kv, int64_t n_tokens
)
cdef object empty_rows(RowTable table, int64_t layer, int64_t kv)
cdef object copied_rows(
    RowTable table, const char *window, int64_t layer, int64_t kv, int64_t first, int64_t last
)
