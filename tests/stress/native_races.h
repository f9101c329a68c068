/* Double frees in the same instant: what the program does wrong must not become two owners.
 *
 * Every round, some threads free the same blocks, one after another, all at once; when all are done
 * each allocates as many, and nobody may find another's stamp in its own.
 */
#ifndef NATIVE_RACES_H
#define NATIVE_RACES_H

#include "native_churn.h"

#include <sched.h>

#define N_RACED 32
#define MAX_RACERS 3

/* Who allocated the blocks that the racers free. */
enum { OWNER_RACES, OWNER_WATCHES, OWNER_IS_DEAD };

typedef struct race {
    trial trial;
    size_t max_bytes;
    uint64_t seed;
    double seconds;
    int owner_role;
    long n_racers, n_bystanders; /* bystanders have a cache each, and keep it until the end */
    atomic_long n_arrived, n_aimed;
    atomic_bool stop;
    atomic_int n_freed[N_RACED]; /* how many racers were told so, of each block */
    long long n_rounds, n_raced, n_told_freed;
    block blocks[N_RACED];
    pthread_barrier_t bystanders_ready, bystanders_end;
} race;

typedef struct racer {
    race *race;
    long number;
    uint64_t random, n_owned;
} racer;

/* A barrier that is left within nanoseconds by all, if they have a core each. */
static void meet(atomic_long *n_arrived, long n_threads)
{
    const struct timespec pause = {0, 20000};
    const long mine = atomic_fetch_add(n_arrived, 1);
    const long all = (mine / n_threads + 1) * n_threads;
    for (long i = 1; atomic_load(n_arrived) < all; i++) {
        if (i > 4096) {
            nanosleep(&pause, NULL); /* some of the others have no core */
        } else if (i % 256 == 0) {
            sched_yield();
        }
    }
}

/* Who came last to a barrier leaves it first: chance decides who is first all the same. */
static void dither(uint64_t *random)
{
    for (uint64_t i = next_random(random) % 400; i; i--) {
        atomic_signal_fence(memory_order_seq_cst);
    }
}

static void fill(race *race, uint64_t *random, uint64_t owner, block *blocks)
{
    size_t align_bytes, nbytes;
    for (int i = 0; i < N_RACED; i++) {
        nbytes = choose_nbytes(random, race->max_bytes, &align_bytes);
        if (!allocate(&race->trial, &blocks[i], nbytes, align_bytes, owner + (uint64_t)i)) {
            fail(&race->trial, "refused, without a budget", &blocks[i], 0);
            blocks[i].address = NULL;
        }
    }
}

static void *fill_and_die(void *argument)
{
    race *race = argument;
    uint64_t random = seeded(race->seed, 1000 + (uint64_t)race->n_rounds);
    fill(race, &random, (uint64_t)1 << 60 | (uint64_t)race->n_rounds << 8, race->blocks);
    return NULL;
}

/* By racer 0 alone, the others wait. */
static void prepare(racer *r)
{
    race *race = r->race;
    pthread_t thread;
    if (race->owner_role == OWNER_IS_DEAD) {
        start(&thread, fill_and_die, race);
        pthread_join(thread, NULL);
    } else {
        fill(race, &r->random, (uint64_t)1 << 60 | (uint64_t)race->n_rounds << 8, race->blocks);
    }
    for (int i = 0; i < N_RACED; i++) {
        atomic_store(&race->n_freed[i], 0);
    }
    race->n_rounds += 1;
}

static void count(race *race, double end)
{
    atomic_store(&race->stop, now_s() >= end || atomic_load(&race->trial.failed));
    for (int i = 0; i < N_RACED; i++) {
        const int n_freed = atomic_load(&race->n_freed[i]);
        race->n_told_freed += n_freed;
        race->n_raced += 1;
        if (n_freed == 0) {
            fail(&race->trial, "a live block that all freed was freed by none", &race->blocks[i],
                 n_freed);
        }
    }
}

static void *run_racer(void *argument)
{
    racer *r = argument;
    race *race = r->race;
    const double end = now_s() + race->seconds;
    const bool frees = r->number > 0 || race->owner_role != OWNER_WATCHES;
    const long n_freeing = race->n_racers - (race->owner_role == OWNER_WATCHES);
    block own[N_RACED];
    do {
        if (r->number == 0) {
            prepare(r);
        }
        meet(&race->n_arrived, race->n_racers);
        for (int i = 0; frees && i < N_RACED; i++) {
            meet(&race->n_aimed, n_freeing);
            dither(&r->random);
            if (race->blocks[i].address != NULL
                && api->free(race->trial.heap, race->blocks[i].address) == PAGEALLOC_FREED) {
                atomic_fetch_add(&race->n_freed[i], 1);
            }
        }
        meet(&race->n_arrived, race->n_racers);
        if (r->number == 0) {
            count(race, end);
        }
        fill(race, &r->random, (uint64_t)(r->number + 1) << 40 | r->n_owned++ << 8, own);
        meet(&race->n_arrived, race->n_racers);
        for (int i = 0; i < N_RACED; i++) {
            if (own[i].address != NULL) {
                release(&race->trial, &own[i]);
            }
        }
        meet(&race->n_arrived, race->n_racers);
    } while (!atomic_load(&race->stop)); /* which changes in the middle of a round only */
    return NULL;
}

static void *stand_by(void *argument)
{
    race *race = argument;
    block block;
    const bool has_block = allocate(&race->trial, &block, 64, 0, (uint64_t)1 << 61);
    pthread_barrier_wait(&race->bystanders_ready);
    pthread_barrier_wait(&race->bystanders_end);
    if (has_block) {
        release(&race->trial, &block);
    }
    return NULL;
}

static void run_race(race *race)
{
    racer racers[MAX_RACERS];
    pthread_t threads[MAX_RACERS];
    pthread_t *bystanders = calloc((size_t)race->n_bystanders + 1, sizeof *bystanders);
    const unsigned n_standing = (unsigned)race->n_bystanders + 1;
    long i;
    if (bystanders == NULL) {
        abort();
    }
    pthread_barrier_init(&race->bystanders_ready, NULL, n_standing);
    pthread_barrier_init(&race->bystanders_end, NULL, n_standing);
    for (i = 0; i < race->n_bystanders; i++) {
        start(&bystanders[i], stand_by, race);
    }
    pthread_barrier_wait(&race->bystanders_ready);
    for (i = 0; i < race->n_racers; i++) {
        racers[i] = (racer){race, i, seeded(race->seed, (uint64_t)i), 0};
        start(&threads[i], run_racer, &racers[i]);
    }
    for (i = 0; i < race->n_racers; i++) {
        pthread_join(threads[i], NULL);
    }
    pthread_barrier_wait(&race->bystanders_end);
    for (i = 0; i < race->n_bystanders; i++) {
        pthread_join(bystanders[i], NULL);
    }
    pthread_barrier_destroy(&race->bystanders_ready);
    pthread_barrier_destroy(&race->bystanders_end);
    free(bystanders);
}

#endif
