"""RowTable: a layout's tables in C, for the loops that touch rows.

Purpose
    The arithmetic of `KVLayout` once more, where it must cost nanoseconds: `row_place` and
    `check_access` are inlined into whoever cimports them.
Structure
    KVLayout.layers --> kinds[2 * layer + kv], each with base, stride and shape of its rows
Invariants
    row_place(table, kinds[2 * layer + kv], token) == layout.row_offset(layer, token, kv)
Locking
    Read-only once made.
Units
    Bytes, unless the name says tokens.
"""

from libc.stdint cimport int64_t
from libc.stdlib cimport calloc, free

from pagealloc import page_size_bytes
from pagealloc.errors import PageBoundaryError


cdef class RowTable:
    """The C tables of one layout.

    Parameters
    ----------
    layout : KVLayout
    """

    def __cinit__(self, layout):
        cdef kind_t *kind
        cdef table_t *table = &self.table
        self.layout = layout
        self.is_uniform = layout.is_uniform
        table.n_layers = layout.n_layers
        table.max_tokens = layout.max_tokens
        table.page_shift = layout.page_bytes.bit_length() - 1
        table.block_shift = -1
        if layout.order == "block":
            table.block_tokens = layout.block_tokens
            table.block_bytes = layout.block_bytes
            if layout.block_tokens & (layout.block_tokens - 1) == 0:
                table.block_shift = layout.block_tokens.bit_length() - 1
        table.kinds = <kind_t *>calloc(<size_t>(2 * table.n_layers), sizeof(kind_t))
        if table.kinds == NULL:
            raise MemoryError("no memory for a layout's tables")
        for kv in range(2):
            self.type_numbers[kv] = layout.storage_dtypes[kv].num
        for layer, rows in enumerate(layout.layers):
            for kv in range(2):
                kind = &table.kinds[2 * layer + kv]
                kind.base = rows.base + (rows.v_offset if kv else 0)
                kind.stride = rows.v_stride if kv else rows.k_stride
                kind.row_bytes = layout.row_bytes(layer, kv)
                kind.n_heads, kind.head_dim = layout.row_shape(layer, kv)
                kind.item_bytes = layout.storage_dtypes[kv].itemsize

    def __dealloc__(self):
        free(self.table.kinds)

    def place(self, layer: int, token: int, kv: int) -> int:
        """Return the offset of a row, unchecked, as ``layout.row_offset`` does."""
        return row_place(&self.table, &self.table.kinds[2 * layer + kv], token)

    def access(self, layer: int, start: int, end: int, kv: int, n_tokens: int) -> tuple:
        """Return (offset, end, first page, last page) of tokens [start, end), start < end.

        Raises
        ------
        PageBoundaryError
            The layer does not exist, or the tokens lie outside its `n_tokens` rows.
        """
        cdef access_t access
        if check_access(&self.table, layer, start, end, kv, n_tokens, &access):
            raise PageBoundaryError(
                f"layer {layer}, tokens {start} to {end}: outside the {n_tokens} committed rows"
            )
        return access.offset, access.end, access.first_page, access.last_page

    def __reduce__(self):
        raise TypeError("a RowTable cannot be pickled or copied")


def is_page_safe(offset: int, nbytes: int, page_bytes: int | None = None) -> bool:
    """Return True if an access of `nbytes` bytes at `offset` stays inside one page.

    Parameters
    ----------
    offset : int
        Where it starts, in bytes from a page's start: an offset in a window, or an address.
    nbytes : int
        Its length.
    page_bytes : int, optional
        A power of two; the machine's page by default.

    Raises
    ------
    ValueError
        A number is negative, or `page_bytes` no power of two.
    """
    cdef int64_t page = page_size_bytes() if page_bytes is None else page_bytes
    if offset < 0 or nbytes < 0:
        raise ValueError(f"offset={offset}, nbytes={nbytes}: neither may be negative")
    if page < 1 or page & (page - 1):
        raise ValueError(f"page_bytes={page}: must be a power of two")
    if nbytes == 0:
        return True
    return page_safe(offset, nbytes, page)
