"""codec_t: how the rows of one kind are packed and unpacked, nogil."""

from libc.stdint cimport int64_t

from pagealloc.kv.quant_loops cimport load_t, pack_t, store_t, unpack_t

ctypedef struct plain_t:        # values as NumPy has them
    load_t load                 # to float32; NULL: they are
    store_t store               # from float32
    int64_t value_bytes

ctypedef struct codec_t:
    plain_t given               # what rows are packed from
    pack_t pack                 # NULL: rows are stored as they are given
    unpack_t unpack
    int64_t n_values            # of a row
    int64_t block_bytes         # of 32 packed values
    int64_t group               # values that are rotated together; 1: none are
    float norm

ctypedef struct error_t:        # of rows that were looked at
    int64_t n_values
    double squared_error
    double squared
    double largest_error

cdef int fill_plain(plain_t *plain, str name) except -1
cdef int fill_codec(
    codec_t *codec, str given, str stored, int64_t n_values, int64_t group
) except -1
cdef int64_t rotation_group(int64_t head_dim) noexcept
cdef void pack_row(const codec_t *codec, const char *source, char *target) noexcept nogil
cdef void unpack_row(
    const codec_t *codec, const char *source, char *target, const plain_t *wanted
) noexcept nogil
cdef void convert_row(
    const codec_t *codec, const char *source, char *target, const plain_t *wanted
) noexcept nogil
cdef void measure_row(
    const codec_t *codec, const char *source, const char *packed, error_t *error
) noexcept nogil
