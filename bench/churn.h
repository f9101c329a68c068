/* The works that live like an inference engine: KV churn and the soak.
 *
 * Purpose: sequences that take block after block and free them together; requests in batches.
 * Structure: kv_start -> kv_spread -> kv_period, again and again -> kv_stop;
 *     soak_window -> soak_cycle
 * Invariants: after kv_stop, and between soak windows, no block is live.
 * Locking: none; one thread.
 * Units: nanoseconds, bytes.
 */
#ifndef BENCH_CHURN_H
#define BENCH_CHURN_H
#include "blocks.h"
#include "samples.h"

/* --- kv: sequences that take a block for every 16 tokens, and free all theirs at their end ---
 *
 * Each sequence goes round its own list of lengths, which add up to PERIOD blocks, and starts
 * somewhere in it.  So the whole is periodic: after one period of warm-up nothing happens that did
 * not happen before. */

enum { N_SEQUENCES = 32, BLOCK_TOKENS = 16, MIN_TOKENS = 16, MAX_TOKENS = 2048, PERIOD = 512 };
enum { MAX_BLOCKS = MAX_TOKENS / BLOCK_TOKENS, PERIOD_BLOCKS = N_SEQUENCES * PERIOD };

typedef struct {
    int n_blocks, length, n_lengths;
    void *blocks[MAX_BLOCKS];
    int16_t lengths[PERIOD]; /* in blocks, one for each request */
} sequence;

static sequence sequences[N_SEQUENCES];

static void free_sequence(sequence *s)
{
    for (int i = 0; i < s->n_blocks; i++)
        give(s->blocks[i]);
    s->n_blocks = 0;
}

INLINED int grow(sequence *s, size_t nbytes, bool touched, uint32_t *sample)
{
    if (s->n_blocks == s->lengths[s->length]) {
        free_sequence(s);
        s->length = (s->length + 1) % s->n_lengths;
    }
    int64_t start = sample ? now_ns() : 0;
    void *block = take(nbytes, 0);
    if (sample) {
        int64_t taken = now_ns() - start;
        *sample = taken > UINT32_MAX ? UINT32_MAX : (uint32_t)taken;
    }
    if (!block)
        return -1;
    KEEP(block);
    if (touched)
        touch_pages(block, nbytes);
    s->blocks[s->n_blocks++] = block;
    return 0;
}

INLINED int kv_period(size_t nbytes, bool touched, uint32_t *sample)
{
    for (int step = 0; step < PERIOD; step++)
        for (int i = 0; i < N_SEQUENCES; i++)
            if (grow(&sequences[i], nbytes, touched, sample ? sample++ : NULL) != 0)
                return -1;
    return 0;
}

static int kv_period_plain(size_t nbytes) { return kv_period(nbytes, false, NULL); }
static int kv_period_touched(size_t nbytes) { return kv_period(nbytes, true, NULL); }

static void kv_start(void)
{
    for (int i = 0; i < N_SEQUENCES; i++) {
        sequence *s = &sequences[i];
        int left = PERIOD;
        s->n_lengths = s->length = s->n_blocks = 0;
        while (left > 0) {
            int n_tokens = MIN_TOKENS + (int)random_below(MAX_TOKENS - MIN_TOKENS + 1);
            int n_blocks = (n_tokens + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
            n_blocks = n_blocks < left ? n_blocks : left;
            s->lengths[s->n_lengths++] = (int16_t)n_blocks;
            left -= n_blocks;
        }
    }
}

/* Each sequence to its own place in its list, so that they end at different times. */
static int kv_spread(size_t nbytes, bool touched)
{
    for (int i = 0; i < N_SEQUENCES; i++)
        for (int n = (int)random_below(PERIOD); n > 0; n--)
            if (grow(&sequences[i], nbytes, touched, NULL) != 0)
                return -1;
    return 0;
}

static void kv_stop(void)
{
    for (int i = 0; i < N_SEQUENCES; i++)
        free_sequence(&sequences[i]);
}

static result measure_kv(size_t nbytes, bool touched, int64_t min_ns)
{
    int (*period)(size_t) = touched ? kv_period_touched : kv_period_plain;
    result found = refused;
    kv_start();
    if (kv_spread(nbytes, touched) == 0 && period(nbytes) == 0 && period(nbytes) == 0) {
        int64_t n = 0, faults = minor_faults(), start = now_ns(), end;
        int failed;
        do {
            failed = period(nbytes);
            n += PERIOD_BLOCKS;
            end = now_ns();
        } while (!failed && end - start < min_ns);
        if (!failed)
            found = (result){(double)(end - start) / (double)n, n, minor_faults() - faults};
    }
    kv_stop();
    return found;
}

static samples kv_samples;
static uint32_t kv_sample_ns[PERIOD_BLOCKS];

/* Into kv_samples: the time of each single allocation. */
static int measure_kv_latency(size_t nbytes, int n_periods)
{
    samples_clear(&kv_samples);
    kv_start();
    int failed = kv_spread(nbytes, false) || kv_period(nbytes, false, kv_sample_ns);
    for (int i = 0; !failed && i < n_periods; i++)
        failed = kv_period(nbytes, false, kv_sample_ns) ||
                 samples_add(&kv_samples, kv_sample_ns, PERIOD_BLOCKS);
    kv_stop();
    return failed;
}

/* --- soak: batches of requests, each a prompt of 256 tokens and 64 tokens one after another --- */

enum { PROMPT_BLOCKS = 256 / BLOCK_TOKENS, REQUEST_BLOCKS = PROMPT_BLOCKS + 64 / BLOCK_TOKENS };
enum { MAX_BATCH = 32 };
enum { MAX_CYCLE = MAX_BATCH * REQUEST_BLOCKS, KEPT_SAMPLES = 1 << 20 };
static samples window_samples, run_samples;
static uint32_t *kept_ns; /* (KEPT_SAMPLES) */

/* One batch from start to end: all prompts, then block by block for all, then all freed. */
static int soak_cycle(size_t nbytes, int n_requests, uint32_t *sample)
{
    void *blocks[MAX_CYCLE];
    int n = 0, failed = 0;
    for (; n < n_requests * REQUEST_BLOCKS && !failed; n++) {
        int64_t start = now_ns();
        void *block = take(nbytes, 0);
        int64_t taken = now_ns() - start;
        if (!block) {
            failed = -1;
            break;
        }
        touch_pages(block, nbytes);
        blocks[n] = block;
        sample[n] = taken > UINT32_MAX ? UINT32_MAX : (uint32_t)taken;
    }
    while (n > 0)
        give(blocks[--n]);
    return failed;
}

static int soak_window(size_t nbytes, int n_requests, int64_t window_ns)
{
    if (!kept_ns) {
        kept_ns = own_memory(KEPT_SAMPLES * sizeof *kept_ns);
        samples_clear(&run_samples);
    }
    samples_clear(&window_samples);
    if (n_requests < 1 || n_requests > MAX_BATCH)
        return -1;
    int64_t start = now_ns();
    size_t n_cycle = (size_t)n_requests * REQUEST_BLOCKS;
    for (bool over = false; !over;) {
        size_t n = 0;
        for (; !over && n + n_cycle <= KEPT_SAMPLES; n += n_cycle) {
            if (soak_cycle(nbytes, n_requests, kept_ns + n) != 0)
                return -1;
            over = now_ns() - start >= window_ns;
        }
        if (samples_add(&window_samples, kept_ns, n) || samples_add(&run_samples, kept_ns, n))
            return -1;
    }
    return 0;
}
#endif
