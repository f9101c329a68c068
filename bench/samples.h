/* Exact samples of latencies.
 *
 * Purpose: keep every sample of a long run without rounding any, and answer percentiles.
 * Structure: a count for each whole nanosecond below 2^20 (the clock knows no smaller unit), and a
 *     list of the few values above.  Counting happens after the measured loop, from a plain array
 *     that it writes one after another.
 * Locking: none; one thread.
 * Units: nanoseconds.
 */
#ifndef BENCH_SAMPLES_H
#define BENCH_SAMPLES_H
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { COUNTED_NS = 1 << 20, MAX_LONG = 1 << 22 };
enum { BINS_PER_OCTAVE = 6, MAX_BINS = 33 * BINS_PER_OCTAVE };

typedef struct {
    uint64_t *counts; /* (COUNTED_NS): how many samples took exactly so many ns */
    uint32_t *longer; /* (MAX_LONG): the samples of COUNTED_NS and above, in any order */
    uint64_t n, n_longer;
} samples;

/* Memory of the driver's own, touched, past the allocator that is measured. */
static void *own_memory(size_t nbytes)
{
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE;
    void *memory = mmap(NULL, nbytes, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (memory == MAP_FAILED) {
        perror("the benchmark's own memory");
        exit(3);
    }
    return memory;
}

static void samples_clear(samples *s)
{
    if (!s->counts) {
        s->counts = own_memory(COUNTED_NS * sizeof *s->counts);
        s->longer = own_memory(MAX_LONG * sizeof *s->longer);
    } else if (s->n) {
        memset(s->counts, 0, COUNTED_NS * sizeof *s->counts);
    }
    s->n = s->n_longer = 0;
}

/* 0, or -1: too many long ones to keep them all. */
static int samples_add(samples *s, const uint32_t *ns, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        if (ns[i] < COUNTED_NS)
            s->counts[ns[i]]++;
        else if (s->n_longer < MAX_LONG)
            s->longer[s->n_longer++] = ns[i];
        else
            return -1;
    }
    s->n += n;
    return 0;
}

static int by_value(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

/* Nearest rank: the smallest sample that at least `share` of all do not exceed. */
static uint32_t samples_percentile(samples *s, double share)
{
    uint64_t rank = (uint64_t)ceil(share * (double)s->n), seen = 0;
    if (s->n == 0)
        return 0;
    rank = rank < 1 ? 1 : rank;
    for (uint32_t ns = 0; ns < COUNTED_NS; ns++)
        if ((seen += s->counts[ns]) >= rank)
            return ns;
    qsort(s->longer, s->n_longer, sizeof *s->longer, by_value);
    return s->longer[rank - seen - 1];
}

static int bin_of(uint32_t ns)
{
    return ns < 2 ? 0 : (int)(log2((double)ns) * BINS_PER_OCTAVE);
}

/* How many samples lie in each bin of a picture; figures never come from these. */
static void samples_bins(const samples *s, uint64_t bins[MAX_BINS])
{
    memset(bins, 0, MAX_BINS * sizeof *bins);
    for (uint32_t ns = 0; ns < COUNTED_NS; ns++)
        if (s->counts[ns])
            bins[bin_of(ns)] += s->counts[ns];
    for (uint64_t i = 0; i < s->n_longer; i++)
        bins[bin_of(s->longer[i])]++;
}
#endif
