# cython: wraparound=True
"""Quantised rows: 8 or 4 bits a value, in ggml's formats.

Purpose
    Choose the loops that suit the processor, and pack and unpack whole rows with them.
Structure
    ::

        quant_loops.pxd --> quant_plain, quant_avx2, quant_avx512    the loops, compiled three times
                                 `--- one of them ---> loops         chosen at import
        row --load--> float32 --rotate--> --pack--> blocks           pack_row
        blocks --unpack--> float32 --rotate--> --store--> row        unpack_row

    A row passes in chunks that stay in the first-level cache.
Invariants
    the bytes are the same whatever loops make them
    a chunk is whole blocks and whole groups: both are powers of two, and divide a row
Locking
    None: what is written here at import is only read from then on.
Units
    Values; bytes where named.
Source
    ggml, ``quantize_row_q8_0_ref``, ``quantize_row_q4_0_ref``.  The rotation: Ashkboos et al.,
    "QuaRot", 2024; a Hadamard matrix spreads an outlier over its head, and is its own inverse.
"""

cimport numpy as np
from cpython.pycapsule cimport PyCapsule_GetPointer
from libc.math cimport fabs, sqrt
from libc.stdint cimport int64_t, uint8_t, uintptr_t
from libc.string cimport memcpy

from pagealloc.kv.quant_loops cimport BLOCK_VALUES, CHUNK_VALUES, loops_t

import importlib

import numpy

from pagealloc.kv.row_formats import FORMATS as _FORMATS
from pagealloc.options import OPTIONS as _OPTIONS
from pagealloc.options import option_value

np.import_array()

cdef extern from * nogil:
    """
    static int pagealloc_simd_level(void)
    {
    #if defined(__x86_64__)
        __builtin_cpu_init();
        if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")
            || !__builtin_cpu_supports("f16c"))
            return 0;
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
            && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") ? 2 : 1;
    #else
        return 0;
    #endif
    }
    """
    int simd_level "pagealloc_simd_level"()

_LEVELS = ("plain", "avx2", "avx512")

cdef const loops_t *loops = NULL


def simd_levels() -> tuple[str, ...]:
    """Return the names of the loops that this processor can run, the fastest last.

    "plain" is what the compiler makes for any processor of the kind: SSE2 on x86-64, NEON on
    aarch64.
    """
    return _LEVELS[: simd_level() + 1]


def _chosen_level() -> str:
    wanted, possible = option_value("simd"), simd_levels()
    if wanted == "auto":
        return possible[-1]
    if wanted not in possible:
        raise ValueError(
            f"{_OPTIONS['simd'].env}={wanted}: this processor can run {', '.join(possible)}"
        )
    return wanted


SIMD_LEVEL: str = _chosen_level()
loops = <const loops_t *>PyCapsule_GetPointer(
    importlib.import_module(f"pagealloc.kv.quant_{SIMD_LEVEL}").LOOPS, "pagealloc.kv.loops"
)


# ---------------------------------------------------------------------------------------------
# Rows

cdef int fill_plain(plain_t *plain, str name) except -1:
    plain.value_bytes = _FORMATS[name].block_bytes
    plain.load, plain.store = NULL, NULL
    if name == "float16":
        plain.load, plain.store = loops.load_half, loops.store_half
    elif name == "bfloat16":
        plain.load, plain.store = loops.load_bfloat, loops.store_bfloat
    return 0


cdef int fill_codec(
    codec_t *codec, str given, str stored, int64_t n_values, int64_t group
) except -1:
    """Rows of the plain type `given`, kept as `stored`; n_values are whole blocks and groups."""
    fill_plain(&codec.given, given)
    codec.pack, codec.unpack = NULL, NULL
    if stored == "q8_0":
        codec.pack, codec.unpack = loops.pack_q8_0, loops.unpack_q8_0
    elif stored == "q4_0":
        codec.pack, codec.unpack = loops.pack_q4_0, loops.unpack_q4_0
    elif stored == "int4":
        codec.pack, codec.unpack = loops.pack_int4, loops.unpack_q4_0
    codec.n_values = n_values
    codec.block_bytes = _FORMATS[stored].block_bytes
    codec.group = group
    codec.norm = <float>(1 / sqrt(<double>group))
    return 0


cdef int64_t rotation_group(int64_t head_dim) noexcept:
    """The largest power of two that divides a head, at most a chunk."""
    return min(head_dim & -head_dim, CHUNK_VALUES)


cdef inline int64_t chunk_of(int64_t n_left) noexcept nogil:
    return n_left if n_left < CHUNK_VALUES else CHUNK_VALUES


cdef inline bint is_aligned(const char *address) noexcept nogil:
    """Whether floats may lie there."""
    return <uintptr_t>address % sizeof(float) == 0


cdef inline void load_values(
    const plain_t *plain, const char *source, float *values, int64_t n
) noexcept nogil:
    if plain.load != NULL:
        plain.load(source, values, n)
    else:
        memcpy(values, source, <size_t>n * sizeof(float))


cdef inline void store_values(
    const plain_t *plain, const float *values, char *target, int64_t n
) noexcept nogil:
    if plain.store != NULL:
        plain.store(values, target, n)
    else:
        memcpy(target, values, <size_t>n * sizeof(float))


cdef void pack_row(const codec_t *codec, const char *source, char *target) noexcept nogil:
    """One row, contiguous, into `stored` bytes."""
    cdef float[CHUNK_VALUES] values
    cdef int64_t first = 0, n
    if codec.pack == NULL:
        memcpy(target, source, <size_t>(codec.n_values * codec.given.value_bytes))
        return
    if codec.given.load == NULL and codec.group == 1 and is_aligned(source):
        codec.pack(<const float *>source, <uint8_t *>target, codec.n_values // BLOCK_VALUES)
        return
    while first < codec.n_values:
        n = chunk_of(codec.n_values - first)
        load_values(&codec.given, source + first * codec.given.value_bytes, values, n)
        if codec.group > 1:
            loops.rotate(values, n, codec.group, codec.norm)
        codec.pack(
            values, <uint8_t *>target + first // BLOCK_VALUES * codec.block_bytes,
            n // BLOCK_VALUES,
        )
        first += n


cdef inline void unpack_chunk(
    const codec_t *codec, const char *source, int64_t first, int64_t n, float *values
) noexcept nogil:
    """Values [first, first + n) of a packed row."""
    codec.unpack(
        <const uint8_t *>source + first // BLOCK_VALUES * codec.block_bytes, values,
        n // BLOCK_VALUES,
    )
    if codec.group > 1:
        loops.rotate(values, n, codec.group, codec.norm)


cdef void unpack_row(
    const codec_t *codec, const char *source, char *target, const plain_t *wanted
) noexcept nogil:
    """One row of `stored` bytes into values of a plain type."""
    cdef float[CHUNK_VALUES] values
    cdef int64_t first = 0, n
    if codec.pack == NULL:
        convert_row(codec, source, target, wanted)
        return
    if wanted.store == NULL and codec.group == 1 and is_aligned(target):
        codec.unpack(<const uint8_t *>source, <float *>target, codec.n_values // BLOCK_VALUES)
        return
    while first < codec.n_values:
        n = chunk_of(codec.n_values - first)
        unpack_chunk(codec, source, first, n, values)
        store_values(wanted, values, target + first * wanted.value_bytes, n)
        first += n


cdef void convert_row(
    const codec_t *codec, const char *source, char *target, const plain_t *wanted
) noexcept nogil:
    """One row as it was given, into values of another plain type."""
    cdef const plain_t *given = &codec.given
    cdef float[CHUNK_VALUES] values
    cdef int64_t first = 0, n
    if given.load == wanted.load:
        memcpy(target, source, <size_t>(codec.n_values * wanted.value_bytes))
        return
    while first < codec.n_values:
        n = chunk_of(codec.n_values - first)
        load_values(given, source + first * given.value_bytes, values, n)
        store_values(wanted, values, target + first * wanted.value_bytes, n)
        first += n


cdef void measure_row(
    const codec_t *codec, const char *source, const char *packed, error_t *error
) noexcept nogil:
    """Add what packing a row, contiguous, made of it."""
    cdef float[2][CHUNK_VALUES] values
    cdef double difference
    cdef int64_t first = 0, n, i
    while first < codec.n_values:
        n = chunk_of(codec.n_values - first)
        load_values(&codec.given, source + first * codec.given.value_bytes, values[0], n)
        unpack_chunk(codec, packed, first, n, values[1])
        for i in range(n):
            difference = fabs(<double>values[1][i] - values[0][i])
            error.squared_error += difference * difference
            error.squared += <double>values[0][i] * values[0][i]
            error.largest_error = max(error.largest_error, difference)
        error.n_values += n
        first += n


# ---------------------------------------------------------------------------------------------
# Arrays

cdef str packed_type(object kind):
    if kind not in _FORMATS or not _FORMATS[kind].is_packed:
        possible = ", ".join([repr(name) for name, each in _FORMATS.items() if each.is_packed])
        raise ValueError(f"kind={kind!r}: {possible} are possible")
    return kind


cdef str plain_type(object dtype, str name):
    """The type of float32, float16 or bfloat16 (of ml_dtypes) values."""
    found = numpy.dtype(dtype).name
    if found not in _FORMATS or _FORMATS[found].is_packed:
        raise TypeError(f"{name}={dtype!r}: float32, float16 and bfloat16 are possible")
    return found


def quantize(rows, kind: str, *, rotate: bool = False) -> np.ndarray:
    """Pack rows as ggml does, byte for byte.

    Parameters
    ----------
    rows : ndarray, shape (..., H, D)
        float32, float16 or bfloat16 (of ml_dtypes).  A block that holds NaN or an infinity reads
        back as NaN throughout.
    kind : {"q8_0", "q4_0", "int4"}
        8 bits a value; 4 bits; or 4 bits with the plain symmetric scale ``max |x| / 7``, whose
        step is one seventh wider.  "int4" for K is a bad choice: SmolLM2's perplexity rises by
        16 %, by 2.6 % if K is rotated, and with "q8_0" by 0.03 % (docs/quant.md).  Nothing uses it
        by default.
    rotate : bool
        Multiply each head by a Hadamard matrix first; block by block where its length is no power
        of two.

    Returns
    -------
    ndarray, shape (..., bytes of a row)
        uint8.

    Raises
    ------
    TypeError, ValueError
        The rows are of another type, or H * D no multiple of 32; or there is no such kind.

    Examples
    --------
    >>> import numpy as np
    >>> from pagealloc.kv import quant
    >>> rows = np.random.default_rng(0).normal(size=(10, 8, 128)).astype(np.float32)
    >>> packed = quant.quantize(rows, "q8_0")
    >>> packed.shape, float(abs(quant.dequantize(packed, "q8_0", (8, 128)) - rows).max()) < 0.02
    ((10, 1088), True)
    """
    cdef codec_t codec
    cdef np.ndarray source, packed
    cdef int64_t i, n_rows
    kind = packed_type(kind)
    array = numpy.asarray(rows)
    given = plain_type(array.dtype, "dtype of rows")
    if array.ndim < 2:
        raise ValueError(f"rows have shape {array.shape}, expected (..., heads, head_dim)")
    n_values, head_dim = check_row(array.shape[-2:])
    fill_codec(&codec, given, kind, n_values, rotation_group(head_dim) if rotate else 1)
    source = numpy.ascontiguousarray(array).view(f"u{array.itemsize}")
    row_bytes = _FORMATS[kind].row_bytes(n_values)
    packed = numpy.empty((*array.shape[:-2], row_bytes), numpy.uint8)
    n_rows = packed.size // row_bytes
    cdef const char *values = <const char *>np.PyArray_DATA(source)
    cdef char *target = <char *>np.PyArray_DATA(packed)
    cdef int64_t given_bytes = codec.n_values * codec.given.value_bytes
    cdef int64_t stored_bytes = row_bytes
    with nogil:
        for i in range(n_rows):
            pack_row(&codec, values + i * given_bytes, target + i * stored_bytes)
    return packed


def dequantize(
    packed, kind: str, shape: tuple[int, int], *, rotate: bool = False, dtype=numpy.float32
) -> np.ndarray:
    """Unpack rows, the inverse of `quantize` but for what was rounded.

    Parameters
    ----------
    packed : ndarray, shape (..., bytes of a row)
        uint8.
    kind : {"q8_0", "q4_0", "int4"}
        As what they were packed.
    shape : (int, int)
        (H, D) of a row.
    rotate : bool
        Whether they were rotated.
    dtype : NumPy dtype
        float32, float16 or bfloat16 (of ml_dtypes): what comes back.

    Returns
    -------
    ndarray, shape (..., H, D)

    Raises
    ------
    TypeError, ValueError
        `packed` is not of bytes, or its rows are not as long as `shape` says; or `quantize` would
        raise.
    """
    cdef codec_t codec
    cdef plain_t wanted
    cdef np.ndarray source, values
    cdef int64_t i, n_rows
    kind = packed_type(kind)
    name = plain_type(dtype, "dtype")
    n_values, head_dim = check_row(shape)
    array = numpy.ascontiguousarray(packed)
    row_bytes = _FORMATS[kind].row_bytes(n_values)
    if array.dtype != numpy.uint8:
        raise TypeError(f"packed must be an array of uint8, not {array.dtype}")
    if array.ndim < 1 or array.shape[-1] != row_bytes:
        raise ValueError(
            f"packed has shape {array.shape}, expected (..., {row_bytes}) for rows of {shape}"
        )
    fill_codec(&codec, "float32", kind, n_values, rotation_group(head_dim) if rotate else 1)
    fill_plain(&wanted, name)
    result = numpy.empty((*array.shape[:-1], *shape), dtype)
    source, values = array, result.view(f"u{result.itemsize}")
    n_rows = array.size // row_bytes
    cdef const char *data = <const char *>np.PyArray_DATA(source)
    cdef char *target = <char *>np.PyArray_DATA(values)
    cdef int64_t stored_bytes = row_bytes
    cdef int64_t wanted_bytes = codec.n_values * wanted.value_bytes
    with nogil:
        for i in range(n_rows):
            unpack_row(&codec, data + i * stored_bytes, target + i * wanted_bytes, &wanted)
    return result


cdef tuple check_row(object shape):
    """Return values of a row and of a head, if they are whole blocks."""
    n_heads, head_dim = shape
    if n_heads < 1 or head_dim < 1 or n_heads * head_dim % BLOCK_VALUES:
        raise ValueError(
            f"rows of {n_heads} heads of {head_dim} values: a multiple of {BLOCK_VALUES} values is "
            "possible"
        )
    return n_heads * head_dim, head_dim
