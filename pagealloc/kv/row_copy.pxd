"""Copying rows between NumPy arrays and windows, nogil but for the checks."""

from libc.stdint cimport int64_t

from pagealloc.kv.row_table cimport RowTable, table_t

ctypedef struct rows_t:     # rows (T, H, D) of a NumPy array
    char *data
    int64_t n_tokens
    int64_t token_stride
    int64_t head_stride
    int64_t item_stride

cdef object as_array(object rows)
cdef int rows_of(
    RowTable table, object array, str name, int64_t layer, int64_t kv, rows_t *rows
) except -1
cdef int row_of(
    RowTable table, object array, str name, int64_t layer, int64_t kv, rows_t *rows
) except -1
cdef int token_of(RowTable table, object array, rows_t *rows, int64_t *layer_stride) except -1

cdef void write_rows(
    const table_t *table, char *window, int64_t layer, int64_t kv, int64_t start,
    const rows_t *rows
) noexcept nogil
cdef void read_rows(
    const table_t *table, const char *window, int64_t layer, int64_t kv, int64_t start,
    int64_t end, char *target
) noexcept nogil
cdef void write_token(
    const table_t *table, char *window, int64_t token, const rows_t *rows, int64_t layer_stride
) noexcept nogil
cdef void move_rows(
    const table_t *table, char *window, int64_t start, int64_t end, int64_t target
) noexcept nogil
