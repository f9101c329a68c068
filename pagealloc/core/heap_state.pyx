"""The life of heaps: how one begins and ends, what it keeps idle, what fork() does with all.

Purpose
    Everything about a heap but the way of one allocation: its size classes, the caches of its
    threads, collections, counts, and the registry of all heaps of the process.
Structure
    registry --> heap --> page heap            the memory
                      --> centrals[class]      free blocks of a size
                      --> caches               magazines, one thread_cache_t a thread
    classes: 1 .. slots | FIRST_RUN_CLASS .. runs, as they are first asked for | UNCACHED_RUN
Invariants
    n_out(class) = live(class) + n_idle(class) + sum of its magazines' n
    a class of runs is found by its key, and by no other; UNCACHED_RUN has no key
    every open heap is in the registry, so that a fork finds all mutexes
Locking
    Order: registry, collect, classes, caches, a cache's lock, central lists by class, page heap,
    page map.  Fork takes them all in this order before and releases them after, in the parent and
    in the child.
Units
    Blocks; bytes where named.
"""

from libc.stdint cimport INT64_MAX, int64_t, uint8_t, uint16_t, uint32_t, uintptr_t

from pagealloc.core.arena cimport arena_t
from pagealloc.core.atomics cimport (
    atomic_add_i64,
    atomic_load_i64,
    atomic_load_u8,
    atomic_load_u16,
    atomic_store_i64,
    atomic_store_u16,
)
from pagealloc.core.central cimport (
    central_check,
    central_collect,
    central_destroy,
    central_drain,
    central_init_runs,
    central_init_slots,
    central_reuse,
    central_t,
    central_trim,
    count_trailing_zeros,
    run_key,
)
from pagealloc.core.mutex cimport (
    mutex_destroy,
    mutex_init,
    mutex_lock,
    mutex_t,
    mutex_trylock,
    mutex_unlock,
)
from pagealloc.core.os_memory cimport (
    os_abandon,
    os_at_fork,
    os_coarse_now_ns,
    os_page_bytes,
    os_reserve,
)
from pagealloc.core.owner_lock cimport owner_lock_orphan
from pagealloc.core.page_heap cimport (
    page_heap_check,
    page_heap_destroy,
    page_heap_init,
    page_heap_trim,
)
from pagealloc.core.page_map cimport (
    CHUNK_BYTES,
    chunk_t,
    page_map_chunk,
    page_map_init,
    page_map_t,
)
from pagealloc.core.size_class cimport SLOT_UNIT_BYTES, size_classes_init
from pagealloc.core.thread_cache cimport (
    UNCACHED_RUN,
    pthread_equal,
    pthread_self,
    thread_cache_collect,
    thread_cache_delete,
    thread_cache_drain,
    thread_cache_forget,
    thread_cache_idle,
)

cdef enum:
    COLLECTION_INTERVAL_NS = 500 * 1000 * 1000

# The process-wide state: one page map, one list of heaps, and who has which place in it.
cdef page_map_t process_map
cdef mutex_t registry_mutex
cdef heap_t *registry = NULL
cdef heap_t *heap_of_id[MAX_HEAPS]
cdef int64_t last_generation = 0


# ---------------------------------------------------------------------------------------------
# Life and death

cdef inline size_t heap_bytes() noexcept nogil:
    return (sizeof(heap_t) + os_page_bytes() - 1) // os_page_bytes() * os_page_bytes()


cdef heap_t *heap_new(size_t arena_bytes, int ladder, int64_t budget_bytes) noexcept nogil:
    # Mapped: most of its classes are never used.
    cdef heap_t *heap = <heap_t *>os_reserve(heap_bytes(), os_page_bytes())
    cdef int i
    if heap == NULL:
        return NULL
    heap.map = &process_map
    heap.page_shift = <uint32_t>count_trailing_zeros(os_page_bytes())
    heap.page_mask = os_page_bytes() - 1
    heap.chunk_page_mask = (CHUNK_BYTES >> heap.page_shift) - 1
    heap.largest_table_bytes = <size_t>MAX_TABLE_PAGES << heap.page_shift
    size_classes_init(&heap.classes, os_page_bytes())
    page_heap_init(
        &heap.pages, &process_map, heap, os_page_bytes(), arena_bytes, ladder, budget_bytes
    )
    for i in range(1, heap.classes.n_classes + 1):
        add_slot_class(heap, heap.classes.slot_bytes[i])
    central_init_runs(&heap.centrals[UNCACHED_RUN], &heap.pages, UNCACHED_RUN, run_key(1, 1))
    mutex_init(&heap.collect_mutex, NULL)
    mutex_init(&heap.classes_mutex, NULL)
    mutex_init(&heap.caches_mutex, NULL)
    enter_registry(heap)
    return heap


cdef int heap_delete(heap_t *heap) noexcept nogil:
    """Unmap everything; nothing may be live.  An errno value, the heap still usable, on refusal."""
    cdef int i, error
    heap_trim(heap)
    leave_registry(heap)    # before its mutexes go: a fork takes those of every registered heap
    drop_caches(heap)
    i = next_class(heap, 0)
    while i < MAX_SIZE_CLASSES:
        central_trim(&heap.centrals[i])
        i = next_class(heap, i)
    error = page_heap_destroy(&heap.pages)
    if error:
        enter_registry(heap)
        return error
    i = next_class(heap, 0)
    while i < MAX_SIZE_CLASSES:
        central_destroy(&heap.centrals[i])
        i = next_class(heap, i)
    mutex_destroy(&heap.collect_mutex)
    mutex_destroy(&heap.classes_mutex)
    mutex_destroy(&heap.caches_mutex)
    os_abandon(heap, heap_bytes())
    return 0


cdef void enter_registry(heap_t *heap) noexcept nogil:
    """Make it known, under a generation of its own: no thread's cache of before is valid."""
    global registry, last_generation
    mutex_lock(&registry_mutex)
    last_generation += 1
    heap.generation = last_generation
    heap.live_mark = <uint8_t>(1 + last_generation % 255)
    heap.id = 0
    while heap.id < MAX_HEAPS and heap_of_id[heap.id] != NULL:
        heap.id += 1
    if heap.id < MAX_HEAPS:
        heap_of_id[heap.id] = heap
    heap.previous = NULL
    heap.next = registry
    if heap.next != NULL:
        heap.next.previous = heap
    registry = heap
    mutex_unlock(&registry_mutex)


cdef void leave_registry(heap_t *heap) noexcept nogil:
    global registry
    mutex_lock(&registry_mutex)
    if heap.id < MAX_HEAPS:
        heap_of_id[heap.id] = NULL
    if heap.next != NULL:
        heap.next.previous = heap.previous
    if heap.previous != NULL:
        heap.previous.next = heap.next
    else:
        registry = heap.next
    mutex_unlock(&registry_mutex)


# ---------------------------------------------------------------------------------------------
# Size classes

cdef int next_class(heap_t *heap, int i) noexcept nogil:
    """The next class in use after `i`, 0 to begin; MAX_SIZE_CLASSES at the end."""
    i += 1
    if i <= atomic_load_i64(&heap.n_slot_classes):
        return i
    if i < FIRST_RUN_CLASS:
        i = FIRST_RUN_CLASS
    if i < heap_end_class(heap):
        return i
    return UNCACHED_RUN if i <= UNCACHED_RUN else MAX_SIZE_CLASSES


cdef int add_slot_class(heap_t *heap, uint32_t slot_bytes) noexcept nogil:
    cdef int i = <int>heap.n_slot_classes + 1
    central_init_slots(&heap.centrals[i], &heap.pages, <uint16_t>i, slot_bytes)
    heap.slots[i].nbytes = slot_bytes
    heap.slots[i].reciprocal = <uint32_t>(((<int64_t>1 << 32) + slot_bytes - 1) // slot_bytes)
    atomic_store_i64(&heap.n_slot_classes, i)
    return i


cdef int heap_exact_class(heap_t *heap, uint32_t slot_bytes) noexcept nogil:
    """The class of slots of exactly `slot_bytes`, 64 to half a page; 0 if there are too many."""
    cdef int i
    mutex_lock(&heap.classes_mutex)
    for i in range(1, <int>heap.n_slot_classes + 1):
        if heap.slots[i].nbytes == slot_bytes:
            break
    else:
        i = 0
        if heap.n_slot_classes + 1 < FIRST_RUN_CLASS:
            i = add_slot_class(heap, slot_bytes)
    mutex_unlock(&heap.classes_mutex)
    return i


cdef inline uint16_t *place_of_key(heap_t *heap, int64_t key) noexcept nogil:
    """Where the class of `key` is looked for first."""
    if key & 63 == heap.page_shift and key >> 6 <= MAX_TABLE_PAGES:
        return &heap.class_of_pages[key >> 6]
    return &heap.key_hints[heap_key_hint(key)]


cdef int heap_run_class(heap_t *heap, int64_t key) noexcept nogil:
    """The class of runs of `key`, new if need be; UNCACHED_RUN if there are too many."""
    cdef int size_class
    mutex_lock(&heap.classes_mutex)
    size_class = FIRST_RUN_CLASS
    while size_class < heap_end_class(heap):
        if atomic_load_i64(&heap.centrals[size_class].key) == key:
            break
        size_class += 1
    if size_class == heap_end_class(heap):
        if size_class < UNCACHED_RUN:
            central_init_runs(
                &heap.centrals[size_class], &heap.pages, <uint16_t>size_class, key
            )
            atomic_add_i64(&heap.n_run_classes, 1)
        else:
            size_class = reuse_class(heap, key)
    if size_class != UNCACHED_RUN:
        atomic_store_u16(place_of_key(heap, key), <uint16_t>size_class)
    mutex_unlock(&heap.classes_mutex)
    return size_class


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


# ---------------------------------------------------------------------------------------------
# The caches of all threads

cdef bint forget_class(heap_t *heap, int size_class) noexcept nogil:
    cdef thread_cache_t *cache
    cdef bint done = True
    mutex_lock(&heap.caches_mutex)
    cache = heap.caches
    while cache != NULL and done:
        done = thread_cache_forget(cache, size_class)
        cache = cache.next
    mutex_unlock(&heap.caches_mutex)
    return done


cdef void heap_add_cache(heap_t *heap, thread_cache_t *cache) noexcept nogil:
    mutex_lock(&heap.caches_mutex)
    cache.next = heap.caches
    if cache.next != NULL:
        cache.next.previous = cache
    heap.caches = cache
    mutex_unlock(&heap.caches_mutex)


cdef bint retire(heap_t *heap, thread_cache_t *cache, bint for_good) noexcept nogil:
    """Empty a cache whose thread is gone, and delete it; the caller holds caches_mutex."""
    cdef int i
    if not thread_cache_drain(cache, heap.centrals, for_good):
        return False
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
    return True


cdef void heap_retire_cache(uint32_t id, int64_t generation, thread_cache_t *cache) noexcept nogil:
    """At a thread's end: its blocks go to the central lists; nothing if the heap is closed."""
    cdef heap_t *heap
    mutex_lock(&registry_mutex)
    heap = heap_of_id[id]
    if heap != NULL and heap.generation == generation:
        mutex_lock(&heap.caches_mutex)
        if not retire(heap, cache, False):
            cache.is_orphan = True      # no barrier now: the next collection tries again
        mutex_unlock(&heap.caches_mutex)
    mutex_unlock(&registry_mutex)


cdef void drop_caches(heap_t *heap) noexcept nogil:
    """When nobody uses the heap: its caches go without asking their threads."""
    mutex_lock(&heap.caches_mutex)
    while heap.caches != NULL:
        owner_lock_orphan(&heap.caches.lock)
        while not retire(heap, heap.caches, True):
            pass
    mutex_unlock(&heap.caches_mutex)


# ---------------------------------------------------------------------------------------------
# What is idle, and how it goes back

cdef int64_t idle_of_class(heap_t *heap, int size_class) noexcept nogil:
    """Blocks in magazines and the central list; the caller holds caches_mutex."""
    cdef thread_cache_t *cache = heap.caches
    cdef int64_t n_idle
    mutex_lock(&heap.centrals[size_class].mutex)
    n_idle = heap.centrals[size_class].n_idle
    mutex_unlock(&heap.centrals[size_class].mutex)
    while cache != NULL:
        n_idle += thread_cache_idle(cache, size_class)
        cache = cache.next
    return n_idle


cdef int64_t heap_idle_bytes(heap_t *heap) noexcept nogil:
    """What lies free in magazines and central lists."""
    cdef int64_t idle_bytes = 0
    cdef int i
    mutex_lock(&heap.caches_mutex)
    i = next_class(heap, 0)
    while i < MAX_SIZE_CLASSES:
        idle_bytes += idle_of_class(heap, i) * <int64_t>heap.centrals[i].block_bytes
        i = next_class(heap, i)
    mutex_unlock(&heap.caches_mutex)
    return idle_bytes


cdef void heap_reclaim(heap_t *heap) noexcept nogil:
    """Give all that is idle back to the page heap, where it merges and serves any size."""
    cdef thread_cache_t *cache
    cdef thread_cache_t *next_cache
    cdef int i
    mutex_lock(&heap.caches_mutex)
    cache = heap.caches
    while cache != NULL:
        next_cache = cache.next
        if cache.is_orphan:
            retire(heap, cache, True)
        else:
            thread_cache_drain(cache, heap.centrals, True)
        cache = next_cache
    mutex_unlock(&heap.caches_mutex)
    i = next_class(heap, 0)
    while i < MAX_SIZE_CLASSES:
        central_trim(&heap.centrals[i])
        i = next_class(heap, i)


cdef void heap_collect(heap_t *heap) noexcept nogil:
    """One collection: what was not used since the last one, and not before it, goes back.

    Nothing if another thread is collecting.
    """
    cdef thread_cache_t *cache
    cdef thread_cache_t *next_cache
    cdef int i
    if mutex_trylock(&heap.collect_mutex) != 0:
        return
    mutex_lock(&heap.caches_mutex)
    cache = heap.caches
    while cache != NULL:
        next_cache = cache.next
        if cache.is_orphan:
            retire(heap, cache, True)
        else:
            thread_cache_collect(cache, heap.centrals)
        cache = next_cache
    mutex_unlock(&heap.caches_mutex)
    i = next_class(heap, 0)
    while i < MAX_SIZE_CLASSES:
        central_collect(&heap.centrals[i])
        i = next_class(heap, i)
    atomic_add_i64(&heap.n_collections, 1)
    mutex_unlock(&heap.collect_mutex)


cdef bint heap_collect_if_due(heap_t *heap) noexcept nogil:
    """Collect if the last one was long ago; from paths that are slow anyway."""
    cdef int64_t now_ns = os_coarse_now_ns()
    if now_ns < atomic_load_i64(&heap.next_collection_ns):
        return False
    atomic_store_i64(&heap.next_collection_ns, now_ns + COLLECTION_INTERVAL_NS)
    heap_collect(heap)
    return True


cdef int64_t heap_trim(heap_t *heap) noexcept nogil:
    """Give back what is free; returns the physical bytes that went back."""
    heap_reclaim(heap)
    return page_heap_trim(&heap.pages)


# ---------------------------------------------------------------------------------------------
# Fork

cdef void lock_heap(heap_t *heap) noexcept nogil:
    cdef thread_cache_t *cache
    cdef int i
    mutex_lock(&heap.collect_mutex)
    mutex_lock(&heap.classes_mutex)
    mutex_lock(&heap.caches_mutex)
    cache = heap.caches
    while cache != NULL:
        mutex_lock(&cache.lock.mutex)
        cache = cache.next
    i = next_class(heap, 0)
    while i < MAX_SIZE_CLASSES:
        mutex_lock(&heap.centrals[i].mutex)
        i = next_class(heap, i)
    mutex_lock(&heap.pages.mutex)


cdef void unlock_heap(heap_t *heap) noexcept nogil:
    cdef thread_cache_t *cache
    cdef int i
    mutex_unlock(&heap.pages.mutex)
    i = next_class(heap, 0)
    while i < MAX_SIZE_CLASSES:
        mutex_unlock(&heap.centrals[i].mutex)
        i = next_class(heap, i)
    cache = heap.caches
    while cache != NULL:
        mutex_unlock(&cache.lock.mutex)
        cache = cache.next
    mutex_unlock(&heap.caches_mutex)
    mutex_unlock(&heap.classes_mutex)
    mutex_unlock(&heap.collect_mutex)


cdef void lock_all() noexcept nogil:
    cdef heap_t *heap
    mutex_lock(&registry_mutex)
    heap = registry
    while heap != NULL:
        lock_heap(heap)
        heap = heap.next
    mutex_lock(&process_map.mutex)


cdef void unlock_all() noexcept nogil:
    cdef heap_t *heap = registry
    mutex_unlock(&process_map.mutex)
    while heap != NULL:
        unlock_heap(heap)
        heap = heap.next
    mutex_unlock(&registry_mutex)


cdef void unlock_all_in_child() noexcept nogil:
    """The parent's other threads are not here: what their magazines hold is for the next
    collection to take.  A block one of them was just moving is lost to this process."""
    cdef heap_t *heap = registry
    cdef thread_cache_t *cache
    while heap != NULL:
        cache = heap.caches
        while cache != NULL:
            if not pthread_equal(cache.thread, pthread_self()):
                owner_lock_orphan(&cache.lock)
                cache.is_orphan = True
            cache = cache.next
        heap = heap.next
    unlock_all()


# ---------------------------------------------------------------------------------------------
# Counts, each read under the lock that guards it

cdef class_counts_t heap_class_counts(heap_t *heap, int size_class) noexcept nogil:
    cdef class_counts_t counts
    mutex_lock(&heap.caches_mutex)
    counts = class_counts(heap, size_class)
    mutex_unlock(&heap.caches_mutex)
    return counts


cdef class_counts_t class_counts(heap_t *heap, int size_class) noexcept nogil:
    cdef central_t *central = &heap.centrals[size_class]
    cdef thread_cache_t *cache = heap.caches
    cdef class_counts_t counts
    counts.n_idle = idle_of_class(heap, size_class)
    counts.n_live = atomic_load_i64(&central.n_out) - counts.n_idle
    counts.n_allocs = atomic_load_i64(&heap.retired_allocs[size_class])
    while cache != NULL:
        counts.n_allocs += atomic_load_i64(&cache.magazines[size_class].n_allocs)
        cache = cache.next
    mutex_lock(&central.mutex)
    counts.block_bytes = <int64_t>central.block_bytes
    counts.n_slabs = central.slabs.n_slabs
    counts.n_unused_slots = (
        central.slabs.n_slabs * <int64_t>central.slabs.n_slots - central.slabs.n_taken
    )
    mutex_unlock(&central.mutex)
    return counts


cdef heap_counts_t heap_counts(heap_t *heap) noexcept nogil:
    cdef heap_counts_t counts
    cdef class_counts_t of_class
    cdef int64_t run_idle_bytes = 0, slab_bytes = 0, live_slot_bytes = 0
    cdef int i
    counts.n_live = counts.n_allocs = counts.idle_bytes = 0
    mutex_lock(&heap.caches_mutex)
    i = next_class(heap, 0)
    while i < MAX_SIZE_CLASSES:
        of_class = class_counts(heap, i)
        counts.n_live += of_class.n_live
        counts.n_allocs += of_class.n_allocs
        counts.idle_bytes += of_class.n_idle * of_class.block_bytes
        if i < FIRST_RUN_CLASS:
            live_slot_bytes += of_class.n_live * of_class.block_bytes
            slab_bytes += (
                of_class.n_slabs * heap.centrals[i].slabs.slab_pages
                * <int64_t>heap.pages.page_bytes
            )
        else:
            run_idle_bytes += of_class.n_idle * of_class.block_bytes
        i = next_class(heap, i)
    mutex_unlock(&heap.caches_mutex)
    mutex_lock(&heap.pages.mutex)
    counts.reserved_bytes = heap.pages.reserved_bytes
    counts.committed_bytes = heap.pages.committed_bytes
    counts.live_bytes = heap.pages.used_pages * <int64_t>heap.pages.page_bytes
    mutex_unlock(&heap.pages.mutex)
    counts.live_bytes += live_slot_bytes - slab_bytes - run_idle_bytes
    counts.n_frees = counts.n_allocs - counts.n_live
    counts.n_failed = atomic_load_i64(&heap.n_failed)
    counts.n_collections = atomic_load_i64(&heap.n_collections)
    return counts


cdef void count_live_of_page(
    heap_t *heap, const char *address, int64_t *n_live
) noexcept nogil:
    cdef chunk_t *chunk = page_map_chunk(heap.map, address)
    cdef size_t page = (<uintptr_t>address >> heap.page_shift) & heap.chunk_page_mask
    cdef int size_class = chunk.class_of_page[page]
    cdef uint8_t *states = chunk.state_of_slot + page * (heap.pages.page_bytes // SLOT_UNIT_BYTES)
    cdef size_t i
    if size_class >= FIRST_RUN_CLASS:
        n_live[size_class] += atomic_load_u8(&chunk.state_of_page[page]) == heap.live_mark
    elif size_class:
        for i in range(heap.pages.page_bytes // heap.slots[size_class].nbytes):
            n_live[size_class] += atomic_load_u8(&states[i]) == heap.live_mark


cdef const char *heap_check(heap_t *heap) noexcept nogil:
    """NULL, or which invariant is broken.  Exact only while no other thread uses the heap."""
    cdef const char *broken = page_heap_check(&heap.pages)
    cdef int64_t n_live[MAX_SIZE_CLASSES]
    cdef arena_t *arena
    cdef size_t offset
    cdef int i
    for i in range(MAX_SIZE_CLASSES):
        n_live[i] = 0
    mutex_lock(&heap.pages.mutex)
    arena = heap.pages.arenas
    while arena != NULL:
        offset = 0
        while offset < (CHUNK_BYTES if arena.dedicated else arena.nbytes):
            count_live_of_page(heap, arena.address + offset, n_live)
            offset += heap.pages.page_bytes
        arena = arena.next
    mutex_unlock(&heap.pages.mutex)
    i = next_class(heap, 0)
    while i < MAX_SIZE_CLASSES and broken == NULL:
        broken = central_check(&heap.centrals[i])
        if broken == NULL and heap_class_counts(heap, i).n_live != n_live[i]:
            broken = "the blocks out and not idle are not the live ones"
        i = next_class(heap, i)
    return broken


page_map_init(&process_map)
mutex_init(&registry_mutex, NULL)
if os_at_fork(lock_all, unlock_all, unlock_all_in_child) != 0:
    raise MemoryError("pthread_atfork refused to register pagealloc's fork handlers")
