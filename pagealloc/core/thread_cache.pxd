"""A thread's magazines for one heap.

The inline half: popping and pushing a block, as the owner does it.  A pop or push is a handful of
plain loads and stores: no lock, no atomic read-modify-write, no call.
"""

from libc.stdint cimport int32_t, int64_t, uint16_t, uint32_t

from pagealloc.core.atomics cimport atomic_bump_i64, atomic_load_u16, atomic_store_u16
from pagealloc.core.central cimport central_t
from pagealloc.core.owner_lock cimport owner_enter, owner_leave, owner_lock_t

cdef extern from "<pthread.h>" nogil:
    ctypedef unsigned long pthread_t
    pthread_t pthread_self()
    int pthread_equal(pthread_t a, pthread_t b)

cdef enum:
    MAX_SIZE_CLASSES = 1024         # of a heap; 0 is none: its magazine has no room and no block
    USED_WORDS = MAX_SIZE_CLASSES // 64
    FIRST_RUN_CLASS = 128           # below: slots
    UNCACHED_RUN = MAX_SIZE_CLASSES - 1     # runs of all sizes that found no class of their own
    MAGAZINE_SLOTS = 62             # 512 bytes with the header
    MAGAZINE_MAX_BYTES = 64 << 20   # a magazine holds no more than that

cdef struct magazine_t:
    uint16_t n                      # the blocks in it
    uint16_t capacity               # 0 until it is first used
    uint16_t n_victims              # the collector's: what was in it when it was last looked at,
    uint16_t is_victim              # ... and whether it sat unused then
    int64_t n_allocs                # served from it; the owner writes it, others may read it
    char *blocks[MAGAZINE_SLOTS]

cdef struct thread_cache_t:
    owner_lock_t lock
    int32_t countdown               # allocations until the next one that is timed
    uint32_t random                 # state of the xorshift that spaces them
    bint is_orphan                  # its thread is gone: a forked child has only the one that forked
    thread_cache_t *next            # of the same heap; guarded by the heap's caches_mutex
    thread_cache_t *previous
    pthread_t thread
    int64_t n_seen_allocs[MAX_SIZE_CLASSES]     # the collector's: n_allocs at the last collection
    int64_t used[USED_WORDS]        # a bit a magazine that has ever had room
    magazine_t magazines[MAX_SIZE_CLASSES]

cdef thread_cache_t *thread_cache_new() noexcept nogil
cdef void thread_cache_delete(thread_cache_t *cache) noexcept nogil
cdef char *thread_cache_refill(
    thread_cache_t *cache, central_t *central, int64_t key, bint may_grow, bint *fresh, int *error
) noexcept nogil
cdef void thread_cache_spill(
    thread_cache_t *cache, central_t *central, char *block
) noexcept nogil
cdef bint thread_cache_drain(
    thread_cache_t *cache, central_t *centrals, bint for_good
) noexcept nogil
cdef void thread_cache_collect(thread_cache_t *cache, central_t *centrals) noexcept nogil
cdef int64_t thread_cache_idle(const thread_cache_t *cache, int size_class) noexcept nogil
cdef bint thread_cache_forget(thread_cache_t *cache, int size_class) noexcept nogil


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
    thread_cache_t *cache, uint32_t size_class, char *block
) noexcept nogil:
    """Put a free block into the owner's magazine; False: it has no room, or is being collected."""
    cdef magazine_t *magazine = &cache.magazines[size_class]
    cdef bint has_room = False
    cdef uint32_t n
    if owner_enter(&cache.lock):
        n = magazine.n
        has_room = n < magazine.capacity
        if has_room:
            magazine.blocks[n] = block
            atomic_store_u16(&magazine.n, <uint16_t>(n + 1))
    owner_leave(&cache.lock)
    return has_room
