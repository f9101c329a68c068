/* What the works are made of: taking and giving back a block, the clock, random choices.
 *
 * Purpose: hide whose allocator it is: pagealloc's C API with -DBENCH_OURS, else malloc's.
 * Invariants: a work uses the allocator through take() and give() only; its own memory is static or
 *     mapped, so that an allocator sees nothing but the work.
 * Locking: none.
 * Units: nanoseconds of CLOCK_MONOTONIC, never corrected for the clock's own cost; bytes.
 */
#ifndef BENCH_BLOCKS_H
#define BENCH_BLOCKS_H
#ifdef BENCH_OURS
#include <Python.h>
#include "pagealloc.h"
#endif
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <time.h>

static size_t page_bytes;

#ifdef BENCH_OURS
static const pagealloc_api *api;
static pagealloc_heap *heap;

static inline void *take(size_t nbytes, size_t align_bytes)
{
    return api->alloc(heap, nbytes, align_bytes);
}

static inline void give(void *block)
{
    api->free(heap, block);
}
#else
static inline void *take(size_t nbytes, size_t align_bytes)
{
    void *block;
    return posix_memalign(&block, align_bytes ? align_bytes : page_bytes, nbytes) ? NULL : block;
}

static inline void give(void *block)
{
    free(block);
}
#endif

/* For what is called with constants, and shall be compiled for each of them. */
#define INLINED static inline __attribute__((always_inline))

/* The compiler must believe that someone looks at the block, or it drops the pair of calls. */
#define KEEP(block) __asm__ volatile("" : "+r"(block) : : "memory")

static inline int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static int64_t minor_faults(void)
{
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return usage.ru_minflt;
}

static uint64_t random_state;

static inline uint32_t random_below(uint32_t n) /* xorshift64* */
{
    random_state ^= random_state >> 12;
    random_state ^= random_state << 25;
    random_state ^= random_state >> 27;
    return (uint32_t)(((random_state * 0x2545F4914F6CDD1Dull >> 32) * n) >> 32);
}

static void touch_pages(void *block, size_t nbytes)
{
    for (size_t offset = 0; offset < nbytes; offset += page_bytes)
        ((volatile char *)block)[offset] = 1;
}

typedef struct {
    double ns; /* per operation; negative: refused */
    int64_t n, faults;
} result;

static const result refused = {-1, 0, 0};
#endif
