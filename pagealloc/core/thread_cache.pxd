"""A thread's magazines for one heap.

The inline half: popping and pushing a block, as the owner does it.  A pop or push is a handful of
plain loads and stores: no lock, no atomic read-modify-write, no call.
"""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from pagealloc.core.atomics cimport (
    atomic_load_i64,
    atomic_load_ptr,
    atomic_load_u16,
    atomic_load_u32,
    atomic_store_i64,
    atomic_store_ptr,
    atomic_store_u16,
    atomic_store_u32,
)
from pagealloc.core.block_map cimport (
    LIKELY,
    STATE_FIRST_TAG,
    STATE_FREE,
    STATE_SHARED,
    block_map_t,
    mark_returning,
)
from pagealloc.core.central cimport central_t, count_trailing_zeros
from pagealloc.core.mutex cimport mutex_t
from pagealloc.core.page_map cimport block_t
from pagealloc.core.owner_lock cimport owner_enter, owner_leave, owner_lock_t

cdef extern from "<pthread.h>" nogil:
    ctypedef unsigned long pthread_t
    pthread_t pthread_self()
    int pthread_equal(pthread_t a, pthread_t b)

cdef enum:
    MAX_SIZE_CLASSES = 1024         # of a heap; 0 is none: its magazine has no room and no block
    USED_WORDS = MAX_SIZE_CLASSES // 64
    UNCACHED_RUN = MAX_SIZE_CLASSES - 1     # runs of all sizes that found no class of their own
    MAGAZINE_SLOTS = 62             # 1 KiB with the header
    MAGAZINE_MAX_BYTES = 64 << 20   # a magazine holds no more than that
    OUTBOX_SLOTS = MAGAZINE_SLOTS   # and no more blocks than a magazine of their class could hold
    INBOX_SLOTS = 1024
    BEHIND_HEAP_BYTES = 0x800

cdef enum:                          # what becomes of a block for the outbox
    OUTBOX_REFUSED
    OUTBOX_TAKEN
    OUTBOX_FULL

cdef struct magazine_t:
    block_t *top                    # one past the last block in it; NULL until it is first used
    block_t *limit                  # one past the last place; the same
    int64_t n_allocs                # served from it
    int64_t next_timed              # n_allocs from which on the next one is timed; 0: never set
    block_t blocks[MAGAZINE_SLOTS]  # `top` and `n_allocs` are written by the owner, read by others

cdef struct magazine_age_t:         # the collector's
    int64_t n_allocs                # what it was when it was last looked at,
    int64_t n                       # ... and what was in it,
    bint is_victim                  # ... and whether it sat unused then

cdef struct inbox_t:                # blocks of all classes, marked as returning; a stack
    mutex_t mutex
    uint32_t n                      # atomic to read
    block_t blocks[INBOX_SLOTS]

cdef struct outbox_t:
    uint32_t n                      # atomic to read
    uint8_t tags[OUTBOX_SLOTS]      # of the caches the blocks return to
    block_t blocks[OUTBOX_SLOTS]

cdef struct thread_cache_t:         # page-aligned
    # What every allocation reads shares no cache sets with the first bytes of pages, which programs
    # touch most: a page's first lines are for what is cold.
    int64_t used[USED_WORDS]        # a bit a magazine that has ever had room; atomic
    thread_cache_t *next            # of the same heap; guarded by the heap's caches_mutex
    thread_cache_t *previous
    pthread_t thread
    bint is_orphan                  # its thread is gone: a child has only the one that forked
    uint32_t n_slow                 # times the owner was here for more than a pop or push
    uint32_t random                 # state of the xorshift that spaces timed allocations
    # A load whose address has the same lowest 12 bits as a store before may be held up by it.  So
    # what alloc and free store next keeps to page offsets at which heap_t, another mapping, has
    # nothing that they load, but for a few entries of `class_of_pages`; heap_check() looks.
    uint8_t behind_heap[BEHIND_HEAP_BYTES]
    uint32_t own_state              # the state of its live blocks, or 65536, which no state is,
    uint16_t tag                    # ... for STATE_SHARED; and the same without this exception
    owner_lock_t lock
    magazine_age_t ages[MAX_SIZE_CLASSES]
    outbox_t outbox                 # other caches' blocks, freed by this thread
    inbox_t inbox                   # this cache's blocks, freed by others; guarded by its mutex
    magazine_t magazines[MAX_SIZE_CLASSES]

cdef thread_cache_t *thread_cache_new() noexcept nogil
cdef void thread_cache_delete(thread_cache_t *cache) noexcept nogil

# By the owner.
cdef bint thread_cache_refill(
    thread_cache_t *cache, central_t *centrals, block_map_t *map, size_t size_class, int64_t key,
    bint may_grow, block_t *block, bint *fresh, int *error
) noexcept nogil
cdef bint thread_cache_is_timed(
    thread_cache_t *cache, size_t size_class, const int64_t *every
) noexcept nogil
cdef bint thread_cache_free(
    thread_cache_t *cache, central_t *central, block_t block
) noexcept nogil
cdef bint thread_cache_free_shared(
    thread_cache_t *cache, central_t *central, block_t block
) noexcept nogil
cdef int thread_cache_return(
    thread_cache_t *cache, central_t *central, block_t block, uint16_t tag
) noexcept nogil

# For the collector, which has seized the lock.
cdef bint thread_cache_settle(
    thread_cache_t *cache, central_t *centrals, block_map_t *map, int64_t n, bint into_magazines
) noexcept nogil
cdef int64_t thread_cache_next_timed(
    thread_cache_t *cache, int64_t n_allocs, int64_t every
) noexcept nogil

# By anybody.
cdef void thread_cache_note_conflict() noexcept nogil
cdef int64_t thread_cache_n_conflicts() noexcept nogil


cdef inline int64_t magazine_n(const magazine_t *magazine) noexcept nogil:
    """How many blocks are in it, as far as can be told from outside."""
    cdef block_t *top = <block_t *>atomic_load_ptr(<void **>&magazine.top)
    return 0 if top == NULL else top - magazine.blocks


cdef inline void magazine_set_n(magazine_t *magazine, int64_t n) noexcept nogil:
    atomic_store_ptr(<void **>&magazine.top, magazine.blocks + n)


cdef inline int thread_cache_next_used(
    const thread_cache_t *cache, int size_class
) noexcept nogil:
    """The first class from `size_class` on whose magazine was ever used; MAX_SIZE_CLASSES: none."""
    cdef uint64_t bits
    while size_class < MAX_SIZE_CLASSES:
        bits = <uint64_t>atomic_load_i64(&cache.used[size_class // 64]) >> (size_class % 64)
        if bits:
            return size_class + count_trailing_zeros(bits)
        size_class = (size_class | 63) + 1
    return MAX_SIZE_CLASSES


cdef inline char *magazine_pop(thread_cache_t *cache, size_t size_class) noexcept nogil:
    """A block from the owner's magazine, live now; NULL: it is empty, or this one is timed."""
    cdef magazine_t *magazine = &cache.magazines[size_class]
    cdef block_t *top
    cdef char *address = NULL
    cdef int64_t n_allocs
    if LIKELY(owner_enter(&cache.lock)):
        top = magazine.top
        n_allocs = magazine.n_allocs + 1
        if LIKELY(top > magazine.blocks and n_allocs < magazine.next_timed):
            top -= 1
            address = top.address
            atomic_store_u16(top.state, cache.tag)
            atomic_store_ptr(<void **>&magazine.top, top)
            atomic_store_i64(&magazine.n_allocs, n_allocs)
    owner_leave(&cache.lock)
    return address


cdef inline bint magazine_push(
    thread_cache_t *cache, size_t size_class, uint16_t *state, char *address
) noexcept nogil:
    """Free a block: the owner's into its magazine, another cache's into the outbox.

    False, and nothing changed: the block is not live or nobody's, there is no room, the outbox
    wants to be delivered, or the magazine is being collected.
    """
    cdef magazine_t *magazine = &cache.magazines[size_class]
    cdef block_t *top
    cdef uint32_t live
    cdef bint done = False
    if LIKELY(owner_enter(&cache.lock)):
        top = magazine.top
        live = atomic_load_u16(state)
        if LIKELY(live == cache.own_state and top < magazine.limit):
            # No exchange: whoever else frees this block at the same instant only marks it as
            # returning, and does not use it.  If that mark is lost here, it is found missing.
            atomic_store_u16(state, STATE_FREE)
            top.address = address
            top.state = state
            atomic_store_ptr(<void **>&magazine.top, top + 1)
            done = True
        elif (
            has_owner(live) and live != cache.own_state
            and magazine.blocks + cache.outbox.n + 1 < magazine.limit
        ):
            outbox_add(cache, address, state, <uint8_t>live)
            done = True
    owner_leave(&cache.lock)
    return done


cdef inline bint has_owner(uint32_t state) noexcept nogil:
    """True if the block is live, and allocated by a cache that has a tag of its own."""
    return STATE_FIRST_TAG <= state < STATE_SHARED


cdef inline void outbox_add(
    thread_cache_t *cache, char *address, uint16_t *state, uint8_t tag
) noexcept nogil:
    """Free another cache's block; inside the lock, and there is room."""
    cdef uint32_t n = cache.outbox.n
    mark_returning(state)
    cache.outbox.blocks[n].address = address
    cache.outbox.blocks[n].state = state
    cache.outbox.tags[n] = tag
    atomic_store_u32(&cache.outbox.n, n + 1)
