/* Threads that allocate, check, pass on and free at random; some live long, many die young. */
#ifndef NATIVE_CHURN_H
#define NATIVE_CHURN_H

#include "native_blocks.h"

#include <stdlib.h>
#include <time.h>

#define MAILBOX_SLOTS 128
#define MAX_HELD 256
#define MAX_BATCH 64
#define SHORT_AT_ONCE 8
#define STEPS_OF_A_SHORT_LIFE 150

typedef struct mailbox {
    pthread_mutex_t mutex;
    size_t n, nbytes;
    block blocks[MAILBOX_SLOTS];
} mailbox;

typedef struct churn {
    trial trial;
    size_t max_bytes, held_bytes; /* of a block; of what a thread, or a mailbox, keeps */
    uint64_t seed;
    double seconds;
    long n_threads, n_short; /* n_short: at least so many die during the churn */
    mailbox *mailboxes;      /* one a thread */
    pthread_barrier_t all_allocated;
    atomic_bool stop;
    atomic_llong n_started, n_blocks, n_refused, n_passed;
} churn;

typedef struct worker {
    churn *churn;
    uint64_t random, number, n_owned;
    size_t n_held, nbytes;
    block held[MAX_HELD];
} worker;

static double now_s(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

static worker *new_worker(churn *churn)
{
    worker *w = calloc(1, sizeof *w);
    if (w == NULL) {
        abort();
    }
    w->churn = churn;
    w->number = (uint64_t)atomic_fetch_add(&churn->n_started, 1);
    w->random = seeded(churn->seed, w->number);
    return w;
}

static bool is_over(churn *churn)
{
    return atomic_load_explicit(&churn->stop, memory_order_relaxed)
        || atomic_load_explicit(&churn->trial.failed, memory_order_relaxed);
}

static uint64_t new_owner(worker *w)
{
    return w->number << 40 | ++w->n_owned;
}

static void hold(worker *w, const block *block)
{
    w->held[w->n_held++] = *block;
    w->nbytes += block->nbytes;
}

static block let_go(worker *w)
{
    const size_t i = next_random(&w->random) % w->n_held;
    const block chosen = w->held[i];
    w->held[i] = w->held[--w->n_held];
    w->nbytes -= chosen.nbytes;
    return chosen;
}

static void take_one(worker *w)
{
    churn *churn = w->churn;
    size_t align_bytes;
    const size_t nbytes = choose_nbytes(&w->random, churn->max_bytes, &align_bytes);
    block block;
    if (w->n_held == MAX_HELD || (w->n_held && w->nbytes + nbytes > churn->held_bytes)) {
        block = let_go(w);
        release(&churn->trial, &block);
    } else if (allocate(&churn->trial, &block, nbytes, align_bytes, new_owner(w))) {
        atomic_fetch_add_explicit(&churn->n_blocks, 1, memory_order_relaxed);
        hold(w, &block);
    } else {
        atomic_fetch_add(&churn->n_refused, 1);
    }
}

static void take_many(worker *w)
{
    churn *churn = w->churn;
    void *addresses[MAX_BATCH];
    size_t align_bytes;
    size_t n = 1 + next_random(&w->random) % MAX_BATCH;
    const size_t nbytes = choose_nbytes(&w->random, churn->max_bytes, &align_bytes);
    if (n > MAX_HELD - w->n_held || w->nbytes + n * nbytes > churn->held_bytes) {
        return;
    }
    if (api->alloc_many(churn->trial.heap, nbytes, align_bytes, n, addresses) != 0) {
        atomic_fetch_add(&churn->n_refused, 1);
        return;
    }
    atomic_fetch_add_explicit(&churn->n_blocks, (long long)n, memory_order_relaxed);
    for (size_t i = 0; i < n; i++) {
        const block block = {addresses[i], nbytes, new_owner(w)};
        begin(&churn->trial, &block, align_bytes);
        hold(w, &block);
    }
}

static void free_some(worker *w, size_t n)
{
    block blocks[MAX_BATCH];
    size_t i;
    for (i = 0; i < n && w->n_held; i++) {
        blocks[i] = let_go(w);
    }
    if (i == 1) {
        release(&w->churn->trial, blocks);
    } else {
        release_many(&w->churn->trial, blocks, i);
    }
}

static void pass_on(worker *w)
{
    churn *churn = w->churn;
    mailbox *box = &churn->mailboxes[next_random(&w->random) % (uint64_t)churn->n_threads];
    const block block = let_go(w);
    bool has_room;
    pthread_mutex_lock(&box->mutex);
    has_room = box->n < MAILBOX_SLOTS && (box->n == 0 || box->nbytes < churn->held_bytes);
    if (has_room) {
        box->blocks[box->n++] = block;
        box->nbytes += block.nbytes;
    }
    pthread_mutex_unlock(&box->mutex);
    if (has_room) {
        atomic_fetch_add_explicit(&churn->n_passed, 1, memory_order_relaxed);
    } else {
        release(&churn->trial, &block);
    }
}

/* Free up to `n` of what others put into a mailbox; false if there was nothing. */
static bool free_received(churn *churn, mailbox *box, size_t n)
{
    block blocks[MAX_BATCH];
    size_t i;
    pthread_mutex_lock(&box->mutex);
    for (i = 0; i < n && box->n; i++) {
        blocks[i] = box->blocks[--box->n];
        box->nbytes -= blocks[i].nbytes;
    }
    pthread_mutex_unlock(&box->mutex);
    release_many(&churn->trial, blocks, i);
    return i > 0;
}

static void step(worker *w)
{
    const uint64_t kind = next_random(&w->random) % 16;
    if (kind < 6 || w->n_held == 0) {
        take_one(w);
    } else if (kind < 8) {
        free_some(w, 1);
    } else if (kind < 12) {
        pass_on(w);
    } else if (kind < 14) {
        free_received(w->churn, &w->churn->mailboxes[w->number % (uint64_t)w->churn->n_threads],
                      1 + next_random(&w->random) % MAX_BATCH);
    } else if (kind < 15) {
        take_many(w);
    } else {
        free_some(w, 1 + next_random(&w->random) % MAX_BATCH);
    }
}

static void *live_long(void *argument)
{
    worker *w = argument;
    take_one(w); /* all threads have a cache at the same time */
    pthread_barrier_wait(&w->churn->all_allocated);
    while (!is_over(w->churn)) {
        step(w);
    }
    while (w->n_held) {
        free_some(w, MAX_BATCH);
    }
    free(w);
    return NULL;
}

static void *die_young(void *argument)
{
    worker *w = argument;
    for (int i = 0; i < STEPS_OF_A_SHORT_LIFE && !w->churn->trial.failed; i++) {
        step(w);
    }
    while (w->n_held) { /* most of it outlives this thread */
        pass_on(w);
    }
    free(w);
    return NULL;
}

static void start(pthread_t *thread, void *(*life)(void *), void *argument)
{
    if (pthread_create(thread, NULL, life, argument) != 0) {
        abort(); /* the others wait at a barrier: there is no way back */
    }
}

static void run_churn(churn *churn)
{
    pthread_t *threads = calloc((size_t)churn->n_threads, sizeof *threads);
    pthread_t young[SHORT_AT_ONCE];
    const double end = now_s() + churn->seconds;
    const struct timespec pause = {0, 2000000};
    long i, n_dead = 0;
    churn->mailboxes = calloc((size_t)churn->n_threads, sizeof *churn->mailboxes);
    if (threads == NULL || churn->mailboxes == NULL) {
        abort();
    }
    pthread_barrier_init(&churn->all_allocated, NULL, (unsigned)churn->n_threads);
    for (i = 0; i < churn->n_threads; i++) {
        pthread_mutex_init(&churn->mailboxes[i].mutex, NULL);
        start(&threads[i], live_long, new_worker(churn));
    }
    while ((now_s() < end || n_dead < churn->n_short) && !is_over(churn)) {
        if (churn->n_short == 0) {
            nanosleep(&pause, NULL);
            continue;
        }
        for (i = 0; i < SHORT_AT_ONCE; i++) {
            start(&young[i], die_young, new_worker(churn));
        }
        for (i = 0; i < SHORT_AT_ONCE; i++) {
            pthread_join(young[i], NULL);
        }
        n_dead += SHORT_AT_ONCE;
    }
    atomic_store(&churn->stop, true);
    for (i = 0; i < churn->n_threads; i++) {
        pthread_join(threads[i], NULL);
    }
    for (i = 0; i < churn->n_threads; i++) {
        while (free_received(churn, &churn->mailboxes[i], MAX_BATCH)) {
        }
        pthread_mutex_destroy(&churn->mailboxes[i].mutex);
    }
    pthread_barrier_destroy(&churn->all_allocated);
    free(churn->mailboxes);
    free(threads);
}

#endif
