"""The loops over packed rows; a module that cimports them compiles them for its own processor.

Blocks of 32 values, as ggml lays them out (``ggml-common.h``): a float16 scale d, then

    q8_0    32 signed bytes q                     value = q * d                34 bytes
    q4_0    16 bytes; nibbles of i and i + 16     value = (nibble - 8) * d     18 bytes
    int4    as q4_0, with another choice of d

    q8_0    d = max |x| / 127                     q = x / d to nearest, halves away from zero
    q4_0    d = x of the largest |x| / -8         nibble = floor(x / d + 8.5), at most 15
    int4    d = max |x| / 7                       nibble = 8 + x / d to nearest, as q8_0

A block that holds NaN or an infinity gets NaN for its scale: all of it reads back as NaN.  All
else are the bits of ggml's reference functions, which rests on IEEE arithmetic without contraction
(-ffp-contract=off, which -std=c11 implies).

The loops are written for the vectoriser: selections instead of branches, 32 steps of one kind, and
nibbles put together in words of 64 bits.
"""

from libc.math cimport copysignf
from libc.stdint cimport int8_t, int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

cdef extern from * nogil:
    """
    #include <stdint.h>
    #include <string.h>
    #if defined(__F16C__)
    #include <immintrin.h>
    #endif

    static inline int32_t pagealloc_bits(float x)
    { int32_t bits; memcpy(&bits, &x, sizeof bits); return bits; }

    static inline float pagealloc_float(int32_t bits)
    { float x; memcpy(&x, &bits, sizeof x); return x; }

    static inline float pagealloc_from_half(uint16_t half)
    {
    #if defined(__F16C__)
        return _cvtsh_ss(half);
    #endif
        int32_t magnitude = half & 0x7fff;
        int32_t sign = (int32_t)((uint32_t)(half & 0x8000) << 16);
        int32_t normal = (magnitude << 13) + (112 << 23);
        int32_t special = normal + (112 << 23);
        int32_t subnormal = pagealloc_bits((float)magnitude * 0x1p-24f);
        int32_t bits = magnitude >= 0x7c00 ? special : normal;
        return pagealloc_float((magnitude < 0x400 ? subnormal : bits) | sign);
    }

    static inline uint16_t pagealloc_to_half(float x)
    {
    #if defined(__F16C__)
        return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
    #endif
        int32_t bits = pagealloc_bits(x);
        int32_t magnitude = bits & 0x7fffffff;
        int32_t normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112 << 23)) >> 13;
        /* 0.5 has the unit of a subnormal half in its last place: the sum rounds to it */
        int32_t subnormal =
            pagealloc_bits(pagealloc_float(magnitude) + 0.5f) - pagealloc_bits(0.5f);
        int32_t half = magnitude < 0x38800000 ? subnormal : normal;
        half = magnitude >= 0x477ff000 ? 0x7c00 : half;
        half = magnitude > 0x7f800000 ? 0x7e00 : half;
        return (uint16_t)(half | ((bits >> 16) & 0x8000));
    }

    static inline uint16_t pagealloc_to_bfloat(float x)
    {
        uint32_t bits = (uint32_t)pagealloc_bits(x);
        uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded);
    }

    static inline void pagealloc_from_halves(const uint16_t *halves, float *values, int64_t n)
    {
        int64_t i = 0;
    #if defined(__F16C__)
        for (; i + 8 <= n; i += 8)
            _mm256_storeu_ps(
                values + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(halves + i))));
    #endif
        for (; i < n; i++)
            values[i] = pagealloc_from_half(halves[i]);
    }

    static inline void pagealloc_to_halves(const float *values, uint16_t *halves, int64_t n)
    {
        int64_t i = 0;
    #if defined(__F16C__)
        for (; i + 8 <= n; i += 8)
            _mm_storeu_si128(
                (__m128i *)(halves + i),
                _mm256_cvtps_ph(_mm256_loadu_ps(values + i), _MM_FROUND_TO_NEAREST_INT));
    #endif
        for (; i < n; i++)
            halves[i] = pagealloc_to_half(values[i]);
    }
    """
    int32_t bits_of "pagealloc_bits"(float x)
    float float_of "pagealloc_float"(int32_t bits)
    float from_half "pagealloc_from_half"(uint16_t half)
    uint16_t to_half "pagealloc_to_half"(float x)
    uint16_t to_bfloat "pagealloc_to_bfloat"(float x)
    void from_halves "pagealloc_from_halves"(const uint16_t *halves, float *values, int64_t n)
    void to_halves "pagealloc_to_halves"(const float *values, uint16_t *halves, int64_t n)

cdef enum:
    BLOCK_VALUES = 32
    HALF_BLOCK = 16
    CHUNK_BLOCKS = 16
    CHUNK_VALUES = 512      # and the longest group of a rotation
    Q8_BYTES = 34
    Q4_BYTES = 18
    INFINITY_BITS = 0x7f800000
    SIGN_BIT = -0x80000000
    MAGNITUDE_BITS = 0x7fffffff
    NAN_HALF = 0x7e00


cdef inline int32_t largest_magnitude(const float *values) noexcept nogil:
    """Of a block: as bits, which order as the numbers do and put NaN above infinity."""
    cdef int32_t largest = 0, magnitude
    cdef int i
    for i in range(BLOCK_VALUES):
        magnitude = bits_of(values[i]) & MAGNITUDE_BITS
        largest = magnitude if magnitude > largest else largest
    return largest


cdef inline float inverse_of(float scale) noexcept nogil:
    """1 / scale; 0 where that is no number, because all of the block is next to nothing."""
    cdef float inverse = <float>1 / scale if scale != 0 else 0
    return inverse if (bits_of(inverse) & MAGNITUDE_BITS) < INFINITY_BITS else 0


cdef inline void pack_nan(uint8_t *target, size_t block_bytes) noexcept nogil:
    cdef uint16_t half = NAN_HALF
    memset(target, 0, block_bytes)
    memcpy(target, &half, 2)


cdef inline void pack_q8_0(const float *values, uint8_t *target, int64_t n_blocks) noexcept nogil:
    cdef int32_t[BLOCK_VALUES] wide
    cdef int8_t[BLOCK_VALUES] quants
    cdef int32_t largest
    cdef float scale, inverse, value
    cdef uint16_t half
    cdef int64_t _block
    cdef int i
    for _block in range(n_blocks):
        largest = largest_magnitude(values)
        if largest < INFINITY_BITS:
            scale = float_of(largest) / <float>127
            inverse = inverse_of(scale)
            half = to_half(scale)
            memcpy(target, &half, 2)
            for i in range(BLOCK_VALUES):
                value = values[i] * inverse
                # roundf: 0.5 less one unit in the last place carries halves away from zero
                wide[i] = <int32_t>(value + copysignf(<float>0.49999997, value))
            for i in range(BLOCK_VALUES):
                quants[i] = <int8_t>wide[i]
            memcpy(target + 2, quants, BLOCK_VALUES)
        else:
            pack_nan(target, Q8_BYTES)
        values += BLOCK_VALUES
        target += Q8_BYTES


cdef inline void pack_nibbles(const float *values, uint8_t *target, float scale) noexcept nogil:
    """A block of nibbles floor(value / scale + 8.5), at most 15."""
    cdef uint8_t[BLOCK_VALUES] quants
    cdef uint64_t[4] words
    cdef float inverse = inverse_of(scale)
    cdef float bias = <float>8.5 if inverse != 0 or scale == 0 else 0   # ggml: 0 times 1 / 0 is 0
    cdef uint16_t half = to_half(scale)
    cdef int32_t quant
    cdef int i
    memcpy(target, &half, 2)
    for i in range(BLOCK_VALUES):
        quant = <int32_t>(values[i] * inverse + bias)
        quants[i] = <uint8_t>(quant if quant < 15 else 15)
    memcpy(words, quants, BLOCK_VALUES)
    words[0], words[1] = words[0] | words[2] << 4, words[1] | words[3] << 4
    memcpy(target + 2, words, HALF_BLOCK)


cdef inline bint is_minus_first(const float *values, int32_t largest) noexcept nogil:
    """True if the first of the largest values of a block is negative; no zero is."""
    cdef int32_t bits, plus = 0, minus = 0
    cdef int i
    for i in range(BLOCK_VALUES):
        bits = bits_of(values[i])
        plus |= 1 if bits == largest else 0
        minus |= 1 if bits == (largest | SIGN_BIT) else 0
    if plus and minus:
        i = 0
        while (bits_of(values[i]) & MAGNITUDE_BITS) != largest:
            i += 1
        minus = bits_of(values[i]) != largest
    return minus and largest != 0


cdef inline void pack_q4_0(const float *values, uint8_t *target, int64_t n_blocks) noexcept nogil:
    cdef int32_t largest
    cdef float scale
    cdef int64_t _block
    for _block in range(n_blocks):
        largest = largest_magnitude(values)
        if largest < INFINITY_BITS:
            scale = float_of(largest) * <float>0.125
            pack_nibbles(values, target, scale if is_minus_first(values, largest) else -scale)
        else:
            pack_nan(target, Q4_BYTES)
        values += BLOCK_VALUES
        target += Q4_BYTES


cdef inline void pack_int4(const float *values, uint8_t *target, int64_t n_blocks) noexcept nogil:
    cdef int32_t largest
    cdef int64_t _block
    for _block in range(n_blocks):
        largest = largest_magnitude(values)
        if largest < INFINITY_BITS:
            pack_nibbles(values, target, float_of(largest) / <float>7)
        else:
            pack_nan(target, Q4_BYTES)
        values += BLOCK_VALUES
        target += Q4_BYTES


cdef inline void unpack_q8_0(
    const uint8_t *source, float *values, int64_t n_blocks
) noexcept nogil:
    cdef const int8_t *quants
    cdef float scale
    cdef uint16_t half
    cdef int64_t _block
    cdef int i
    for _block in range(n_blocks):
        memcpy(&half, source, 2)
        scale = from_half(half)
        quants = <const int8_t *>source + 2
        for i in range(BLOCK_VALUES):
            values[i] = quants[i] * scale
        values += BLOCK_VALUES
        source += Q8_BYTES


cdef inline void unpack_q4_0(
    const uint8_t *source, float *values, int64_t n_blocks
) noexcept nogil:
    """In two goes: a load of bytes that were just stored as words would have to wait for them."""
    cdef uint8_t[CHUNK_VALUES] quants
    cdef const uint8_t *nibbles
    cdef float scale
    cdef uint16_t half
    cdef int64_t block, n_chunk
    cdef int i
    while n_blocks > 0:
        n_chunk = n_blocks if n_blocks < CHUNK_BLOCKS else CHUNK_BLOCKS
        for block in range(n_chunk):
            nibbles = source + block * Q4_BYTES + 2
            for i in range(HALF_BLOCK):
                quants[block * BLOCK_VALUES + i] = nibbles[i] & 15
            for i in range(HALF_BLOCK):
                quants[block * BLOCK_VALUES + HALF_BLOCK + i] = nibbles[i] >> 4
        for block in range(n_chunk):
            memcpy(&half, source + block * Q4_BYTES, 2)
            scale = from_half(half)
            for i in range(BLOCK_VALUES):
                values[i] = (<int32_t>quants[block * BLOCK_VALUES + i] - 8) * scale
            values += BLOCK_VALUES
        source += n_chunk * Q4_BYTES
        n_blocks -= n_chunk


cdef inline void rotate(float *values, int64_t n, int64_t group, float norm) noexcept nogil:
    """Multiply each group of values by the Walsh-Hadamard matrix and by `norm`, in place.

    Pease's form of the fast transform: every step adds and subtracts the two halves and interleaves
    what comes of it, so that all loads are of neighbours.
    """
    cdef float[2][CHUNK_VALUES] buffers
    cdef const float *source
    cdef float *target
    cdef int64_t half = group // 2, _number, step, i
    cdef int turn
    for _number in range(n // group):
        source, step, turn = values, group, 0
        while step > 1:
            target = buffers[turn]
            for i in range(half):
                target[2 * i] = source[i] + source[half + i]
                target[2 * i + 1] = source[i] - source[half + i]
            source, step, turn = target, step // 2, 1 - turn
        for i in range(group):
            values[i] = source[i] * norm
        values += group


cdef inline void load_half(const char *source, float *values, int64_t n) noexcept nogil:
    from_halves(<const uint16_t *>source, values, n)


cdef inline void store_half(const float *values, char *target, int64_t n) noexcept nogil:
    to_halves(values, <uint16_t *>target, n)


cdef inline void load_bfloat(const char *source, float *values, int64_t n) noexcept nogil:
    cdef const uint16_t *bits = <const uint16_t *>source
    cdef int64_t i
    for i in range(n):
        values[i] = float_of(<int32_t>(<uint32_t>bits[i] << 16))


cdef inline void store_bfloat(const float *values, char *target, int64_t n) noexcept nogil:
    cdef uint16_t *bits = <uint16_t *>target
    cdef int64_t i
    for i in range(n):
        bits[i] = to_bfloat(values[i])


ctypedef void (*pack_t)(const float *values, uint8_t *target, int64_t n_blocks) noexcept nogil
ctypedef void (*unpack_t)(const uint8_t *source, float *values, int64_t n_blocks) noexcept nogil
ctypedef void (*load_t)(const char *source, float *values, int64_t n) noexcept nogil
ctypedef void (*store_t)(const float *values, char *target, int64_t n) noexcept nogil
ctypedef void (*rotate_t)(float *values, int64_t n, int64_t group, float norm) noexcept nogil

ctypedef struct loops_t:        # of one module, for one processor
    pack_t pack_q8_0
    pack_t pack_q4_0
    pack_t pack_int4
    unpack_t unpack_q8_0
    unpack_t unpack_q4_0        # and int4
    load_t load_half
    load_t load_bfloat
    store_t store_half
    store_t store_bfloat
    rotate_t rotate


cdef inline void fill(loops_t *loops) noexcept:
    loops.pack_q8_0, loops.pack_q4_0, loops.pack_int4 = pack_q8_0, pack_q4_0, pack_int4
    loops.unpack_q8_0, loops.unpack_q4_0 = unpack_q8_0, unpack_q4_0
    loops.load_half, loops.load_bfloat = load_half, load_bfloat
    loops.store_half, loops.store_bfloat = store_half, store_bfloat
    loops.rotate = rotate
