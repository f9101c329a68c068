"""Copying rows between NumPy arrays and windows.

Purpose
    The inner loops of appending, reading and moving rows, and the checks that arrays fit.
Structure
    rows_of / row_of / token_of  say whether an array fits the layout, and how it is strided
    write_rows, write_token      array -> window
    read_rows                    window -> contiguous memory
    move_rows                    window -> window, towards its start, all layers
Invariants
    memory is written only where the caller committed it and made it private: this room knows
    addresses, not pages
Locking
    None: one writer a sequence, and the caller keeps the window mapped.
Units
    Bytes, unless the name says tokens.
"""

cimport numpy as np
from cpython.buffer cimport PyObject_CheckBuffer
from libc.stdint cimport int64_t
from libc.string cimport memcpy, memmove

from pagealloc.kv.row_table cimport RowTable, kind_t, row_place, table_t

import numpy

np.import_array()


# ---------------------------------------------------------------------------------------------
# Checking arrays

cdef int refuse_type(RowTable table, object array, str name, int64_t kv) except -1:
    layout = table.layout
    stored = layout.storage_dtypes[kv].name
    dtype = getattr(array, "dtype", None)
    if dtype is None:
        raise TypeError(f"{name} must be an array of {stored}, not {type(array).__name__}")
    kind = layout.v_dtype if kv else layout.k_dtype
    advice = (
        "its bits as uint16: x.view(np.uint16)"
        if kind == "bfloat16"
        else f"x.astype(np.{stored})"
    )
    raise TypeError(
        f"{name} has dtype {dtype}, the cache stores {stored} and does not convert silently: "
        f"give {advice}"
    )


cdef object as_array(object rows):
    """An ndarray over what exports memory; anything else as it is, to be refused by its type."""
    if np.PyArray_Check(rows):
        return rows
    if hasattr(rows, "dtype") or PyObject_CheckBuffer(rows):
        return numpy.asarray(rows)
    return rows


cdef inline bint is_of_type(RowTable table, object array, int64_t kv) noexcept:
    return (
        np.PyArray_Check(array)
        and np.PyArray_TYPE(<np.ndarray>array) == table.type_numbers[kv]
        and np.PyArray_ISNOTSWAPPED(<np.ndarray>array)
    )


cdef int refuse_shape(str name, object array, str axes, tuple expected) except -1:
    wanted = ", ".join([axes, *map(str, expected)] if axes else map(str, expected))
    raise ValueError(f"{name} has shape {array.shape}, expected ({wanted})")


cdef int rows_of(
    RowTable table, object array, str name, int64_t layer, int64_t kv, rows_t *rows
) except -1:
    """Rows (T, H, D) of one kind of a layer that exists."""
    take_rows(table, array, name, layer, kv, 1, rows)
    rows.n_tokens = np.PyArray_DIM(<np.ndarray>array, 0)
    rows.token_stride = np.PyArray_STRIDE(<np.ndarray>array, 0)
    return 0


cdef int row_of(
    RowTable table, object array, str name, int64_t layer, int64_t kv, rows_t *rows
) except -1:
    """One row (H, D) of one kind of a layer that exists."""
    take_rows(table, array, name, layer, kv, 0, rows)
    rows.n_tokens = 1
    rows.token_stride = 0
    return 0


cdef int take_rows(
    RowTable table, object array, str name, int64_t layer, int64_t kv, int n_before, rows_t *rows
) except -1:
    """Check type and shape, and note data and strides; H and D come behind `n_before` axes."""
    cdef const kind_t *kind = &table.table.kinds[2 * layer + kv]
    cdef np.ndarray given
    if not is_of_type(table, array, kv):
        refuse_type(table, array, name, kv)
    given = <np.ndarray>array
    if (
        np.PyArray_NDIM(given) != n_before + 2
        or np.PyArray_DIM(given, n_before) != kind.n_heads
        or np.PyArray_DIM(given, n_before + 1) != kind.head_dim
    ):
        refuse_shape(name, array, "tokens" if n_before else "", (kind.n_heads, kind.head_dim))
    rows.data = <char *>np.PyArray_DATA(given)
    rows.head_stride = np.PyArray_STRIDE(given, n_before)
    rows.item_stride = np.PyArray_STRIDE(given, n_before + 1)
    return 0


cdef int token_of(RowTable table, object array, rows_t *rows, int64_t *layer_stride) except -1:
    """One token (L, 2, H, D) of a uniform layout; K and V are `token_stride` apart in `rows`."""
    cdef const kind_t *kind = &table.table.kinds[0]
    cdef np.ndarray given
    if not is_of_type(table, array, 0):
        refuse_type(table, array, "kv", 0)
    given = <np.ndarray>array
    if (
        np.PyArray_NDIM(given) != 4
        or np.PyArray_DIM(given, 0) != table.table.n_layers
        or np.PyArray_DIM(given, 1) != 2
        or np.PyArray_DIM(given, 2) != kind.n_heads
        or np.PyArray_DIM(given, 3) != kind.head_dim
    ):
        refuse_shape("kv", array, "", (table.table.n_layers, 2, kind.n_heads, kind.head_dim))
    rows.data = <char *>np.PyArray_DATA(given)
    rows.n_tokens = 1
    layer_stride[0] = np.PyArray_STRIDE(given, 0)
    rows.token_stride = np.PyArray_STRIDE(given, 1)
    rows.head_stride = np.PyArray_STRIDE(given, 2)
    rows.item_stride = np.PyArray_STRIDE(given, 3)
    return 0


# ---------------------------------------------------------------------------------------------
# Copying

cdef void copy_scattered_row(
    char *target, const char *source, const kind_t *kind, const rows_t *rows
) noexcept nogil:
    cdef int64_t head, item
    for head in range(kind.n_heads):
        for item in range(kind.head_dim):
            memcpy(
                target + (head * kind.head_dim + item) * kind.item_bytes,
                source + head * rows.head_stride + item * rows.item_stride,
                <size_t>kind.item_bytes,
            )


cdef void write_rows(
    const table_t *table, char *window, int64_t layer, int64_t kv, int64_t start,
    const rows_t *rows
) noexcept nogil:
    """Copy the rows to tokens from `start` on."""
    cdef const kind_t *kind = &table.kinds[2 * layer + kv]
    cdef bint in_one_piece = is_contiguous(kind, rows)
    cdef char *target
    cdef int64_t i
    for i in range(rows.n_tokens):
        target = window + row_place(table, kind, start + i)
        if in_one_piece:
            memcpy(target, rows.data + i * rows.token_stride, <size_t>kind.row_bytes)
        else:
            copy_scattered_row(target, rows.data + i * rows.token_stride, kind, rows)


cdef void write_token(
    const table_t *table, char *window, int64_t token, const rows_t *rows, int64_t layer_stride
) noexcept nogil:
    """Copy K and V of one token of all layers, which are alike."""
    cdef const kind_t *k = &table.kinds[0]
    cdef const kind_t *v = &table.kinds[1]
    cdef const char *source = rows.data
    cdef char *target = window + row_place(table, k, token)     # of layer 0; the rest lie alike
    cdef int64_t first_base = k.base
    cdef int64_t v_way = row_place(table, v, token) - row_place(table, k, token)
    cdef int64_t n_pair_bytes = 0
    cdef int64_t layer
    cdef bint in_one_piece = is_contiguous(k, rows)
    if in_one_piece and rows.token_stride == k.row_bytes and v_way == k.row_bytes:
        n_pair_bytes = 2 * k.row_bytes      # K and V are neighbours on both sides
    for layer in range(table.n_layers):
        k = &table.kinds[2 * layer]
        if n_pair_bytes:
            memcpy(target + (k.base - first_base), source, <size_t>n_pair_bytes)
        elif in_one_piece:
            memcpy(target + (k.base - first_base), source, <size_t>k.row_bytes)
            memcpy(
                target + (k.base - first_base) + v_way, source + rows.token_stride,
                <size_t>k.row_bytes,
            )
        else:
            copy_scattered_row(target + (k.base - first_base), source, k, rows)
            copy_scattered_row(
                target + (k.base - first_base) + v_way, source + rows.token_stride, k, rows
            )
        source += layer_stride


cdef void read_rows(
    const table_t *table, const char *window, int64_t layer, int64_t kv, int64_t start,
    int64_t end, char *target
) noexcept nogil:
    """Copy tokens [start, end) of a layer to contiguous memory."""
    cdef const kind_t *kind = &table.kinds[2 * layer + kv]
    cdef int64_t token
    for token in range(start, end):
        memcpy(
            target + (token - start) * kind.row_bytes,
            window + row_place(table, kind, token), <size_t>kind.row_bytes,
        )


cdef void move_rows(
    const table_t *table, char *window, int64_t start, int64_t end, int64_t target
) noexcept nogil:
    """Move tokens [start, end) of all layers to `target` < start."""
    cdef const kind_t *kind
    cdef int64_t i, token
    for i in range(2 * table.n_layers):
        kind = &table.kinds[i]
        for token in range(start, end):
            memmove(
                window + row_place(table, kind, token - start + target),
                window + row_place(table, kind, token), <size_t>kind.row_bytes,
            )
