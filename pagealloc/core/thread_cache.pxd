"""A thread's magazines for one heap.

The inline half: popping and pushing a block, as the owner does it.  A pop or push is a handful of
plain loads and stores: no lock, no atomic read-modify-write, no call.
"""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t

from pagealloc.core.atomics cimport (
    atomic_bump_i64,
    atomic_load_u8,
    atomic_store_u8,
    atomic_store_u16,
)
from pagealloc.core.block_map cimport LIKELY, STATE_FREE, block_map_t
from pagealloc.core.central cimport central_t
from pagealloc.core.owner_lock cimport owner_enter, owner_leave, owner_lock_t

cdef extern from "<pthread.h>" nogil:
    ctypedef unsigned long pthread_t
    pthread_t pthread_self()
    int pthread_equal(pthread_t a, pthread_t b)

cdef enum:
    MAX_SIZE_CLASSES = 1024         # of a heap; 0 is none: its magazine has no room and no block
    USED_WORDS = MAX_SIZE_CLASSES // 64
    UNCACHED_RUN = MAX_SIZE_CLASSES - 1     # runs of all sizes that found no class of their own
    MAGAZINE_SLOTS = 62             # 512 bytes with the header
    MAGAZINE_MAX_BYTES = 64 << 20   # a magazine holds no more than that
    OUTBOX_SLOTS = 64
    INBOX_SLOTS = 1024

cdef struct magazine_t:
    uint16_t n                      # the blocks in it
    uint16_t capacity               # 0 until it is first used
    uint16_t n_victims              # the collector's: what was in it when it was last looked at,
    uint16_t is_victim              # ... and whether it sat unused then
    int64_t n_allocs                # served from it; the owner writes it, others may read it
    char *blocks[MAGAZINE_SLOTS]

cdef struct inbox_t:                # blocks of all classes, in state RETURNING
    uint32_t n                      # atomic to read
    char *blocks[INBOX_SLOTS]

cdef struct outbox_t:
    uint32_t n                      # atomic to read
    uint8_t tags[OUTBOX_SLOTS]      # of the caches the blocks return to
    char *blocks[OUTBOX_SLOTS]

cdef struct thread_cache_t:
    owner_lock_t lock
    uint8_t tag                     # what its live blocks are marked with
    uint32_t own_state              # the same, or 256, which no state is, for STATE_SHARED
    bint is_orphan                  # its thread is gone: a forked child has only the one that forked
    int32_t countdown               # allocations until the next one that is timed
    uint32_t random                 # state of the xorshift that spaces them
    thread_cache_t *next            # of the same heap; guarded by the heap's caches_mutex
    thread_cache_t *previous
    pthread_t thread
    int64_t n_seen_allocs[MAX_SIZE_CLASSES]     # the collector's: n_allocs at the last collection
    int64_t used[USED_WORDS]        # a bit a magazine that has ever had room; atomic
    outbox_t outbox                 # other caches' blocks, freed by this thread
    inbox_t inbox                   # this cache's blocks, freed by others; guarded by lock.mutex
    magazine_t magazines[MAX_SIZE_CLASSES]

cdef thread_cache_t *thread_cache_new() noexcept nogil
cdef void thread_cache_delete(thread_cache_t *cache) noexcept nogil

# By the owner.
cdef char *thread_cache_refill(
    thread_cache_t *cache, central_t *centrals, block_map_t *map, uint32_t size_class, int64_t key,
    bint may_grow, bint *fresh, int *error
) noexcept nogil
cdef bint thread_cache_free(
    thread_cache_t *cache, central_t *central, uint8_t *state, char *block
) noexcept nogil
cdef void thread_cache_put(
    thread_cache_t *cache, central_t *central, char *block
) noexcept nogil
cdef bint thread_cache_return(thread_cache_t *cache, char *block, uint8_t tag) noexcept nogil

# By anybody.
cdef int64_t thread_cache_take_outbox(thread_cache_t *cache, outbox_t *outbox) noexcept nogil
cdef bint thread_cache_accept(thread_cache_t *cache, char *block) noexcept nogil
cdef bint thread_cache_drain(
    thread_cache_t *cache, central_t *centrals, block_map_t *map, bint for_good
) noexcept nogil
cdef void thread_cache_collect(
    thread_cache_t *cache, central_t *centrals, block_map_t *map
) noexcept nogil
cdef bint thread_cache_forget(thread_cache_t *cache, int size_class) noexcept nogil
cdef void thread_cache_count_idle(
    thread_cache_t *cache, block_map_t *map, int64_t *n_idle
) noexcept nogil
cdef int64_t thread_cache_n_conflicts() noexcept nogil


cdef inline char *magazine_pop(thread_cache_t *cache, uint32_t size_class) noexcept nogil:
    """A block from the owner's magazine; NULL: it is empty, or this allocation is to be timed."""
    cdef magazine_t *magazine = &cache.magazines[size_class]
    cdef char *block = NULL
    cdef uint32_t n
    cache.countdown -= 1
    if owner_enter(&cache.lock) and cache.countdown > 0:
        n = magazine.n
        if n:
            block = magazine.blocks[n - 1]
            atomic_store_u16(&magazine.n, <uint16_t>(n - 1))
            atomic_bump_i64(&magazine.n_allocs)
    owner_leave(&cache.lock)
    return block


cdef inline bint magazine_push(
    thread_cache_t *cache, uint32_t size_class, uint8_t *state, char *block
) noexcept nogil:
    """Free a block that the owner had allocated, into its magazine.

    False, and nothing changed: the block is not live or not the owner's, the magazine has no room,
    or is being collected.
    """
    cdef magazine_t *magazine = &cache.magazines[size_class]
    cdef bint done = False
    cdef uint32_t n
    if owner_enter(&cache.lock):
        n = magazine.n
        done = LIKELY(atomic_load_u8(state) == cache.own_state and n < magazine.capacity)
        if done:
            # No exchange: whoever else frees this block at the same instant only marks it as
            # returning, and does not use it.  If that mark is lost here, it is found missing.
            atomic_store_u8(state, STATE_FREE)
            magazine.blocks[n] = block
            atomic_store_u16(&magazine.n, <uint16_t>(n + 1))
    owner_leave(&cache.lock)
    return done
