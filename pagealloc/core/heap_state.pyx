"""The size classes of a heap.

Purpose
    Give every size of slot, and of page run, a number by which its magazines, its central list and
    its blocks are found.
Structure
    request -> pages, alignment -> key -> class_of_pages[] (a page's alignment), or key_hints[]
Invariants
    a class of runs is found by its key, and by no other; UNCACHED_RUN has no key
    n_out(class) = live + idle in its central list + in magazines + in boxes, on their way there
Locking
    The order of all locks of a heap: registry, direct, collect, classes, caches, a cache's lock,
    central lists by class, page heap, page map.  Here: classes_mutex.
Units
    Classes; bytes and pages where named.
"""

from libc.stdint cimport int64_t, uint16_t, uint32_t

from pagealloc.core.atomics cimport (
    atomic_add_i64,
    atomic_load_i64,
    atomic_load_u16,
    atomic_store_i64,
    atomic_store_u16,
)
from pagealloc.core.block_map cimport block_map_add_slots, block_map_come_near
from pagealloc.core.central cimport (
    central_init_runs,
    central_init_slots,
    central_reuse,
    central_t,
    run_key,
)
from pagealloc.core.collector cimport collector_forget
from pagealloc.core.mutex cimport mutex_lock, mutex_unlock
from pagealloc.core.page_heap cimport page_heap_run_bytes
from pagealloc.core.size_class cimport NO_CLASS, size_class_aligned, size_classes_init


cdef void heap_init_classes(heap_t *heap) noexcept nogil:
    """The classes every heap has: those of slots, and the one of runs without a class."""
    cdef int i
    size_classes_init(&heap.classes, heap.pages.page_bytes)
    heap.largest_table_bytes = MAX_TABLE_PAGES * heap.pages.page_bytes
    for i in range(1, heap.classes.n_classes + 1):
        add_slot_class(heap, heap.classes.slot_bytes[i])
    central_init_runs(
        &heap.centrals[UNCACHED_RUN], &heap.pages, &heap.blocks, UNCACHED_RUN, run_key(1, 1)
    )


cdef int add_slot_class(heap_t *heap, uint32_t slot_bytes) noexcept nogil:
    cdef int i = <int>heap.n_slot_classes + 1
    central_init_slots(&heap.centrals[i], &heap.pages, &heap.blocks, <uint16_t>i, slot_bytes)
    block_map_add_slots(&heap.blocks, i, slot_bytes)
    atomic_store_i64(&heap.n_slot_classes, i)
    return i


cdef int heap_exact_class(heap_t *heap, uint32_t slot_bytes) noexcept nogil:
    """The class of slots of exactly `slot_bytes`, 64 to half a page; 0 if there are too many."""
    cdef int i
    mutex_lock(&heap.classes_mutex)
    for i in range(1, <int>heap.n_slot_classes + 1):
        if heap.blocks.slots[i].nbytes == slot_bytes:
            break
    else:
        i = 0
        if heap.n_slot_classes + 1 < FIRST_RUN_CLASS:
            i = add_slot_class(heap, slot_bytes)
    mutex_unlock(&heap.classes_mutex)
    return i


cdef inline uint16_t *place_of_key(heap_t *heap, int64_t key) noexcept nogil:
    """Where the class of `key` is looked for first."""
    if key & 63 == heap.blocks.page_shift and key >> 6 <= MAX_TABLE_PAGES:
        return &heap.class_of_pages[key >> 6]
    return &heap.key_hints[heap_key_hint(key)]


cdef int heap_run_class(heap_t *heap, int64_t key) noexcept nogil:
    """The class of runs of `key`, new if need be; UNCACHED_RUN if there are too many."""
    cdef int size_class, end_class
    mutex_lock(&heap.classes_mutex)
    end_class = FIRST_RUN_CLASS + <int>heap.n_run_classes
    size_class = FIRST_RUN_CLASS
    while size_class < end_class and atomic_load_i64(&heap.centrals[size_class].key) != key:
        size_class += 1
    if size_class == end_class:
        if size_class < UNCACHED_RUN:
            central_init_runs(
                &heap.centrals[size_class], &heap.pages, &heap.blocks, <uint16_t>size_class, key
            )
            atomic_add_i64(&heap.n_run_classes, 1)
        else:
            size_class = reuse_class(heap, key)
    if size_class != UNCACHED_RUN:
        atomic_store_u16(place_of_key(heap, key), <uint16_t>size_class)
    mutex_unlock(&heap.classes_mutex)
    return size_class


cdef bint forget_class(heap_t *heap, int size_class) noexcept nogil:
    cdef thread_cache_t *cache
    cdef bint done = True
    mutex_lock(&heap.caches_mutex)
    cache = heap.caches
    while cache != NULL and done:
        done = collector_forget(cache, size_class)
        cache = cache.next
    mutex_unlock(&heap.caches_mutex)
    return done


cdef int reuse_class(heap_t *heap, int64_t key) noexcept nogil:
    """Give an unused class to other runs; UNCACHED_RUN if all are in use.

    Searched once a collection: it is collections that make classes unused.
    """
    cdef int64_t n_collections = atomic_load_i64(&heap.n_collections)
    cdef central_t *central
    cdef uint16_t *place
    cdef uint16_t old_class
    cdef int size_class
    if n_collections == heap.n_collections_seen:
        return UNCACHED_RUN
    for size_class in range(FIRST_RUN_CLASS, UNCACHED_RUN):
        central = &heap.centrals[size_class]
        if atomic_load_i64(&central.n_out):
            continue
        # Nobody finds it by its old key, then nobody's magazine has room for it, then it changes.
        place = place_of_key(heap, central.key)
        old_class = atomic_load_u16(place)
        if old_class == size_class:
            atomic_store_u16(place, 0)
        if forget_class(heap, size_class) and central_reuse(central, key):
            return size_class
        atomic_store_u16(place, old_class)
    heap.n_collections_seen = n_collections
    return UNCACHED_RUN


cdef size_t heap_class_of_unusual(heap_t *heap, size_t nbytes, size_t align_bytes) noexcept nogil:
    """The class of any request, also aligned to more than usual or too large for the table.

    0: not known yet.
    """
    cdef int64_t key
    cdef size_t size_class
    if align_bytes <= heap.blocks.page_mask + 1 and nbytes <= heap.largest_table_bytes:
        size_class = size_class_aligned(
            &heap.classes, nbytes, align_bytes if align_bytes > 0 else 1
        )
        return size_class if size_class != NO_CLASS else heap_class_of(
            heap, nbytes if nbytes > heap.blocks.page_mask else heap.blocks.page_mask + 1
        )
    key = heap_key_of(heap, nbytes, align_bytes)
    size_class = atomic_load_u16(&heap.key_hints[heap_key_hint(key)])
    return size_class if atomic_load_i64(&heap.centrals[size_class].key) == key else 0


cdef size_t heap_block_bytes(heap_t *heap, const char *address, size_t size_class) noexcept nogil:
    """The length of a block whose class is known."""
    if size_class == UNCACHED_RUN:
        return page_heap_run_bytes(&heap.pages, address)
    return heap.centrals[size_class].block_bytes


cdef void heap_come_near(heap_t *heap, const void *address) noexcept nogil:
    """Note where the heap's first block lies, for the short way to it and its like."""
    mutex_lock(&heap.classes_mutex)
    block_map_come_near(&heap.blocks, address)
    mutex_unlock(&heap.classes_mutex)
