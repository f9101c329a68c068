"""Arrays (T, H, D) of a layer's rows: over a window, empty, or for a copy.  All are read-only.

Purpose
    What `SequenceRows.k` and `v` return, in a quarter of a microsecond.
Invariants
    an array over a window keeps its view alive, which keeps the window open
    a copy lies in a Buffer of the default allocator, whose caches keep the memory for the next one
Locking
    The GIL.
Units
    Tokens; bytes where named.
"""

cimport numpy as np
from cpython.object cimport PyObject, PyTypeObject
from libc.stdint cimport int64_t, uintptr_t

from pagealloc cimport WindowView
from pagealloc.kv.row_table cimport RowTable, kind_t

from pagealloc import default_allocator

np.import_array()

cdef extern from "numpy/arrayobject.h":
    # As NumPy's own .pxd, whose last parameter cannot be NULL.
    np.ndarray new_array "PyArray_New"(
        PyTypeObject *subtype, int n_dims, np.npy_intp *shape, int type_number,
        np.npy_intp *strides, void *data, int item_bytes, int flags, PyObject *like
    )
    PyTypeObject PyArray_Type


cdef object array_over(
    RowTable table, WindowView view, int64_t layer, int64_t kv, int64_t n_tokens
):
    """Rows in one stretch of equal strides, which the view covers from its first byte."""
    cdef const kind_t *kind = &table.table.kinds[2 * layer + kv]
    cdef np.npy_intp[3] shape
    cdef np.npy_intp[3] strides
    cdef np.ndarray array
    shape[0], shape[1], shape[2] = n_tokens, kind.n_heads, kind.head_dim
    strides[0] = kind.stride
    strides[1], strides[2] = kind.head_dim * kind.item_bytes, kind.item_bytes
    array = new_array(
        &PyArray_Type, 3, shape, table.type_numbers[kv], strides, view.memory(), 0,
        np.NPY_ARRAY_ALIGNED, NULL,
    )
    np.set_array_base(array, view)
    return array


cdef object empty_rows(RowTable table, int64_t layer, int64_t kv):
    """No rows, of the right shape."""
    cdef const kind_t *kind = &table.table.kinds[2 * layer + kv]
    cdef np.npy_intp[3] shape
    shape[0], shape[1], shape[2] = 0, kind.n_heads, kind.head_dim
    array = np.PyArray_EMPTY(3, shape, table.type_numbers[kv], 0)
    array.flags.writeable = False
    return array


cdef object new_rows(
    int64_t n_tokens, int64_t n_heads, int64_t head_dim, int64_t row_bytes, int type_number
):
    """An array for rows to be written to; who gets it shall only read."""
    cdef np.npy_intp[3] shape
    cdef np.ndarray array
    buffer = default_allocator().alloc(max(1, n_tokens * row_bytes))
    shape[0], shape[1], shape[2] = n_tokens, n_heads, head_dim
    array = new_array(
        &PyArray_Type, 3, shape, type_number, NULL, <void *><uintptr_t>buffer.address, 0,
        np.NPY_ARRAY_CARRAY_RO, NULL,
    )
    np.set_array_base(array, buffer)
    return array
