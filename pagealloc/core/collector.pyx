"""What others than its owner do with a thread's magazines and boxes.

Purpose
    Empty another thread's cache, age what lies in it, count it, pass blocks on to it.
Structure
    ages[class]: what a magazine looked like at the last collection, and whether it was a victim
Invariants
    a magazine goes back when two collections in a row found it as they had left it
Locking
    Each function seizes the owner's lock, where the kernel lets it, or takes the inbox's mutex.
    The caller holds the heap's caches_mutex, so that the cache stays.
Units
    Blocks.
"""

from libc.stdint cimport int64_t, uint16_t, uint32_t
from libc.string cimport memcpy

from pagealloc.core.atomics cimport (
    atomic_load_i64,
    atomic_load_u16,
    atomic_load_u32,
    atomic_store_u32,
)
from pagealloc.core.block_map cimport STATE_MARK, block_chunk, block_class, block_map_t
from pagealloc.core.central cimport central_give_back, central_put, central_t
from pagealloc.core.mutex cimport mutex_lock, mutex_unlock
from pagealloc.core.owner_lock cimport owner_lock_release, owner_lock_seize
from pagealloc.core.page_map cimport block_t
from pagealloc.core.thread_cache cimport (
    INBOX_SLOTS,
    MAGAZINE_SLOTS,
    MAX_SIZE_CLASSES,
    magazine_age_t,
    magazine_n,
    magazine_set_n,
    magazine_t,
    outbox_t,
    pthread_equal,
    pthread_self,
    thread_cache_next_timed,
    thread_cache_next_used,
    thread_cache_settle,
    thread_cache_t,
)


cdef int64_t collector_take_outbox(thread_cache_t *cache, outbox_t *outbox) noexcept nogil:
    """Move the outbox into `outbox`: how many blocks.

    By its owner, or by others: then 0 if the kernel refuses to keep the owner out.
    """
    cdef bint is_owner = pthread_equal(cache.thread, pthread_self())
    outbox.n = 0
    if is_owner:
        mutex_lock(&cache.lock.mutex)
    elif atomic_load_u32(&cache.outbox.n) == 0 or not owner_lock_seize(&cache.lock):
        return 0
    memcpy(outbox, &cache.outbox, sizeof(outbox_t))
    atomic_store_u32(&cache.outbox.n, 0)
    if is_owner:
        mutex_unlock(&cache.lock.mutex)
    else:
        owner_lock_release(&cache.lock)
    return outbox.n


cdef uint32_t collector_fill_inbox(
    thread_cache_t *cache, const block_t *blocks, uint32_t n
) noexcept nogil:
    """Put blocks the owner had allocated into its inbox: how many found room."""
    mutex_lock(&cache.inbox.mutex)
    if n > INBOX_SLOTS - cache.inbox.n:
        n = INBOX_SLOTS - cache.inbox.n
    memcpy(cache.inbox.blocks + cache.inbox.n, blocks, n * sizeof(block_t))
    atomic_store_u32(&cache.inbox.n, cache.inbox.n + n)
    mutex_unlock(&cache.inbox.mutex)
    return n


cdef int64_t empty_magazine(magazine_t *magazine, block_t *blocks) noexcept nogil:
    cdef int64_t n = magazine_n(magazine)
    memcpy(blocks, magazine.blocks, <size_t>n * sizeof(block_t))
    if n:
        magazine_set_n(magazine, 0)
    return n


cdef bint collector_drain(
    thread_cache_t *cache, central_t *centrals, block_map_t *map, bint for_good
) noexcept nogil:
    """Empty inbox and magazines into the central lists; `for_good`: magazines to the page heap.

    False, and nothing changed, if the kernel refuses to keep the owner out.
    """
    cdef block_t blocks[MAGAZINE_SLOTS]
    cdef int64_t n
    cdef int i
    if not owner_lock_seize(&cache.lock):
        return False
    while thread_cache_settle(cache, centrals, map, MAGAZINE_SLOTS, False):
        pass
    i = thread_cache_next_used(cache, 0)
    while i < MAX_SIZE_CLASSES:
        n = empty_magazine(&cache.magazines[i], blocks)
        if n and for_good:
            central_give_back(&centrals[i], blocks, n, False)
        elif n:
            central_put(&centrals[i], blocks, n)
        i = thread_cache_next_used(cache, i + 1)
    owner_lock_release(&cache.lock)
    return True


cdef bint is_unused(magazine_t *magazine, magazine_age_t *age) noexcept nogil:
    """True if a magazine holds blocks and has neither given nor taken any since the last look."""
    cdef int64_t n_allocs = atomic_load_i64(&magazine.n_allocs)
    cdef int64_t n = magazine_n(magazine)
    cdef bint unused = n and n == age.n and n_allocs == age.n_allocs
    age.n = n
    age.n_allocs = n_allocs
    return unused


cdef void collector_collect(
    thread_cache_t *cache, central_t *centrals, block_map_t *map
) noexcept nogil:
    """One collection: a magazine unused since the last one is a victim; a victim goes back.

    So does what others have freed.  The caller sees to it that there is one collection at a time.
    """
    cdef block_t blocks[MAGAZINE_SLOTS]
    cdef int64_t n
    cdef bint unused
    cdef bint is_seized = False
    cdef int i = thread_cache_next_used(cache, 0)
    if atomic_load_u32(&cache.inbox.n) and owner_lock_seize(&cache.lock):
        is_seized = True
        while thread_cache_settle(cache, centrals, map, MAGAZINE_SLOTS, False):
            pass
    while i < MAX_SIZE_CLASSES:
        unused = is_unused(&cache.magazines[i], &cache.ages[i])
        if unused and cache.ages[i].is_victim:
            # Only now is the owner disturbed: an idle thread's magazines cost the barrier once.
            if not is_seized and not owner_lock_seize(&cache.lock):
                return      # at the next collection, then
            is_seized = True
            n = empty_magazine(&cache.magazines[i], blocks)
            if n:
                central_give_back(&centrals[i], blocks, n, True)
            unused = False
        cache.ages[i].is_victim = unused
        i = thread_cache_next_used(cache, i + 1)
    if is_seized:
        owner_lock_release(&cache.lock)


cdef bint collector_forget(thread_cache_t *cache, int size_class) noexcept nogil:
    """Close an empty magazine, for its class is about to be that of another size.

    False if it is not empty, which it was when the caller looked, or if the kernel refuses to keep
    the owner out.
    """
    cdef bint is_empty
    if not owner_lock_seize(&cache.lock):
        return False
    is_empty = magazine_n(&cache.magazines[size_class]) == 0
    if is_empty:
        cache.magazines[size_class].top = NULL
        cache.magazines[size_class].limit = NULL
    owner_lock_release(&cache.lock)
    return is_empty


cdef inline void count_returning(
    block_map_t *map, const block_t *block, uint16_t tag, int64_t *n_idle
) noexcept nogil:
    """Count a block in a box; not one that two threads freed, and the other free had it."""
    if atomic_load_u16(block.state) == (tag | STATE_MARK):
        n_idle[block_class(map, block_chunk(map, block.address), block.address)] += 1


cdef void collector_count_idle(
    thread_cache_t *cache, block_map_t *map, int64_t *n_idle
) noexcept nogil:
    """Add its free blocks to the counts of their classes."""
    cdef bint is_seized = False
    cdef uint32_t k
    cdef int i = thread_cache_next_used(cache, 0)
    while i < MAX_SIZE_CLASSES:
        n_idle[i] += magazine_n(&cache.magazines[i])
        i = thread_cache_next_used(cache, i + 1)
    if atomic_load_u32(&cache.outbox.n):
        is_seized = owner_lock_seize(&cache.lock)
    if is_seized:
        for k in range(cache.outbox.n):
            count_returning(map, &cache.outbox.blocks[k], cache.outbox.tags[k], n_idle)
        owner_lock_release(&cache.lock)
    mutex_lock(&cache.inbox.mutex)
    for k in range(cache.inbox.n):
        count_returning(map, &cache.inbox.blocks[k], cache.tag, n_idle)
    mutex_unlock(&cache.inbox.mutex)


cdef void collector_time_every(thread_cache_t *cache, int64_t every) noexcept nogil:
    """From now on take the time of one allocation in `every`; 0: of none."""
    cdef int i
    if not owner_lock_seize(&cache.lock):
        return
    i = thread_cache_next_used(cache, 0)
    while i < MAX_SIZE_CLASSES:
        cache.magazines[i].next_timed = thread_cache_next_timed(
            cache, cache.magazines[i].n_allocs, every
        )
        i = thread_cache_next_used(cache, i + 1)
    owner_lock_release(&cache.lock)
