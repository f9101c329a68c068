/* The work that ends in idleness: two threads allocate, free everything, and sleep.
 *
 * Purpose: let somebody else measure what the process holds before, and a second after.
 * Structure: retain (threads fill their blocks) -> release (they free, and sleep) -> retire
 * Invariants: between release and retire no thread calls the allocator.
 * Locking: the gate's barriers.
 * Units: bytes.
 */
#ifndef BENCH_RETAINED_H
#define BENCH_RETAINED_H
#include <pthread.h>
#include "blocks.h"

enum { N_HOLDERS = 2, MAX_HELD = 1 << 16 };
static struct {
    pthread_t threads[N_HOLDERS];
    pthread_barrier_t gate;
    size_t nbytes;
    int n_blocks, n_failed;
} retained;
static void *held_blocks[N_HOLDERS][MAX_HELD];

static void *hold(void *number)
{
    void **blocks = held_blocks[(intptr_t)number];
    for (int i = 0; i < retained.n_blocks; i++) {
        if (!(blocks[i] = take(retained.nbytes, 0)))
            __atomic_add_fetch(&retained.n_failed, 1, __ATOMIC_RELAXED);
        else
            touch_pages(blocks[i], retained.nbytes);
    }
    pthread_barrier_wait(&retained.gate); /* retained */
    pthread_barrier_wait(&retained.gate);
    for (int i = 0; i < retained.n_blocks; i++)
        give(blocks[i]);
    pthread_barrier_wait(&retained.gate); /* released */
    pthread_barrier_wait(&retained.gate);
    return NULL;
}

static int retain(size_t nbytes, int n_blocks)
{
    if (n_blocks < 1 || n_blocks > MAX_HELD)
        return -1;
    retained.nbytes = nbytes;
    retained.n_blocks = n_blocks;
    retained.n_failed = 0;
    pthread_barrier_init(&retained.gate, NULL, N_HOLDERS + 1);
    for (intptr_t i = 0; i < N_HOLDERS; i++)
        if (pthread_create(&retained.threads[i], NULL, hold, (void *)i))
            return -1;
    pthread_barrier_wait(&retained.gate);
    return retained.n_failed ? -1 : 0;
}

static void release(void)
{
    pthread_barrier_wait(&retained.gate);
    pthread_barrier_wait(&retained.gate);
}

static void retire(void)
{
    pthread_barrier_wait(&retained.gate);
    for (int i = 0; i < N_HOLDERS; i++)
        pthread_join(retained.threads[i], NULL);
    pthread_barrier_destroy(&retained.gate);
}
#endif
