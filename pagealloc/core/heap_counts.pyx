"""What a heap holds, counted; and whether that adds up.

Purpose
    Derive counts from what there is, so that alloc and free need not keep any but one.
Structure
    n_live = n_out - idle, n_frees = n_allocs - n_live
Invariants
    those that heap_check() verifies
Locking
    Each number is read under the lock that guards it, one after another, while the heap is held:
    together they are exact unless another thread allocates or frees meanwhile.  A thread that ends
    does neither, nor does a collection.
Units
    Blocks; bytes where named.
"""

from libc.stdint cimport int64_t, uint16_t, uintptr_t
from libc.string cimport memset

from pagealloc.core.arena cimport arena_t
from pagealloc.core.atomics cimport atomic_load_i64, atomic_load_u16
from pagealloc.core.block_map cimport FIRST_RUN_CLASS, block_chunk, block_class, is_live
from pagealloc.core.central cimport central_check, central_t
from pagealloc.core.heap_caches cimport heap_count_idle, heap_hold, heap_let_go
from pagealloc.core.heap_state cimport MAX_SIZE_CLASSES, heap_t, next_class
from pagealloc.core.mutex cimport mutex_lock, mutex_unlock
from pagealloc.core.page_heap cimport page_heap_check
from pagealloc.core.page_map cimport CHUNK_BYTES, chunk_t
from pagealloc.core.size_class cimport SLOT_UNIT_BYTES
from pagealloc.core.thread_cache cimport thread_cache_n_conflicts, thread_cache_t


cdef void heap_count_classes(heap_t *heap, class_counts_t *counts) noexcept nogil:
    """Fill in the counts of every class in use, by its number."""
    heap_hold(heap)
    count_classes(heap, counts)
    heap_let_go(heap)


cdef void count_classes(heap_t *heap, class_counts_t *counts) noexcept nogil:
    cdef int64_t n_idle[MAX_SIZE_CLASSES]
    cdef central_t *central
    cdef int i
    memset(n_idle, 0, sizeof(n_idle))
    heap_count_idle(heap, n_idle)
    i = next_class(heap, 0)
    while i < MAX_SIZE_CLASSES:
        central = &heap.centrals[i]
        counts[i].n_idle = n_idle[i]
        counts[i].n_allocs = n_allocs_of(heap, i)
        mutex_lock(&central.mutex)
        # Below 0 while what two threads freed in one instant lies in boxes twice.
        counts[i].n_live = max(<int64_t>0, atomic_load_i64(&central.n_out) - n_idle[i])
        counts[i].block_bytes = <int64_t>central.block_bytes
        counts[i].n_slabs = central.slabs.n_slabs
        counts[i].n_unused_slots = (
            central.slabs.n_slabs * <int64_t>central.slabs.n_slots - central.slabs.n_taken
        )
        mutex_unlock(&central.mutex)
        i = next_class(heap, i)


cdef int64_t n_allocs_of(heap_t *heap, int size_class) noexcept nogil:
    cdef int64_t n_allocs = atomic_load_i64(&heap.retired_allocs[size_class])
    cdef thread_cache_t *cache = heap.caches
    while cache != NULL:
        n_allocs += atomic_load_i64(&cache.magazines[size_class].n_allocs)
        cache = cache.next
    return n_allocs


cdef heap_counts_t heap_counts(heap_t *heap) noexcept nogil:
    cdef class_counts_t of_class[MAX_SIZE_CLASSES]
    cdef heap_counts_t counts
    cdef int64_t idle_run_bytes = 0, slab_bytes = 0, live_slot_bytes = 0
    cdef int i
    memset(&counts, 0, sizeof(counts))
    memset(of_class, 0, sizeof(of_class))   # a class that comes after they are counted has nothing
    heap_hold(heap)
    count_classes(heap, of_class)
    i = next_class(heap, 0)
    while i < MAX_SIZE_CLASSES:
        counts.n_live += of_class[i].n_live
        counts.n_allocs += of_class[i].n_allocs
        counts.idle_bytes += of_class[i].n_idle * of_class[i].block_bytes
        if i < FIRST_RUN_CLASS:
            live_slot_bytes += of_class[i].n_live * of_class[i].block_bytes
            slab_bytes += of_class[i].n_slabs * heap.centrals[i].slabs.slab_pages
        else:
            idle_run_bytes += of_class[i].n_idle * of_class[i].block_bytes
        i = next_class(heap, i)
    slab_bytes *= <int64_t>heap.pages.page_bytes
    mutex_lock(&heap.pages.mutex)
    counts.reserved_bytes = heap.pages.reserved_bytes
    counts.committed_bytes = heap.pages.committed_bytes
    counts.active_bytes = heap.pages.used_pages * <int64_t>heap.pages.page_bytes
    counts.purged_bytes = heap.pages.purged_bytes
    mutex_unlock(&heap.pages.mutex)
    heap_let_go(heap)
    counts.live_bytes = counts.active_bytes + live_slot_bytes - slab_bytes - idle_run_bytes
    counts.n_frees = counts.n_allocs - counts.n_live
    counts.n_failed = atomic_load_i64(&heap.n_failed)
    counts.n_collections = atomic_load_i64(&heap.n_collections)
    counts.n_conflicts = thread_cache_n_conflicts()
    return counts


cdef void count_live_of_page(
    heap_t *heap, const char *address, int64_t *n_live
) noexcept nogil:
    cdef chunk_t *chunk = block_chunk(&heap.blocks, address)
    cdef size_t page = (<uintptr_t>address >> heap.blocks.page_shift) & heap.blocks.chunk_page_mask
    cdef uint16_t *states = chunk.state_of_slot + page * (heap.pages.page_bytes // SLOT_UNIT_BYTES)
    cdef int size_class = <int>block_class(&heap.blocks, chunk, address)
    cdef size_t i
    if size_class >= FIRST_RUN_CLASS:
        n_live[size_class] += is_live(atomic_load_u16(&chunk.pages[page].state))
    elif size_class:
        for i in range(heap.pages.page_bytes // heap.blocks.slots[size_class].nbytes):
            n_live[size_class] += is_live(atomic_load_u16(&states[i]))


cdef bint lie_apart(const heap_t *heap, const thread_cache_t *cache) noexcept nogil:
    """True if alloc and free load from the heap, and store here, at different page offsets."""
    cdef size_t loaded_bytes = <const char *>heap.class_of_pages - <const char *>heap
    cdef size_t stored_at = <const char *>&cache.own_state - <const char *>cache
    return loaded_bytes <= stored_at and stored_at + sizeof(cache.lock) <= 4096


cdef const char *heap_check(heap_t *heap) noexcept nogil:
    """NULL, or which invariant is broken.  Exact only while no other thread uses the heap."""
    cdef const char *broken = page_heap_check(&heap.pages)
    cdef int64_t n_live[MAX_SIZE_CLASSES]
    cdef arena_t *arena
    cdef size_t offset
    cdef class_counts_t counts[MAX_SIZE_CLASSES]
    cdef int i
    memset(n_live, 0, sizeof(n_live))
    heap_hold(heap)
    count_classes(heap, counts)
    if broken == NULL and heap.caches != NULL and not lie_apart(heap, heap.caches):
        broken = "stores into a thread's cache hold up loads from the heap"
    mutex_lock(&heap.pages.mutex)
    arena = heap.pages.arenas
    while arena != NULL:
        offset = 0
        while offset < (CHUNK_BYTES if arena.dedicated else arena.nbytes):
            count_live_of_page(heap, arena.address + offset, n_live)
            offset += heap.pages.page_bytes
        arena = arena.next
    mutex_unlock(&heap.pages.mutex)
    heap_let_go(heap)
    i = next_class(heap, 0)
    while i < MAX_SIZE_CLASSES and broken == NULL:
        broken = central_check(&heap.centrals[i])
        if broken == NULL and counts[i].n_live != n_live[i]:
            broken = "the blocks out and not idle are not the live ones"
        i = next_class(heap, i)
    return broken
