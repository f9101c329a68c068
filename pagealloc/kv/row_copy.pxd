"""Copying rows between NumPy arrays and windows, nogil but for the checks."""

from libc.stdint cimport int64_t

from pagealloc.kv.row_table cimport RowTable, kind_t, table_t

ctypedef struct rows_t:     # rows (T, H, D) of a NumPy array
    char *data
    int64_t n_tokens
    int64_t token_stride
    int64_t head_stride
    int64_t item_stride


cdef inline bint is_contiguous(const kind_t *kind, const rows_t *rows) noexcept nogil:
    """True if a row is `row_bytes` in one piece; an axis of length 1 may have any stride."""
    return (rows.item_stride == kind.item_bytes or kind.head_dim == 1) and (
        rows.head_stride == kind.head_dim * kind.item_bytes or kind.n_heads == 1
    )

cdef void copy_scattered_row(
    char *target, const char *source, const kind_t *kind, const rows_t *rows
) noexcept nogil
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
