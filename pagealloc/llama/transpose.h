/* Transposing matrices of 2- and 4-byte values: 8 x 8 of 16 bits in registers, the rest one by one.
 *
 * Vector extensions of gcc (12) and clang: the same source for SSE2 and NEON.
 */
#ifndef PAGEALLOC_LLAMA_TRANSPOSE_H
#define PAGEALLOC_LLAMA_TRANSPOSE_H

#include <stdint.h>
#include <string.h>

typedef uint16_t pagealloc_eight __attribute__((vector_size(16)));

#define PAGEALLOC_PAIRS_16(a, b, low) \
    ((low) ? __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11) \
           : __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15))

/* Three rounds of interleaving row i with row i + 4 bring column j into register j. */
static inline void pagealloc_interleave(pagealloc_eight out[8], const pagealloc_eight in[8]) {
    for (int i = 0; i < 4; i++) {
        out[2 * i] = PAGEALLOC_PAIRS_16(in[i], in[i + 4], 1);
        out[2 * i + 1] = PAGEALLOC_PAIRS_16(in[i], in[i + 4], 0);
    }
}

static inline void pagealloc_transpose_8x8(
    uint16_t *target, int64_t target_stride, const uint16_t *source, int64_t source_stride
) {
    pagealloc_eight a[8], b[8];
    for (int i = 0; i < 8; i++) memcpy(&a[i], source + i * source_stride, sizeof a[i]);
    pagealloc_interleave(b, a);
    pagealloc_interleave(a, b);
    pagealloc_interleave(b, a);
    for (int i = 0; i < 8; i++) memcpy(target + i * target_stride, &b[i], sizeof b[i]);
}

/* target[column][row] = source[row][column]; strides in values. */
static inline void pagealloc_transpose_16(
    uint16_t *target, int64_t target_stride, const uint16_t *source, int64_t source_stride,
    int64_t n_rows, int64_t n_columns
) {
    int64_t whole_rows = n_rows - n_rows % 8, whole_columns = n_columns - n_columns % 8;
    for (int64_t first = 0; first < whole_rows; first += 32) { /* a cache line of each target row */
        int64_t last = first + 32 < whole_rows ? first + 32 : whole_rows;
        for (int64_t column = 0; column < whole_columns; column += 8) {
            for (int64_t i = column; i < column + 8; i++) /* more streams than hardware follows */
                __builtin_prefetch(target + i * target_stride + last, 1);
            for (int64_t row = first; row < last; row += 8)
                pagealloc_transpose_8x8(
                    target + column * target_stride + row, target_stride,
                    source + row * source_stride + column, source_stride
                );
        }
    }
    for (int64_t row = 0; row < n_rows; row++)
        for (int64_t column = row < whole_rows ? whole_columns : 0; column < n_columns; column++)
            target[column * target_stride + row] = source[row * source_stride + column];
}

static inline void pagealloc_transpose_32(
    uint32_t *target, int64_t target_stride, const uint32_t *source, int64_t source_stride,
    int64_t n_rows, int64_t n_columns
) {
    for (int64_t row = 0; row < n_rows; row += 8)
        for (int64_t column = 0; column < n_columns; column++)
            for (int64_t i = row; i < row + 8 && i < n_rows; i++)
                target[column * target_stride + i] = source[i * source_stride + column];
}

#endif
