"""The latency histograms of a heap.

Purpose
    Sort the allocations whose time is taken by size; start and stop taking it.
Structure
    class of slots -> the group of the size class that holds it; class of runs -> its power of two
Invariants
    a class has one group for as long as it has one key
Locking
    caches_mutex while all caches are told; the histograms are atomic.
Units
    Nanoseconds; allocations.
"""

from libc.stdint cimport int64_t

from pagealloc.core.atomics cimport atomic_load_i64, atomic_store_i64
from pagealloc.core.block_map cimport FIRST_RUN_CLASS
from pagealloc.core.heap_state cimport heap_t
from pagealloc.core.collector cimport collector_time_every
from pagealloc.core.latency cimport (
    latency_group_of_pages,
    latency_histograms,
    latency_init,
    latency_page_groups,
)
from pagealloc.core.mutex cimport mutex_lock, mutex_unlock
from pagealloc.core.size_class cimport size_class_of
from pagealloc.core.thread_cache cimport thread_cache_t

from pagealloc.core.latency_histogram import size_group_labels


cdef void heap_latency_init(heap_t *heap) noexcept nogil:
    latency_init(
        &heap.latency, heap.classes.n_classes + latency_page_groups(heap.pages.page_bytes)
    )


cdef int heap_latency_group(heap_t *heap, size_t size_class) noexcept nogil:
    """The group of a class that is in use."""
    if size_class < FIRST_RUN_CLASS:
        return size_class_of(&heap.classes, heap.blocks.slots[size_class].nbytes) - 1
    return heap.classes.n_classes + latency_group_of_pages(
        atomic_load_i64(&heap.centrals[size_class].key) >> 6, heap.pages.page_bytes
    )


cdef void heap_time_every(heap_t *heap, int64_t every) noexcept nogil:
    """Take the time of one allocation in `every`; 0: of none."""
    cdef thread_cache_t *cache
    mutex_lock(&heap.caches_mutex)
    atomic_store_i64(&heap.time_every, every)
    cache = heap.caches
    while cache != NULL:
        collector_time_every(cache, every)
        cache = cache.next
    mutex_unlock(&heap.caches_mutex)


cdef list heap_latencies(heap_t *heap):
    """A LatencyHistogram for each group and NUMA node that has samples."""
    cdef int i
    slots_bytes = [heap.classes.slot_bytes[i] for i in range(1, heap.classes.n_classes + 1)]
    return latency_histograms(
        &heap.latency, size_group_labels(slots_bytes, heap.pages.page_bytes)
    )
