"""The life of heaps: how one begins and ends, and what fork() does with all.

Purpose
    Make and unmake heaps; know all of the process.
Structure
    registry --> heap --> heap --> ...      heap_of_id[id] --> heap
Invariants
    every open heap is in the registry, so that a fork finds all mutexes
    a heap that is held stays, though it may be in use by everybody else
    no two heaps ever have the same generation: a thread's cache for a heap that is closed matches
    none
Locking
    registry_mutex, the first of all (see heap_state).  Fork takes all mutexes in order before and
    releases them after, in the parent and in the child.
Units
    Bytes.
"""

from libc.stdint cimport int64_t, uint32_t

from pagealloc.core.arenas cimport arenas_leave_hugetlb
from pagealloc.core.atomics cimport atomic_load_i64, atomic_store_i64
from pagealloc.core.block_map cimport block_map_init
from pagealloc.core.central cimport central_destroy, central_trim
from pagealloc.core.heap_caches cimport heap_drop_caches, heap_retire_cache
from pagealloc.core.heap_latency cimport heap_latency_init
from pagealloc.core.heap_state cimport (
    MAX_HEAPS,
    MAX_SIZE_CLASSES,
    heap_init_classes,
    heap_options_t,
    heap_t,
    next_class,
)
from pagealloc.core.latency cimport latency_destroy
from pagealloc.core.mutex cimport mutex_destroy, mutex_init, mutex_lock, mutex_t, mutex_unlock
from pagealloc.core.os_memory cimport (
    os_abandon,
    os_at_fork,
    os_page_bytes,
    os_reserve,
    os_wait_briefly,
)
from pagealloc.core.owner_lock cimport owner_lock_orphan, owner_lock_release, owner_lock_seize
from pagealloc.core.page_heap cimport page_heap_destroy, page_heap_init
from pagealloc.core.page_map cimport page_map_init, page_map_t
from pagealloc.core.thread_cache cimport pthread_equal, pthread_self, thread_cache_t

# The process-wide state: one page map, one list of heaps, and who has which place in it.
cdef page_map_t process_map
cdef mutex_t registry_mutex
cdef heap_t *registry = NULL
cdef heap_t *heap_of_id[MAX_HEAPS]
cdef heap_t *held_heap = NULL       # by the purger: it is not unmade meanwhile
cdef int64_t last_generation = 0


cdef inline size_t heap_bytes() noexcept nogil:
    return (sizeof(heap_t) + os_page_bytes() - 1) // os_page_bytes() * os_page_bytes()


cdef heap_t *heap_new(const heap_options_t *options) noexcept nogil:
    # Mapped: most of its classes are never used.
    cdef heap_t *heap = <heap_t *>os_reserve(heap_bytes(), os_page_bytes())
    if heap == NULL:
        return NULL
    block_map_init(&heap.blocks, &process_map, os_page_bytes())
    page_heap_init(
        &heap.pages, &process_map, heap, os_page_bytes(), options.arena_bytes, &options.placement,
        options.budget_bytes
    )
    heap.purge_after_ns = options.purge_after_ns
    heap.zero_on_reuse = options.zero_on_reuse
    heap.guard = options.guard
    heap_init_classes(heap)
    heap.largest_fast_bytes = 0 if heap.zero_on_reuse else heap.largest_table_bytes
    heap_latency_init(heap)
    mutex_init(&heap.direct_mutex)
    mutex_init(&heap.collect_mutex)
    mutex_init(&heap.classes_mutex)
    mutex_init(&heap.caches_mutex)
    enter_registry(heap)
    return heap


cdef int heap_delete(heap_t *heap) noexcept nogil:
    """Unmap everything; nothing may be live.  An errno value, the heap still usable, on refusal."""
    cdef int i, error
    leave_registry(heap)    # before its mutexes go: a fork takes those of every registered heap
    heap_drop_caches(heap)
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
    latency_destroy(&heap.latency)
    mutex_destroy(&heap.direct_mutex)
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
    heap.pages.number = last_generation
    heap.id = MAX_HEAPS if heap.guard else 0
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
    cdef int n_waits = 0
    mutex_lock(&registry_mutex)
    while held_heap == heap:
        mutex_unlock(&registry_mutex)
        os_wait_briefly(n_waits)
        n_waits += 1
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


cdef heap_t *heap_hold_next(int64_t generation) noexcept nogil:
    """Hold the next heap that the purger watches, after the one of `generation`; NULL: no more."""
    global held_heap
    cdef heap_t *heap
    mutex_lock(&registry_mutex)
    held_heap = NULL
    heap = registry
    while heap != NULL:
        if heap.generation > generation and atomic_load_i64(&heap.is_watched) and (
            held_heap == NULL or heap.generation < held_heap.generation
        ):
            held_heap = heap
        heap = heap.next
    heap = held_heap
    mutex_unlock(&registry_mutex)
    return heap


cdef void heap_release_held() noexcept nogil:
    global held_heap
    mutex_lock(&registry_mutex)
    held_heap = NULL
    mutex_unlock(&registry_mutex)


cdef void heap_end_thread(
    uint32_t id, int64_t generation, thread_cache_t *cache
) noexcept nogil:
    """At a thread's end: its blocks go to the central lists; nothing if the heap is closed."""
    cdef heap_t *heap
    mutex_lock(&registry_mutex)
    heap = heap_of_id[id]
    if heap != NULL and heap.generation == generation:
        mutex_lock(&heap.caches_mutex)
        owner_lock_orphan(&cache.lock)
        heap_retire_cache(heap, cache, False)
        mutex_unlock(&heap.caches_mutex)
    mutex_unlock(&registry_mutex)


# ---------------------------------------------------------------------------------------------
# Fork

cdef void lock_heap(heap_t *heap) noexcept nogil:
    cdef thread_cache_t *cache
    cdef int i
    mutex_lock(&heap.direct_mutex)
    mutex_lock(&heap.collect_mutex)
    mutex_lock(&heap.classes_mutex)
    mutex_lock(&heap.caches_mutex)
    cache = heap.caches
    while cache != NULL:
        # Seized, so that no thread is in the middle of moving a block when the child comes to be.
        # Without a barrier a block may be lost to the child, and nothing worse.
        if not owner_lock_seize(&cache.lock):
            mutex_lock(&cache.lock.mutex)
        mutex_lock(&cache.inbox.mutex)
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
        mutex_unlock(&cache.inbox.mutex)
        owner_lock_release(&cache.lock)
        cache = cache.next
    mutex_unlock(&heap.caches_mutex)
    mutex_unlock(&heap.classes_mutex)
    mutex_unlock(&heap.collect_mutex)
    mutex_unlock(&heap.direct_mutex)


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
    collection to take, and the purger is started again when it is needed."""
    global held_heap
    cdef heap_t *heap = registry
    cdef thread_cache_t *cache
    held_heap = NULL
    while heap != NULL:
        atomic_store_i64(&heap.is_watched, False)
        arenas_leave_hugetlb(&heap.pages)
        cache = heap.caches
        while cache != NULL:
            if not pthread_equal(cache.thread, pthread_self()):
                owner_lock_orphan(&cache.lock)
                cache.is_orphan = True
            cache = cache.next
        heap = heap.next
    unlock_all()


page_map_init(&process_map)
mutex_init(&registry_mutex)
if os_at_fork(lock_all, unlock_all, unlock_all_in_child) != 0:
    raise MemoryError("pthread_atfork refused to register pagealloc's fork handlers")
