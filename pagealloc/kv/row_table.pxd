"""A layout's tables in C, and the check of every access against its rows and pages, nogil.

Offsets are bytes from the window's start; `kv` is 0 for K and 1 for V.
"""

cimport cython
from libc.stdint cimport int64_t

cdef enum:
    ACCESS_LAYER = -1       # there is no such layer
    ACCESS_TOKENS = -2      # tokens outside the committed rows

ctypedef struct kind_t:     # the K rows of a layer, or its V rows
    int64_t base            # offset of the first row, in the window or in its KV block
    int64_t stride          # way to the next token's row
    int64_t row_bytes
    int64_t n_heads
    int64_t head_dim
    int64_t item_bytes

ctypedef struct table_t:
    int64_t n_layers
    int64_t max_tokens
    int64_t page_shift      # log2 of the layout's page_bytes
    int64_t block_tokens    # 0 in layer-major orders
    int64_t block_shift     # log2(block_tokens), -1 if that is no power of two
    int64_t block_bytes
    kind_t *kinds           # 2 a layer: K, V

ctypedef struct access_t:   # the bytes from an access's first row to the end of its last
    int64_t offset
    int64_t end
    int64_t first_page
    int64_t last_page


cdef inline bint page_safe(int64_t offset, int64_t nbytes, int64_t page_bytes) noexcept nogil:
    """True if the bytes lie in one page; `page_bytes` is a power of two."""
    return nbytes <= page_bytes and ((offset ^ (offset + nbytes - 1)) & -page_bytes) == 0


cdef inline int64_t row_place(
    const table_t *table, const kind_t *kind, int64_t token
) noexcept nogil:
    """Offset of a row."""
    cdef int64_t block
    if table.block_tokens == 0:
        return kind.base + token * kind.stride
    if table.block_shift >= 0:
        block = token >> table.block_shift
        token &= table.block_tokens - 1
    else:
        block = token // table.block_tokens
        token -= block * table.block_tokens
    return kind.base + block * table.block_bytes + token * kind.stride


cdef inline int check_access(
    const table_t *table, int64_t layer, int64_t start, int64_t end, int64_t kv,
    int64_t n_tokens, access_t *access
) noexcept nogil:
    """Resolve tokens [start, end) of a layer that holds `n_tokens` to bytes and pages, or a code.

    `start` < `end`; in block order the bytes between blocks are part of the access.
    """
    cdef const kind_t *kind
    if layer < 0 or layer >= table.n_layers:
        return ACCESS_LAYER
    if start < 0 or start >= end or end > n_tokens:
        return ACCESS_TOKENS
    kind = &table.kinds[2 * layer + kv]
    access.offset = row_place(table, kind, start)
    access.end = row_place(table, kind, end - 1) + kind.row_bytes
    access.first_page = access.offset >> table.page_shift
    access.last_page = (access.end - 1) >> table.page_shift
    return 0


@cython.final
cdef class RowTable:
    cdef table_t table
    cdef readonly object layout
    cdef readonly bint is_uniform
    cdef int[2] type_numbers
