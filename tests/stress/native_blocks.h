/* Blocks that tell whether somebody else has written into them, for the tests with native threads.
 *
 * What a block must contain follows from its address, its length and who allocated it, which are
 * kept outside of it: a block that is handed out twice, or moved, or cleared, does not match.
 * PAGE_BYTES is the compiler's to say: the page size that the allocator under test works with.
 */
#ifndef NATIVE_BLOCKS_H
#define NATIVE_BLOCKS_H

#include <pagealloc.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#define STAMP_EVERY_BYTES 4096 /* more often than once a page does no harm */
#define HUGE_PAGE_BYTES ((size_t)2 << 20)

static const pagealloc_api *api;

typedef struct block {
    char *address;
    size_t nbytes;
    uint64_t owner; /* never the same for two blocks of one heap */
} block;

/* What all threads of a test share: the heap, and the first thing that went wrong. */
typedef struct trial {
    pagealloc_heap *heap;
    atomic_bool failed;
    pthread_mutex_t failure_mutex;
    char failure[256];
} trial;

static void fail(trial *trial, const char *what, const block *block, long long detail)
{
    pthread_mutex_lock(&trial->failure_mutex);
    if (!atomic_exchange(&trial->failed, true)) {
        snprintf(
            trial->failure, sizeof trial->failure, "%s: %p, %zu bytes, owner %llx: %lld", what,
            (void *)block->address, block->nbytes, (unsigned long long)block->owner, detail
        );
    }
    pthread_mutex_unlock(&trial->failure_mutex);
}

/* --- chance --- */

static uint64_t next_random(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state * 0x2545F4914F6CDD1DULL >> 16;
}

static uint64_t seeded(uint64_t seed, uint64_t number)
{
    uint64_t state = (seed + 1) * 0x9E3779B97F4A7C15ULL ^ (number + 1) * 0xD1B54A32D192ED03ULL;
    next_random(&state);
    return state | 1;
}

/* Slots mostly, some page runs, few large ones: as long as all of these find out about each other. */
static size_t choose_nbytes(uint64_t *random, size_t max_bytes, size_t *align_bytes)
{
    const uint64_t kind = next_random(random) % 64, r = next_random(random);
    size_t nbytes;
    *align_bytes = 0;
    if (kind < 20) {
        nbytes = 8 + r % 57;
    } else if (kind < 44) {
        nbytes = 8 + r % 2500;
        *align_bytes = kind < 26 ? (size_t)64 << r % 6 : 0;
    } else if (kind < 56) {
        nbytes = PAGE_BYTES * (1 + r % 4);
    } else if (kind < 62) {
        nbytes = 1 + r % (64 * PAGE_BYTES);
    } else if (kind < 63 || max_bytes < HUGE_PAGE_BYTES) {
        nbytes = 1 + r % max_bytes;
    } else {
        nbytes = r % 2 ? HUGE_PAGE_BYTES : 1000;
        *align_bytes = HUGE_PAGE_BYTES;
    }
    nbytes = nbytes < 8 ? 8 : nbytes;
    return nbytes < max_bytes ? nbytes : max_bytes;
}

/* --- stamps --- */

static uint64_t stamp_at(const block *block, size_t offset)
{
    return ((uintptr_t)block->address + offset) * 0x9E3779B97F4A7C15ULL
        ^ block->owner * 0xD1B54A32D192ED03ULL ^ block->nbytes * 0x8CB92BA72F3D8DD7ULL;
}

static void stamp(const block *block)
{
    const size_t last = (block->nbytes - 8) & ~(size_t)7;
    for (size_t offset = 0; offset < last; offset += STAMP_EVERY_BYTES) {
        *(uint64_t *)(block->address + offset) = stamp_at(block, offset);
    }
    *(uint64_t *)(block->address + last) = stamp_at(block, last);
}

static bool verify(trial *trial, const block *block)
{
    const size_t last = (block->nbytes - 8) & ~(size_t)7;
    for (size_t offset = 0; offset < last; offset += STAMP_EVERY_BYTES) {
        if (*(const uint64_t *)(block->address + offset) != stamp_at(block, offset)) {
            fail(trial, "not what was written, at offset", block, (long long)offset);
            return false;
        }
    }
    if (*(const uint64_t *)(block->address + last) != stamp_at(block, last)) {
        fail(trial, "not what was written, at offset", block, (long long)last);
        return false;
    }
    return true;
}

/* What a block that was just allocated must be; and its stamp. */
static void begin(trial *trial, const block *block, size_t align_bytes)
{
    if (align_bytes == 0) {
        align_bytes = block->nbytes < PAGE_BYTES ? 64 : PAGE_BYTES;
    }
    if ((uintptr_t)block->address % align_bytes) {
        fail(trial, "not aligned to", block, (long long)align_bytes);
    }
    if (api->usable_bytes(trial->heap, block->address) < block->nbytes) {
        fail(trial, "usable bytes", block,
             (long long)api->usable_bytes(trial->heap, block->address));
    }
    stamp(block);
}

/* False if the request was refused. */
static bool allocate(
    trial *trial, block *block, size_t nbytes, size_t align_bytes, uint64_t owner
)
{
    block->address = api->alloc(trial->heap, nbytes, align_bytes);
    block->nbytes = nbytes;
    block->owner = owner;
    if (block->address == NULL) {
        return false;
    }
    begin(trial, block, align_bytes);
    return true;
}

static void release(trial *trial, const block *block)
{
    int code;
    if (verify(trial, block)) {
        code = api->free(trial->heap, block->address);
        if (code != PAGEALLOC_FREED) {
            fail(trial, "a live block was not freed", block, code);
        }
    }
}

static void release_many(trial *trial, const block *blocks, size_t n)
{
    void *addresses[64];
    size_t n_freed, i;
    for (i = 0; i < n; i++) {
        if (!verify(trial, &blocks[i])) {
            return;
        }
        addresses[i] = blocks[i].address;
    }
    n_freed = api->free_many(trial->heap, addresses, n);
    if (n_freed != n) {
        fail(trial, "of many live blocks, this one first, were not freed", blocks,
             (long long)(n - n_freed));
    }
}

#endif
