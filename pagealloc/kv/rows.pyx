"""RowWriter: checks rows that are to be appended, and copies them to their place in a window.

Purpose
    The inner loop of `Sequence.append`: from arrays of any strides to the layout's offsets.
Structure
    `count()` / `check_token()` say whether the arrays fit the layout, before anything is changed;
    `write()` / `write_token()` copy.  Place of token t of a layer::

        layer_base[layer] + t // unit_tokens * unit_bytes + t % unit_tokens * row_stride

    with the KV block as the unit in block order, and the whole layer in layer-major orders.
Invariants
    Memory is written only where the caller committed it and made it private: this room knows
    addresses, not pages.
Locking
    None: one writer a sequence.  From the look at the window to the end of the copy the GIL is
    held, or, for copies of NOGIL_BYTES or more, a view: nobody can unmap the window meanwhile.
"""

cimport cython
from cpython.buffer cimport (
    PyBUF_FORMAT,
    PyBUF_STRIDES,
    Py_buffer,
    PyBuffer_Release,
    PyObject_GetBuffer,
)
from libc.stdint cimport int64_t, uintptr_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

from pagealloc.errors import ClosedError

cdef enum:
    NOGIL_BYTES = 65536


cdef struct row_shape:
    int64_t n_heads
    int64_t head_dim
    int64_t item_bytes
    int64_t head_bytes
    int64_t row_bytes
    int64_t row_stride
    int64_t v_offset
    int64_t unit_tokens
    int64_t unit_bytes


cdef inline void copy_row(
    char *target, const char *source, const row_shape *shape,
    int64_t head_stride, int64_t item_stride,
) noexcept nogil:
    """Copy one row (H, D) into `row_bytes` contiguous bytes."""
    cdef int64_t head, item
    if (item_stride == shape.item_bytes or shape.head_dim == 1) and (
        head_stride == shape.head_bytes or shape.n_heads == 1
    ):  # an axis of length 1 may have any stride
        memcpy(target, source, <size_t>shape.row_bytes)
        return
    for head in range(shape.n_heads):
        for item in range(shape.head_dim):
            memcpy(
                target + head * shape.head_bytes + item * shape.item_bytes,
                source + head * head_stride + item * item_stride,
                <size_t>shape.item_bytes,
            )


cdef void copy_rows(
    char *layer, int64_t start, int64_t n_tokens, const char *source,
    int64_t token_stride, int64_t head_stride, int64_t item_stride, const row_shape *shape,
) noexcept nogil:
    """Copy rows (T, H, D) of one kind to tokens [start, start + T) of a layer."""
    cdef int64_t unit = start // shape.unit_tokens
    cdef int64_t position = start % shape.unit_tokens
    cdef int64_t i
    for i in range(n_tokens):
        copy_row(
            layer + unit * shape.unit_bytes + position * shape.row_stride,
            source + i * token_stride, shape, head_stride, item_stride,
        )
        position += 1
        if position == shape.unit_tokens:
            unit += 1
            position = 0


@cython.final
cdef class RowWriter:
    """Copies rows of one layout."""

    cdef row_shape shape
    cdef int64_t n_layers
    cdef int64_t *layer_base
    cdef bytes formats    # the buffer formats that hold the layout's type, one letter each
    cdef str dtype_name
    cdef str advice

    def __cinit__(self, layout):
        self.shape.n_heads = layout.n_kv_heads
        self.shape.head_dim = layout.head_dim
        self.shape.item_bytes = layout.item_bytes
        self.shape.head_bytes = layout.head_bytes
        self.shape.row_bytes = layout.k_row_bytes
        self.shape.row_stride = layout.row_stride
        self.shape.v_offset = layout.v_offset
        in_blocks = layout.order == "block"
        self.shape.unit_tokens = layout.block_tokens if in_blocks else layout.max_tokens
        self.shape.unit_bytes = layout.block_bytes if in_blocks else 0
        self.dtype_name = layout.storage_dtype.name
        self.formats = layout.storage_dtype.char.encode()
        self.advice = (
            "its bits as uint16: x.view(np.uint16)"
            if layout.dtype == "bfloat16"
            else f"x.astype(np.{self.dtype_name})"
        )
        self.n_layers = layout.n_layers
        self.layer_base = <int64_t *>malloc(<size_t>self.n_layers * sizeof(int64_t))
        if self.layer_base == NULL:
            raise MemoryError
        for i, base in enumerate(layout.layer_base):
            self.layer_base[i] = base

    def __dealloc__(self):
        free(self.layer_base)

    def __reduce__(self):
        raise TypeError("a RowWriter cannot be pickled or copied")

    cdef int open(self, object rows, str name, Py_buffer *buffer) except -1:
        """Take the buffer of `rows` if its type is the layout's."""
        try:
            PyObject_GetBuffer(rows, buffer, PyBUF_FORMAT | PyBUF_STRIDES)
        except (TypeError, ValueError, BufferError):
            self.refuse_type(rows, name)
        if buffer.format == NULL or buffer.format[0] != self.formats[0] or buffer.format[1] != 0:
            PyBuffer_Release(buffer)
            self.refuse_type(rows, name)
        return 0

    cdef int refuse_type(self, object rows, str name) except -1:
        dtype = getattr(rows, "dtype", None)
        if dtype is None:
            raise TypeError(
                f"{name} must be an array of {self.dtype_name}, not {type(rows).__name__}"
            )
        raise TypeError(
            f"{name} has dtype {dtype}, the cache stores {self.dtype_name} and does not convert "
            f"silently: give {self.advice}"
        )

    cdef int open_rows(self, object rows, str name, Py_buffer *buffer) except -1:
        """Take the buffer of rows (T, H, D)."""
        self.open(rows, name, buffer)
        if (
            buffer.ndim != 3
            or buffer.shape[1] != self.shape.n_heads
            or buffer.shape[2] != self.shape.head_dim
        ):
            given = tuple([buffer.shape[i] for i in range(buffer.ndim)])
            PyBuffer_Release(buffer)
            raise ValueError(
                f"{name} has shape {given}, expected (tokens, {self.shape.n_heads}, "
                f"{self.shape.head_dim})"
            )
        return 0

    cdef int open_token(self, object token, Py_buffer *buffer) except -1:
        """Take the buffer of one token (L, 2, H, D)."""
        self.open(token, "kv", buffer)
        if (
            buffer.ndim != 4
            or buffer.shape[0] != self.n_layers
            or buffer.shape[1] != 2
            or buffer.shape[2] != self.shape.n_heads
            or buffer.shape[3] != self.shape.head_dim
        ):
            given = tuple([buffer.shape[i] for i in range(buffer.ndim)])
            PyBuffer_Release(buffer)
            raise ValueError(
                f"kv has shape {given}, expected ({self.n_layers}, 2, {self.shape.n_heads}, "
                f"{self.shape.head_dim})"
            )
        return 0

    def count(self, k, v) -> int:
        """Return how many tokens `k` and `v` hold; TypeError or ValueError if they do not fit."""
        cdef Py_buffer k_buffer, v_buffer
        cdef int64_t n_k, n_v
        self.open_rows(k, "k", &k_buffer)
        n_k = k_buffer.shape[0]
        PyBuffer_Release(&k_buffer)
        self.open_rows(v, "v", &v_buffer)
        n_v = v_buffer.shape[0]
        PyBuffer_Release(&v_buffer)
        if n_k != n_v:
            raise ValueError(f"k holds {n_k} tokens and v {n_v}: every token has both")
        return n_k

    cdef char *pin(self, object window, int64_t offset, bint is_large, list pins) except NULL:
        """Return where the window is mapped; it stays so while `pins` or the GIL are held."""
        if is_large:
            pins.append(window.view(offset, 1))
        if window.closed:
            raise ClosedError("the sequence was closed while rows were appended")
        return <char *><uintptr_t>window.address

    def write(self, window, int64_t layer, int64_t start, int64_t n_tokens, k, v) -> None:
        """Copy K and V of tokens [start, start + n_tokens) of a layer into the window."""
        cdef Py_buffer k_buffer, v_buffer
        cdef bint is_large = n_tokens * self.shape.row_bytes * 2 >= NOGIL_BYTES
        cdef list pins = []
        cdef char *base
        if not 0 <= layer < self.n_layers:
            raise ValueError(f"layer {layer} is outside {self.n_layers} layers")
        self.open_rows(k, "k", &k_buffer)
        try:
            self.open_rows(v, "v", &v_buffer)
            try:
                if k_buffer.shape[0] != n_tokens or v_buffer.shape[0] != n_tokens:
                    raise ValueError("k or v changed its shape while it was appended")
                base = self.pin(window, self.place(layer, start), is_large, pins)
                base += self.layer_base[layer]
                if is_large:
                    with nogil:
                        self.write_both(base, start, &k_buffer, &v_buffer)
                else:
                    self.write_both(base, start, &k_buffer, &v_buffer)
            finally:
                PyBuffer_Release(&v_buffer)
        finally:
            PyBuffer_Release(&k_buffer)

    cdef int64_t place(self, int64_t layer, int64_t token) noexcept:
        """Return the offset of a K row."""
        return (
            self.layer_base[layer]
            + token // self.shape.unit_tokens * self.shape.unit_bytes
            + token % self.shape.unit_tokens * self.shape.row_stride
        )

    cdef void write_both(
        self, char *base, int64_t start, const Py_buffer *k, const Py_buffer *v
    ) noexcept nogil:
        copy_rows(
            base, start, k.shape[0], <const char *>k.buf,
            k.strides[0], k.strides[1], k.strides[2], &self.shape,
        )
        copy_rows(
            base + self.shape.v_offset, start, v.shape[0], <const char *>v.buf,
            v.strides[0], v.strides[1], v.strides[2], &self.shape,
        )

    def check_token(self, kv) -> None:
        """Raise TypeError or ValueError unless `kv` is one token of all layers (L, 2, H, D)."""
        cdef Py_buffer buffer
        self.open_token(kv, &buffer)
        PyBuffer_Release(&buffer)

    def write_token(self, window, int64_t token, kv) -> None:
        """Copy K and V of one token of all layers into the window."""
        cdef Py_buffer buffer
        cdef bint is_large = self.n_layers * self.shape.row_bytes * 2 >= NOGIL_BYTES
        cdef list pins = []
        cdef char *address
        self.open_token(kv, &buffer)
        try:
            address = self.pin(window, self.place(0, token), is_large, pins)
            if is_large:
                with nogil:
                    self.write_layers(address, token, &buffer)
            else:
                self.write_layers(address, token, &buffer)
        finally:
            PyBuffer_Release(&buffer)

    cdef void write_layers(self, char *window, int64_t token, const Py_buffer *kv) noexcept nogil:
        cdef int64_t layer, kind
        for layer in range(self.n_layers):
            for kind in range(2):
                copy_rows(
                    window + self.layer_base[layer] + kind * self.shape.v_offset, token, 1,
                    <const char *>kv.buf + layer * kv.strides[0] + kind * kv.strides[1],
                    0, kv.strides[2], kv.strides[3], &self.shape,
                )
