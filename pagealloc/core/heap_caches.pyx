"""The caches of all threads of a heap, and how what is idle in them goes back.

Purpose
    Know all caches of a heap; carry what one thread freed to the thread that had allocated it; take
    back what nobody uses.
Structure
    thread A: outbox --deliver--> thread B: inbox, by the tag of B's cache
    collect:  what was not used for two collections  -> page heap, slabs
    reclaim:  all that is idle                       -> page heap, slabs
    trim:     the same, and from there to the kernel
Invariants
    cache_of_tag[cache.tag] = cache, but for STATE_SHARED, which many may have
Locking
    caches_mutex for the list and the tags; under it one cache's lock at a time.
Units
    Blocks; bytes where named.
"""

from libc.stdint cimport int64_t, uint16_t, uint32_t
from libc.string cimport memset

from pagealloc.core.atomics cimport (
    atomic_add_i64,
    atomic_load_i64,
    atomic_store_i64,
    atomic_swap_u16,
)
from pagealloc.core.block_map cimport (
    STATE_FIRST_TAG,
    STATE_FREE,
    STATE_MARK,
    STATE_SHARED,
    block_chunk,
    block_class,
)
from pagealloc.core.central cimport central_collect, central_put, central_trim
from pagealloc.core.collector cimport (
    collector_collect,
    collector_count_idle,
    collector_drain,
    collector_fill_inbox,
    collector_take_outbox,
)
from pagealloc.core.heap_state cimport MAX_SIZE_CLASSES, heap_t, next_class
from pagealloc.core.mutex cimport mutex_lock, mutex_trylock, mutex_unlock
from pagealloc.core.os_memory cimport os_coarse_now_ns
from pagealloc.core.owner_lock cimport owner_lock_orphan
from pagealloc.core.page_map cimport block_t
from pagealloc.core.page_purge cimport page_heap_begin_trim, page_heap_end_trim
from pagealloc.core.thread_cache cimport (
    outbox_t,
    thread_cache_delete,
    thread_cache_note_conflict,
    thread_cache_t,
)
from pagealloc.core.trace cimport trace_collection, trace_is_on, trace_now_ns

cdef enum:
    NO_STATE = 1 << 16
    COLLECTION_INTERVAL_NS = 500 * 1000 * 1000


cdef void heap_add_cache(heap_t *heap, thread_cache_t *cache) noexcept nogil:
    """Enter a new cache, under a tag of its own if there is one left."""
    cdef uint32_t tag = STATE_FIRST_TAG
    mutex_lock(&heap.caches_mutex)
    while tag < STATE_SHARED and heap.cache_of_tag[tag] != NULL:
        tag += 1
    cache.tag = <uint16_t>tag
    cache.own_state = tag
    if tag == STATE_SHARED:
        cache.own_state = NO_STATE
    else:
        heap.cache_of_tag[tag] = cache
    cache.next = heap.caches
    if cache.next != NULL:
        cache.next.previous = cache
    heap.caches = cache
    mutex_unlock(&heap.caches_mutex)


# ---------------------------------------------------------------------------------------------
# Locked: the caller holds caches_mutex

cdef void deliver(heap_t *heap, block_t *blocks, uint32_t n, uint16_t tag) noexcept nogil:
    """Carry blocks to the inbox of the cache they belong to.

    Where the inbox is full, all of it goes to the central lists; where the cache is gone, or cannot
    be drained for the kernel refuses the barrier, the blocks.
    """
    cdef thread_cache_t *cache = heap.cache_of_tag[tag]
    cdef uint32_t n_accepted
    while cache != NULL and n:
        n_accepted = collector_fill_inbox(cache, blocks, n)
        blocks += n_accepted
        n -= n_accepted
        if n and not collector_drain(cache, heap.centrals, &heap.blocks, False):
            break
    while n:            # by exchange: nobody's lock keeps others from freeing them as well
        if atomic_swap_u16(blocks.state, tag | STATE_MARK, STATE_FREE):
            central_put(&heap.centrals[class_of(heap, blocks)], blocks, 1)
        else:
            thread_cache_note_conflict()
        blocks += 1
        n -= 1


cdef size_t class_of(heap_t *heap, const block_t *block) noexcept nogil:
    return block_class(&heap.blocks, block_chunk(&heap.blocks, block.address), block.address)


cdef void deliver_outbox(heap_t *heap, thread_cache_t *cache) noexcept nogil:
    cdef outbox_t outbox
    cdef uint32_t i = 0, end
    collector_take_outbox(cache, &outbox)
    while i < outbox.n:
        end = i + 1
        while end < outbox.n and outbox.tags[end] == outbox.tags[i]:
            end += 1
        deliver(heap, &outbox.blocks[i], end - i, outbox.tags[i])
        i = end


cdef void heap_retire_cache(heap_t *heap, thread_cache_t *cache, bint for_good) noexcept nogil:
    """Empty a cache whose lock is orphaned, and delete it; the caller holds caches_mutex."""
    cdef int i
    deliver_outbox(heap, cache)
    collector_drain(cache, heap.centrals, &heap.blocks, for_good)
    if cache.tag != STATE_SHARED:
        heap.cache_of_tag[cache.tag] = NULL
    i = next_class(heap, 0)
    while i < MAX_SIZE_CLASSES:
        if cache.magazines[i].n_allocs:
            atomic_add_i64(&heap.retired_allocs[i], cache.magazines[i].n_allocs)
        i = next_class(heap, i)
    if cache.next != NULL:
        cache.next.previous = cache.previous
    if cache.previous != NULL:
        cache.previous.next = cache.next
    else:
        heap.caches = cache.next
    thread_cache_delete(cache)


cdef void heap_drop_caches(heap_t *heap) noexcept nogil:
    """When nobody uses the heap: its caches go without asking their threads."""
    cdef thread_cache_t *cache
    mutex_lock(&heap.caches_mutex)
    cache = heap.caches
    while cache != NULL:    # all of them first, for one may have to be drained to take another's
        owner_lock_orphan(&cache.lock)
        cache = cache.next
    while heap.caches != NULL:
        heap_retire_cache(heap, heap.caches, True)
    mutex_unlock(&heap.caches_mutex)


cdef void heap_deliver(heap_t *heap, thread_cache_t *cache) noexcept nogil:
    """Carry what is in a cache's outbox to the caches it belongs to."""
    mutex_lock(&heap.caches_mutex)
    deliver_outbox(heap, cache)
    mutex_unlock(&heap.caches_mutex)


cdef void heap_return_block(heap_t *heap, block_t block, uint16_t tag) noexcept nogil:
    """The same for one block, freed by a thread that has no cache."""
    mutex_lock(&heap.caches_mutex)
    deliver(heap, &block, 1, tag)
    mutex_unlock(&heap.caches_mutex)


# ---------------------------------------------------------------------------------------------
# What is idle, and how it goes back

cdef void heap_hold(heap_t *heap) noexcept nogil:
    """Keep collections, deliveries and ends of threads from moving blocks until heap_let_go."""
    mutex_lock(&heap.collect_mutex)
    mutex_lock(&heap.caches_mutex)


cdef void heap_let_go(heap_t *heap) noexcept nogil:
    mutex_unlock(&heap.caches_mutex)
    mutex_unlock(&heap.collect_mutex)


cdef void heap_count_idle(heap_t *heap, int64_t *n_idle) noexcept nogil:
    """Add the free blocks in caches and central lists to the counts of their classes.

    The caller holds caches_mutex.
    """
    cdef thread_cache_t *cache = heap.caches
    cdef int i
    while cache != NULL:
        collector_count_idle(cache, &heap.blocks, n_idle)
        cache = cache.next
    i = next_class(heap, 0)
    while i < MAX_SIZE_CLASSES:
        mutex_lock(&heap.centrals[i].mutex)
        n_idle[i] += heap.centrals[i].n_idle
        mutex_unlock(&heap.centrals[i].mutex)
        i = next_class(heap, i)


cdef int64_t heap_idle_bytes(heap_t *heap) noexcept nogil:
    """What lies free in caches and central lists."""
    cdef int64_t n_idle[MAX_SIZE_CLASSES]
    cdef int64_t idle_bytes = 0
    cdef int i
    memset(n_idle, 0, sizeof(n_idle))
    mutex_lock(&heap.caches_mutex)
    heap_count_idle(heap, n_idle)
    mutex_unlock(&heap.caches_mutex)
    i = next_class(heap, 0)
    while i < MAX_SIZE_CLASSES:
        mutex_lock(&heap.centrals[i].mutex)     # a class may be becoming that of another size
        idle_bytes += n_idle[i] * <int64_t>heap.centrals[i].block_bytes
        mutex_unlock(&heap.centrals[i].mutex)
        i = next_class(heap, i)
    return idle_bytes


cdef void deliver_all(heap_t *heap) noexcept nogil:
    """Empty all outboxes; the caller holds caches_mutex."""
    cdef thread_cache_t *cache = heap.caches
    while cache != NULL:
        deliver_outbox(heap, cache)
        cache = cache.next


cdef void heap_reclaim(heap_t *heap) noexcept nogil:
    """Give all that is idle back to the page heap, where it merges and serves any size."""
    cdef thread_cache_t *cache
    cdef thread_cache_t *next_cache
    cdef int i
    mutex_lock(&heap.collect_mutex)
    mutex_lock(&heap.caches_mutex)
    deliver_all(heap)
    cache = heap.caches
    while cache != NULL:
        next_cache = cache.next
        if cache.is_orphan:
            heap_retire_cache(heap, cache, True)
        else:
            collector_drain(cache, heap.centrals, &heap.blocks, True)
        cache = next_cache
    mutex_unlock(&heap.caches_mutex)
    i = next_class(heap, 0)
    while i < MAX_SIZE_CLASSES:
        central_trim(&heap.centrals[i])
        i = next_class(heap, i)
    mutex_unlock(&heap.collect_mutex)


cdef void heap_collect(heap_t *heap) noexcept nogil:
    """One collection: what was not used since the last one, and not before it, goes back.

    Nothing if another thread is collecting.
    """
    cdef thread_cache_t *cache
    cdef thread_cache_t *next_cache
    cdef int64_t begun_at_ns = trace_now_ns()
    cdef int64_t idle_bytes_before = heap_idle_bytes(heap) if trace_is_on() else 0, idle_bytes
    cdef int i
    if mutex_trylock(&heap.collect_mutex) != 0:
        return
    mutex_lock(&heap.caches_mutex)
    deliver_all(heap)
    cache = heap.caches
    while cache != NULL:
        next_cache = cache.next
        if cache.is_orphan:
            heap_retire_cache(heap, cache, True)
        else:
            collector_collect(cache, heap.centrals, &heap.blocks)
        cache = next_cache
    mutex_unlock(&heap.caches_mutex)
    i = next_class(heap, 0)
    while i < MAX_SIZE_CLASSES:
        central_collect(&heap.centrals[i])
        i = next_class(heap, i)
    atomic_add_i64(&heap.n_collections, 1)
    mutex_unlock(&heap.collect_mutex)
    if trace_is_on():
        idle_bytes = heap_idle_bytes(heap)
        if idle_bytes != idle_bytes_before:     # else it would be a line every half second
            trace_collection(heap.generation, begun_at_ns, idle_bytes_before, idle_bytes)


cdef void heap_collect_if_due(heap_t *heap) noexcept nogil:
    """Collect if the last one was long ago: where the purger does not see to it."""
    cdef int64_t now_ns
    if atomic_load_i64(&heap.is_watched):
        return
    now_ns = os_coarse_now_ns()
    if now_ns < atomic_load_i64(&heap.next_collection_ns):
        return
    atomic_store_i64(&heap.next_collection_ns, now_ns + COLLECTION_INTERVAL_NS)
    heap_collect(heap)


cdef int64_t heap_trim(heap_t *heap) noexcept nogil:
    """Give back what is free; returns the physical bytes that went back."""
    cdef int64_t begun_at_bytes = page_heap_begin_trim(&heap.pages)
    heap_reclaim(heap)
    return page_heap_end_trim(&heap.pages, begun_at_bytes)
