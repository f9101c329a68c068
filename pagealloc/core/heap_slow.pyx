"""What alloc and free do when the magazine is empty or full, or the block is nobody's.

Purpose
    Find a block wherever there may be one; take one back that the fast path leaves alone.
Structure
    supply:    inbox, central list -> slab or page run, idle ones first -> the kernel
    take back: another thread's -> outbox; nobody's -> magazine or central list
Invariants
    a request is refused only after all that is idle has been given up for it
Locking
    What goes past the caches: direct_mutex, so that a fork finds it done or not begun.
Units
    Bytes; pages where named.
"""

from libc.errno cimport ENOMEM
from libc.stdint cimport int64_t, uint16_t

from pagealloc.core.backing cimport ERROR_BUDGET, ERROR_GROWTH, ERROR_RETRY
from pagealloc.core.atomics cimport atomic_add_i64, atomic_store_u16, atomic_swap_u16
from pagealloc.core.block_map cimport (
    FIRST_RUN_CLASS,
    STATE_FREE,
    STATE_SHARED,
    block_map_knows_near,
    known_block_state,
    mark_returning,
)
from pagealloc.core.central cimport central_give_back, central_put, central_take
from pagealloc.core.guard cimport guarded_alloc
from pagealloc.core.heap_caches cimport (
    heap_collect_if_due,
    heap_deliver,
    heap_idle_bytes,
    heap_reclaim,
    heap_return_block,
)
from pagealloc.core.heap_state cimport (
    UNCACHED_RUN,
    heap_block_bytes,
    heap_come_near,
    heap_key_of,
    heap_run_class,
    heap_t,
)
from pagealloc.core.mutex cimport mutex_lock, mutex_unlock
from pagealloc.core.page_heap cimport FREED_NOW, page_heap_alloc, page_heap_has_own_arena
from pagealloc.core.page_map cimport block_t
from pagealloc.core.page_run cimport run_t
from pagealloc.core.size_class cimport NO_CLASS, size_class_aligned
from pagealloc.core.thread_cache cimport (
    OUTBOX_FULL,
    OUTBOX_REFUSED,
    thread_cache_free,
    thread_cache_free_shared,
    thread_cache_refill,
    thread_cache_return,
    thread_cache_t,
)

cdef extern from "poison.h" nogil:
    void unpoison "pagealloc_unpoison"(void *address, size_t nbytes)
    const bint HAS_POISON "PAGEALLOC_HAS_POISON"

cdef enum:
    SLOW_PER_LOOK = 16      # slow paths between two looks at the clock


cdef void heap_note_slow(heap_t *heap, thread_cache_t *cache) noexcept nogil:
    """Every so often, look at the clock: a collection may be due."""
    if cache != NULL:
        cache.n_slow += 1
    if cache == NULL or cache.n_slow % SLOW_PER_LOOK == 0:
        heap_collect_if_due(heap)


# ---------------------------------------------------------------------------------------------
# alloc

cdef char *refill(
    heap_t *heap, thread_cache_t *cache, size_t size_class, int64_t key, bint may_grow, bint *fresh,
    int *error
) noexcept nogil:
    """A block of a class by way of this thread's cache."""
    cdef block_t block
    if not thread_cache_refill(
        cache, heap.centrals, &heap.blocks, size_class, key, may_grow, &block, fresh, error
    ):
        return NULL
    if HAS_POISON:
        unpoison(block.address, heap_block_bytes(heap, block.address, size_class))
    return block.address


cdef char *heap_supply(
    heap_t *heap, thread_cache_t *cache, size_t size_class, size_t nbytes, size_t align_bytes,
    size_t slot_class, bint *fresh, int *error
) noexcept nogil:
    """A block from the inbox, the central list, the page heap, or the kernel.

    `size_class` is the request's, 0 if it is not known yet; `slot_class` as in heap_alloc_slow;
    `cache` is this thread's, NULL if it can have none.  NULL with a code in `error` if refused.

    More is taken from the kernel only when less than that lies idle; and before a request is
    refused, all that is idle has been given up.
    """
    cdef int64_t key
    cdef char *address = NULL
    if heap.guard:
        return guarded_alloc(heap, nbytes, align_bytes, fresh, error)
    heap_note_slow(heap, cache)
    error[0] = ERROR_RETRY
    if cache != NULL and size_class:
        key = 0 if size_class < FIRST_RUN_CLASS else heap_key_of(heap, nbytes, align_bytes)
        address = refill(heap, cache, size_class, key, False, fresh, error)
    if address == NULL and error[0] == ERROR_RETRY:
        address = take(heap, cache, nbytes, align_bytes, slot_class, False, fresh, error)
    if address == NULL and error[0] == ERROR_GROWTH:
        key = heap_key_of(heap, nbytes, align_bytes)
        if heap_idle_bytes(heap) >= <int64_t>(
            nbytes if page_heap_has_own_arena(&heap.pages, key >> 6, <size_t>1 << (key & 63))
            else heap.pages.arena_bytes
        ):
            heap_reclaim(heap)
        address = take(heap, cache, nbytes, align_bytes, slot_class, True, fresh, error)
    if address == NULL and (error[0] == ERROR_BUDGET or error[0] == ENOMEM):
        heap_reclaim(heap)
        address = take(heap, cache, nbytes, align_bytes, slot_class, True, fresh, error)
    if address == NULL and error[0] == ERROR_BUDGET:
        # A run serves a small request as well, at the price of a page; a slab may cost sixteen.
        address = take_run(heap, cache, heap_key_of(heap, nbytes, align_bytes), True, fresh, error)
    if address == NULL:
        atomic_add_i64(&heap.n_failed, 1)
    elif not block_map_knows_near(&heap.blocks):
        heap_come_near(heap, address)
    return address


cdef char *take(
    heap_t *heap, thread_cache_t *cache, size_t nbytes, size_t align_bytes, size_t slot_class,
    bint may_grow, bint *fresh, int *error
) noexcept nogil:
    if slot_class == 0 and align_bytes <= heap.blocks.page_mask:
        slot_class = size_class_aligned(
            &heap.classes, nbytes, align_bytes if align_bytes > 0 else 1
        )
    if slot_class == NO_CLASS:
        return take_run(heap, cache, heap_key_of(heap, nbytes, align_bytes), may_grow, fresh, error)
    return take_block(heap, cache, slot_class, 0, may_grow, fresh, error)


cdef char *take_run(
    heap_t *heap, thread_cache_t *cache, int64_t key, bint may_grow, bint *fresh, int *error
) noexcept nogil:
    cdef size_t size_class
    cdef char *address = NULL
    error[0] = ERROR_RETRY
    while address == NULL and error[0] == ERROR_RETRY:
        size_class = heap_run_class(heap, key)
        if size_class == UNCACHED_RUN:
            return take_uncached(heap, key, may_grow, fresh, error)
        address = take_block(heap, cache, size_class, key, may_grow, fresh, error)
    return address


cdef char *take_block(
    heap_t *heap, thread_cache_t *cache, size_t size_class, int64_t key, bint may_grow, bint *fresh,
    int *error
) noexcept nogil:
    """A block of a class, through this thread's cache if it can have one."""
    cdef block_t block
    cdef bint is_taken
    if cache != NULL:
        return refill(heap, cache, size_class, key, may_grow, fresh, error)
    mutex_lock(&heap.direct_mutex)
    is_taken = central_take(
        &heap.centrals[size_class], key, &block, 1, may_grow, fresh, error
    ) > 0
    if is_taken:
        hand_out(heap, block, size_class)
    mutex_unlock(&heap.direct_mutex)
    return block.address if is_taken else NULL


cdef void hand_out(heap_t *heap, block_t block, size_t size_class) noexcept nogil:
    """Mark a free block that nobody else has as live, and nobody's in particular."""
    if HAS_POISON:
        unpoison(block.address, heap_block_bytes(heap, block.address, size_class))
    atomic_add_i64(&heap.retired_allocs[size_class], 1)
    atomic_store_u16(block.state, STATE_SHARED)


cdef char *take_uncached(
    heap_t *heap, int64_t key, bint may_grow, bint *fresh, int *error
) noexcept nogil:
    """A run straight from the page heap, for a size that found no class."""
    cdef run_t *run
    cdef block_t block
    block.address = NULL
    mutex_lock(&heap.direct_mutex)
    run = page_heap_alloc(
        &heap.pages, key >> 6, <size_t>1 << (key & 63), UNCACHED_RUN, NULL, may_grow, fresh, error
    )
    if run != NULL:
        block.address = run.address
        block.state = known_block_state(&heap.blocks, run.address, UNCACHED_RUN)
        atomic_add_i64(&heap.centrals[UNCACHED_RUN].n_out, 1)
        hand_out(heap, block, UNCACHED_RUN)
    mutex_unlock(&heap.direct_mutex)
    return block.address


# ---------------------------------------------------------------------------------------------
# free

cdef bint heap_take_back(
    heap_t *heap, thread_cache_t *cache, block_t block, size_t size_class, uint16_t live
) noexcept nogil:
    """Free a block whose state is `live`; False if it is that no longer.  `cache` may be NULL."""
    cdef int outcome
    if cache == NULL or size_class == UNCACHED_RUN:
        return take_back_directly(heap, block, size_class, live)
    if live == STATE_SHARED:
        return thread_cache_free_shared(cache, &heap.centrals[size_class], block)
    if live == cache.own_state:
        return thread_cache_free(cache, &heap.centrals[size_class], block)
    outcome = thread_cache_return(cache, &heap.centrals[size_class], block, live)
    if outcome == OUTBOX_FULL:
        heap_deliver(heap, cache)
    return outcome != OUTBOX_REFUSED


cdef bint take_back_directly(
    heap_t *heap, block_t block, size_t size_class, uint16_t live
) noexcept nogil:
    """The same past the caches: by a thread that has none, or of a run that has no class."""
    cdef bint is_freed = True
    mutex_lock(&heap.direct_mutex)
    if live != STATE_SHARED:
        mark_returning(block.state)
        heap_return_block(heap, block, live)
    elif not atomic_swap_u16(block.state, live, STATE_FREE):
        is_freed = False
    elif size_class == UNCACHED_RUN:
        central_give_back(&heap.centrals[UNCACHED_RUN], &block, 1, FREED_NOW)
    else:
        central_put(&heap.centrals[size_class], &block, 1)
    mutex_unlock(&heap.direct_mutex)
    return is_freed
