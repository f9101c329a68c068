"""RowCodecs, for rooms that pack and unpack rows.

`kind` is 2 * layer + kv.
"""

from libc.stdint cimport int64_t

from pagealloc.kv.quant cimport codec_t, plain_t
from pagealloc.kv.row_table cimport table_t

cdef void convert_rows(
    const codec_t *codec, const table_t *table, const char *window, int64_t kind, int64_t start,
    int64_t end, int64_t ring_tokens, char *target, const plain_t *wanted
) noexcept nogil
cdef void unpack_rows(
    const codec_t *codec, const table_t *table, const char *window, int64_t kind, int64_t start,
    int64_t end, char *target, const plain_t *wanted
) noexcept nogil


cdef class RowCodecs:
    cdef codec_t *codecs        # 2 a layer: K, V
