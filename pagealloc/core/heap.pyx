"""A heap: alloc, free, trim, check, nogil; and the process-wide state of the core.

Purpose
    Send each request to the room that serves it, and each address back to where it came from.
Structure
    heap_alloc(n) -> n <= half a page -> size class -> central list -> (slab from the page heap)
                  -> else             -> page heap: a run of exactly ceil(n / page) pages
    heap_free(p)  -> page map -> arena -> run -> slab's slot, or the run itself
Invariants
    what is live is known by the central lists and the page heap; n_allocs and n_frees, counted
    outside their locks, are statistics
    every open heap is in the registry, so that a fork finds all mutexes
Locking
    Order: registry, central lists by class, page heap, page map.  Fork takes them all in this
    order before and releases them after, in the parent and in the child.
Units
    Bytes.
"""

from libc.stdint cimport int64_t
from libc.stdlib cimport calloc, free

from pagealloc.core.arena cimport ERROR_BUDGET
from pagealloc.core.atomics cimport atomic_add_i64, atomic_load_i64
from pagealloc.core.central cimport (
    central_alloc,
    central_destroy,
    central_free,
    central_init,
    central_t,
    central_trim,
    slab_t,
)
from pagealloc.core.mutex cimport mutex_init, mutex_lock, mutex_t, mutex_unlock
from pagealloc.core.os_memory cimport os_at_fork, os_page_bytes
from pagealloc.core.page_heap cimport (
    FREED,
    IN_SLAB,
    page_heap_alloc,
    page_heap_destroy,
    page_heap_free_at,
    page_heap_init,
    page_heap_trim,
)
from pagealloc.core.page_map cimport page_map_init, page_map_t
from pagealloc.core.page_run cimport RUN_LIVE, run_t
from pagealloc.core.size_class cimport (
    NO_CLASS,
    SLOT_UNIT_BYTES,
    size_class_aligned,
    size_class_of,
    size_classes_init,
)

# The process-wide state: one page map, one list of heaps.
cdef page_map_t process_map
cdef mutex_t registry_mutex
cdef heap_t *registry = NULL


# ---------------------------------------------------------------------------------------------
# Life and death

cdef heap_t *heap_new(size_t arena_bytes, int ladder, int64_t budget_bytes) noexcept nogil:
    cdef heap_t *heap = <heap_t *>calloc(1, sizeof(heap_t))
    cdef int i
    if heap == NULL:
        return NULL
    size_classes_init(&heap.classes, os_page_bytes())
    page_heap_init(
        &heap.pages, &process_map, heap, os_page_bytes(), arena_bytes, ladder, budget_bytes
    )
    for i in range(heap.classes.n_classes):
        central_init(&heap.centrals[i], &heap.pages, heap.classes.slot_bytes[i])
    enter_registry(heap)
    return heap


cdef int heap_delete(heap_t *heap) noexcept nogil:
    """Unmap everything; nothing may be live.  An errno value, the heap still usable, on refusal."""
    cdef int i, error
    heap_trim(heap)
    leave_registry(heap)    # before its mutexes go: a fork takes those of every registered heap
    error = page_heap_destroy(&heap.pages)
    if error:
        enter_registry(heap)
        return error
    for i in range(heap.classes.n_classes):
        central_destroy(&heap.centrals[i])
    free(heap)
    return 0


cdef void enter_registry(heap_t *heap) noexcept nogil:
    global registry
    mutex_lock(&registry_mutex)
    heap.previous = NULL
    heap.next = registry
    if heap.next != NULL:
        heap.next.previous = heap
    registry = heap
    mutex_unlock(&registry_mutex)


cdef void leave_registry(heap_t *heap) noexcept nogil:
    global registry
    mutex_lock(&registry_mutex)
    if heap.next != NULL:
        heap.next.previous = heap.previous
    if heap.previous != NULL:
        heap.previous.next = heap.next
    else:
        registry = heap.next
    mutex_unlock(&registry_mutex)


cdef void lock_all() noexcept nogil:
    cdef heap_t *heap
    cdef int i
    mutex_lock(&registry_mutex)
    heap = registry
    while heap != NULL:
        for i in range(heap.classes.n_classes):
            mutex_lock(&heap.centrals[i].mutex)
        mutex_lock(&heap.pages.mutex)
        heap = heap.next
    mutex_lock(&process_map.mutex)


cdef void unlock_all() noexcept nogil:
    cdef heap_t *heap = registry
    cdef int i
    mutex_unlock(&process_map.mutex)
    while heap != NULL:
        mutex_unlock(&heap.pages.mutex)
        for i in range(heap.classes.n_classes):
            mutex_unlock(&heap.centrals[i].mutex)
        heap = heap.next
    mutex_unlock(&registry_mutex)


# ---------------------------------------------------------------------------------------------
# alloc and free

cdef char *heap_alloc(
    heap_t *heap, size_t nbytes, size_t align_bytes, bint *fresh, int *error
) noexcept nogil:
    """Memory of `nbytes`, at least 1, aligned to `align_bytes` (a power of two; 0: the default).

    `fresh` tells that it is zero.  NULL with an errno value or a code in `error` if refused.
    """
    cdef int size_class
    cdef char *address
    if align_bytes <= SLOT_UNIT_BYTES:
        size_class = size_class_of(&heap.classes, nbytes)
    else:
        size_class = size_class_aligned(&heap.classes, nbytes, align_bytes)
    fresh[0] = False
    if size_class != NO_CLASS:
        address = central_alloc(&heap.centrals[size_class], error)
    else:
        address = alloc_run(heap, nbytes, align_bytes, fresh, error)
    if address == NULL and error[0] == ERROR_BUDGET:
        address = alloc_slow(heap, nbytes, align_bytes, fresh, error)
    atomic_add_i64(&heap.n_failed if address == NULL else &heap.n_allocs, 1)
    return address


cdef char *alloc_run(
    heap_t *heap, size_t nbytes, size_t align_bytes, bint *fresh, int *error
) noexcept nogil:
    cdef size_t page_bytes = heap.pages.page_bytes
    cdef run_t *run = page_heap_alloc(
        &heap.pages, <int64_t>((nbytes + page_bytes - 1) // page_bytes),
        align_bytes if align_bytes > page_bytes else page_bytes, RUN_LIVE, NULL, fresh, error
    )
    return NULL if run == NULL else run.address


cdef char *alloc_slow(
    heap_t *heap, size_t nbytes, size_t align_bytes, bint *fresh, int *error
) noexcept nogil:
    """Near the budget: give up the slabs that are kept empty, and do without a new slab.

    A run serves a small request as well, at the price of a page; a slab may cost sixteen.
    """
    cdef int i
    for i in range(heap.classes.n_classes):
        central_trim(&heap.centrals[i])
    return alloc_run(heap, nbytes, align_bytes, fresh, error)


cdef int heap_free(heap_t *heap, char *address) noexcept nogil:
    """Take back what heap_alloc gave: FREED, or NOT_OURS / NOT_LIVE and nothing changed."""
    cdef void *slab = NULL
    cdef int outcome = page_heap_free_at(&heap.pages, address, &slab)
    if outcome == IN_SLAB:
        outcome = central_free(<slab_t *>slab, address)
    if outcome == FREED:
        atomic_add_i64(&heap.n_frees, 1)
    return outcome


cdef int64_t heap_trim(heap_t *heap) noexcept nogil:
    """Give back what is free; returns the physical bytes that went back."""
    cdef int i
    for i in range(heap.classes.n_classes):
        central_trim(&heap.centrals[i])
    return page_heap_trim(&heap.pages)


# ---------------------------------------------------------------------------------------------
# Counts, read under the locks that guard them

cdef heap_counts_t heap_counts(heap_t *heap) noexcept nogil:
    cdef heap_counts_t counts
    cdef int i
    mutex_lock(&heap.pages.mutex)
    counts.reserved_bytes = heap.pages.reserved_bytes
    counts.committed_bytes = heap.pages.committed_bytes
    counts.used_bytes = heap.pages.used_pages * <int64_t>heap.pages.page_bytes
    counts.n_live = heap.pages.n_live_runs
    mutex_unlock(&heap.pages.mutex)
    for i in range(heap.classes.n_classes):
        counts.n_live += heap_class_counts(heap, i).n_live
    counts.n_allocs = atomic_load_i64(&heap.n_allocs)
    counts.n_frees = atomic_load_i64(&heap.n_frees)
    counts.n_failed = atomic_load_i64(&heap.n_failed)
    return counts


cdef class_counts_t heap_class_counts(heap_t *heap, int i) noexcept nogil:
    cdef central_t *central = &heap.centrals[i]
    cdef class_counts_t counts
    mutex_lock(&central.mutex)
    counts.slot_bytes = central.slot_bytes
    counts.n_slots = central.n_slabs * <int64_t>central.n_slots
    counts.n_live = central.n_live
    counts.n_slabs = central.n_slabs
    counts.slab_bytes = central.n_slabs * central.slab_pages * <int64_t>heap.pages.page_bytes
    mutex_unlock(&central.mutex)
    return counts


page_map_init(&process_map)
mutex_init(&registry_mutex, NULL)
if os_at_fork(lock_all, unlock_all, unlock_all) != 0:
    raise MemoryError("pthread_atfork refused to register pagealloc's fork handlers")
