/* The works of pairs: a block allocated for each that is freed, by one thread or by two.
 *
 * Purpose: hot, random live blocks, cross-thread free.
 * Structure: timed_pairs runs 256 pairs between two looks at the clock.
 * Invariants: after each work no block is live.
 * Locking: the ring between the two threads has one writer for each of its two counts.
 * Units: nanoseconds, bytes.
 */
#ifndef BENCH_PAIRS_H
#define BENCH_PAIRS_H
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <string.h>
#include "blocks.h"

/* --- hot: allocate and free, one block at a time --- */

static int hot_pairs(size_t nbytes, size_t align_bytes, int n)
{
    for (int i = 0; i < n; i++) {
        void *block = take(nbytes, align_bytes);
        if (!block)
            return -1;
        KEEP(block);
        give(block);
    }
    return 0;
}

/* Exactly `n` pairs, in a function of its own: what callgrind is told to count. */
__attribute__((noinline, noclone)) static int counted_pairs(size_t nbytes, size_t align_bytes, int n)
{
    return hot_pairs(nbytes, align_bytes, n);
}

/* --- random: free one of 1,000 live blocks, allocate anew --- */

enum { N_LIVE = 1000, N_CHOICES = 1 << 13, PAIRS_A_LOOK = 256 };
static void *live[N_LIVE];
static uint16_t choices[N_CHOICES];
static unsigned next_choice;

static int random_pairs(size_t nbytes, size_t align_bytes, int n)
{
    for (int i = 0; i < n; i++) {
        void **place = &live[choices[next_choice++ % N_CHOICES]];
        give(*place);
        *place = take(nbytes, align_bytes);
        if (!*place)
            return -1;
        KEEP(*place);
    }
    return 0;
}

static bool fill_live(size_t nbytes, size_t align_bytes)
{
    for (int i = 0; i < N_CHOICES; i++)
        choices[i] = (uint16_t)random_below(N_LIVE);
    bool had_all = true;
    for (int i = 0; i < N_LIVE; i++)
        had_all &= (live[i] = take(nbytes, align_bytes)) != NULL;
    return had_all;
}

static void empty_live(void)
{
    for (int i = 0; i < N_LIVE; i++)
        if (live[i])
            give(live[i]);
    memset(live, 0, sizeof live);
}

typedef int (*pairs)(size_t, size_t, int);

INLINED result timed_pairs(pairs run, size_t nbytes, size_t align_bytes, int64_t min_ns)
{
    int64_t n = 0, start = now_ns(), end;
    do {
        if (run(nbytes, align_bytes, PAIRS_A_LOOK) != 0)
            return refused;
        n += PAIRS_A_LOOK;
        end = now_ns();
    } while (end - start < min_ns);
    return (result){(double)(end - start) / (double)n, n, 0};
}

static result measure_hot(size_t nbytes, size_t align_bytes, int64_t min_ns)
{
    result warm = timed_pairs(hot_pairs, nbytes, align_bytes, min_ns / 4);
    return warm.ns < 0 ? refused : timed_pairs(hot_pairs, nbytes, align_bytes, min_ns);
}

static result measure_random(size_t nbytes, size_t align_bytes, int64_t min_ns)
{
    result found = refused;
    if (fill_live(nbytes, align_bytes) &&
        timed_pairs(random_pairs, nbytes, align_bytes, min_ns / 4).ns >= 0)
        found = timed_pairs(random_pairs, nbytes, align_bytes, min_ns);
    empty_live();
    return found;
}

/* --- cross: one thread allocates, another frees, a sequence's blocks at a time ---
 *
 * A batch is what a sequence of 1,024 tokens holds.  An engine admits requests in one thread and
 * retires them in another; a ring of 8 batches lies between.  Both wait by spinning, and then by
 * yielding.  Each has a core of its own, if there are two: where the kernel puts both on one, it is
 * another work, in which nobody ever meets anybody. */

enum { BATCH_BLOCKS = 64, RING = 8, WARM_BATCHES = 64, BATCHES_A_LOOK = 16 };
static void *ring[RING][BATCH_BLOCKS];
static _Alignas(64) atomic_long n_sent;
static _Alignas(64) atomic_long n_freed;
static atomic_bool stop_freeing;

static inline void wait_a_little(int *tries)
{
    if (++*tries < 1000) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    } else {
        sched_yield();
    }
}

static void *free_batches(void *unused)
{
    for (long freed = 0;; freed++) {
        for (int tries = 0; atomic_load_explicit(&n_sent, memory_order_acquire) == freed;) {
            if (atomic_load(&stop_freeing) && atomic_load(&n_sent) == freed)
                return unused;
            wait_a_little(&tries);
        }
        for (int i = 0; i < BATCH_BLOCKS; i++)
            give(ring[freed % RING][i]);
        atomic_store_explicit(&n_freed, freed + 1, memory_order_release);
    }
}

static int send_batches(size_t nbytes, int n)
{
    for (int i = 0; i < n; i++) {
        long sent = atomic_load_explicit(&n_sent, memory_order_relaxed);
        for (int tries = 0; sent - atomic_load_explicit(&n_freed, memory_order_acquire) >= RING;)
            wait_a_little(&tries);
        for (int j = 0; j < BATCH_BLOCKS; j++) {
            void *block = take(nbytes, 0);
            if (!block) {
                while (j-- > 0)
                    give(ring[sent % RING][j]);
                return -1;
            }
            KEEP(block);
            ring[sent % RING][j] = block;
        }
        atomic_store_explicit(&n_sent, sent + 1, memory_order_release);
    }
    return 0;
}

/* The first and the last CPU this process may run on. */
static void two_cores(const cpu_set_t *allowed, cpu_set_t cores[2])
{
    CPU_ZERO(&cores[0]);
    CPU_ZERO(&cores[1]);
    int last = 0;
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
        if (CPU_ISSET(cpu, allowed)) {
            if (CPU_COUNT(&cores[0]) == 0)
                CPU_SET(cpu, &cores[0]);
            last = cpu;
        }
    CPU_SET(last, &cores[1]);
}

static void wait_for_all_freed(void)
{
    for (int tries = 0; atomic_load(&n_freed) != atomic_load(&n_sent);)
        wait_a_little(&tries);
}

static result measure_cross(size_t nbytes, int64_t min_ns)
{
    pthread_t thread;
    cpu_set_t allowed, cores[2];
    if (sched_getaffinity(0, sizeof allowed, &allowed) != 0)
        return refused;
    two_cores(&allowed, cores);
    atomic_store(&n_sent, 0);
    atomic_store(&n_freed, 0);
    atomic_store(&stop_freeing, false);
    if (pthread_create(&thread, NULL, free_batches, NULL) != 0)
        return refused;
    sched_setaffinity(0, sizeof *cores, &cores[0]);
    pthread_setaffinity_np(thread, sizeof *cores, &cores[1]);
    result found = refused;
    if (send_batches(nbytes, WARM_BATCHES) == 0) {
        wait_for_all_freed();
        int64_t n = 0, start = now_ns();
        int failed;
        do {
            failed = send_batches(nbytes, BATCHES_A_LOOK);
            n += BATCHES_A_LOOK * BATCH_BLOCKS;
        } while (!failed && now_ns() - start < min_ns);
        wait_for_all_freed();
        if (!failed)
            found = (result){(double)(now_ns() - start) / (double)n, n, 0};
    }
    atomic_store(&stop_freeing, true);
    pthread_join(thread, NULL);
    sched_setaffinity(0, sizeof allowed, &allowed);
    return found;
}
#endif
