"""RowCodecs: how the rows of each layer are packed; one table a cache.

Structure
    layout (as given), layout (as stored), rotate --> codecs[2 * layer + kv]
Locking
    Read-only once made.
"""

from libc.stdint cimport int64_t
from libc.stdlib cimport calloc, free

from pagealloc.kv.quant cimport (
    codec_t,
    convert_row,
    fill_codec,
    plain_t,
    rotation_group,
    unpack_row,
)
from pagealloc.kv.row_table cimport row_place, table_t


cdef void convert_rows(
    const codec_t *codec, const table_t *table, const char *window, int64_t kind, int64_t start,
    int64_t end, int64_t ring_tokens, char *target, const plain_t *wanted
) noexcept nogil:
    """Tokens [start, end) of rows that are stored as given, to contiguous memory."""
    cdef int64_t token, slot
    for token in range(start, end):
        slot = token if ring_tokens == 0 else token % ring_tokens
        convert_row(codec, window + row_place(table, &table.kinds[kind], slot), target, wanted)
        target += codec.n_values * wanted.value_bytes


cdef void unpack_rows(
    const codec_t *codec, const table_t *table, const char *window, int64_t kind, int64_t start,
    int64_t end, char *target, const plain_t *wanted
) noexcept nogil:
    """Tokens [start, end) of rows that are stored otherwise."""
    cdef int64_t token
    for token in range(start, end):
        unpack_row(codec, window + row_place(table, &table.kinds[kind], token), target, wanted)
        target += codec.n_values * wanted.value_bytes


cdef class RowCodecs:
    """The codecs of one cache.

    Parameters
    ----------
    given, stored : KVLayout
        Layouts of the same shape: of the rows that come, and of those that are kept.
    rotate : str
        Which of them are rotated before they are packed: any of the letters k and v.
    """

    def __cinit__(self, given, stored, rotate):
        cdef int64_t group, layer, kv
        self.codecs = <codec_t *>calloc(<size_t>(2 * given.n_layers), sizeof(codec_t))
        if self.codecs == NULL:
            raise MemoryError("no memory for a cache's tables")
        for layer in range(given.n_layers):
            for kv in range(2):
                n_heads, head_dim = given.head_shape(layer, kv)
                group = rotation_group(head_dim) if "kv"[kv] in rotate else 1
                fill_codec(
                    &self.codecs[2 * layer + kv], given.formats[kv].name, stored.formats[kv].name,
                    n_heads * head_dim, group,
                )

    def __dealloc__(self):
        free(self.codecs)

    def __reduce__(self):
        raise TypeError("a RowCodecs cannot be pickled or copied")
