"""A heap's state, and the process's: what all heaps share."""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from pagealloc.core.atomics cimport atomic_load_i64
from pagealloc.core.central cimport central_t
from pagealloc.core.mutex cimport mutex_t
from pagealloc.core.page_heap cimport page_heap_t
from pagealloc.core.page_map cimport page_map_t
from pagealloc.core.size_class cimport size_classes_t
from pagealloc.core.thread_cache cimport FIRST_RUN_CLASS, MAX_SIZE_CLASSES, thread_cache_t

cdef enum:
    MAX_HEAPS = 1024                # open at a time with magazines; further ones do without
    MAX_TABLE_PAGES = 16384         # runs up to here find their class by one load
    N_KEY_HINTS = 256

cdef struct slot_shape_t:
    uint32_t nbytes                 # 0: there is no such class
    uint32_t reciprocal             # ceil(2**32 / nbytes): offset * reciprocal >> 32 = offset / nbytes

cdef struct heap_t:
    # What alloc and free read; written once.
    page_map_t *map
    int64_t generation              # no heap before or after has the same
    uint32_t id                     # its place in a thread's table; MAX_HEAPS: none
    uint32_t page_shift             # log2 of the page size
    size_t page_mask                # page_bytes - 1
    size_t chunk_page_mask          # pages of a chunk - 1
    size_t largest_table_bytes      # of a request that finds its class by `class_of_pages`
    uint8_t live_mark               # the state of a live block: another heap's is another, mostly
    size_classes_t classes
    slot_shape_t slots[FIRST_RUN_CLASS]
    # Classes of runs; 0: none yet.  Atomic.
    uint16_t class_of_pages[MAX_TABLE_PAGES + 1]    # aligned to a page
    uint16_t key_hints[N_KEY_HINTS]                 # by hash of the key; to be verified

    page_heap_t pages
    central_t centrals[MAX_SIZE_CLASSES]
    int64_t n_failed                # atomic
    int64_t n_collections           # atomic
    int64_t next_collection_ns      # atomic
    mutex_t collect_mutex           # one collection at a time
    mutex_t classes_mutex
    int64_t n_slot_classes          # ids 1 .. n are in use; written under classes_mutex; atomic
    int64_t n_run_classes           # ids FIRST_RUN_CLASS .. are; written under classes_mutex; atomic
    int64_t n_collections_seen      # at the last vain search for a class to reuse
    mutex_t caches_mutex
    thread_cache_t *caches          # of all threads
    int64_t retired_allocs[MAX_SIZE_CLASSES]        # by threads that are gone; atomic
    heap_t *next                    # guarded by the registry's mutex
    heap_t *previous

cdef struct heap_counts_t:
    int64_t reserved_bytes
    int64_t committed_bytes
    int64_t live_bytes          # handed out, in whole slots and pages
    int64_t idle_bytes          # free, in magazines and central lists
    int64_t n_live              # slots and runs
    int64_t n_allocs
    int64_t n_frees
    int64_t n_failed
    int64_t n_collections

cdef struct class_counts_t:
    int64_t block_bytes
    int64_t n_live
    int64_t n_idle              # in magazines and the central list
    int64_t n_slabs
    int64_t n_unused_slots      # in slabs
    int64_t n_allocs

cdef heap_t *heap_new(size_t arena_bytes, int ladder, int64_t budget_bytes) noexcept nogil
cdef int heap_delete(heap_t *heap) noexcept nogil
cdef int heap_run_class(heap_t *heap, int64_t key) noexcept nogil
cdef int heap_exact_class(heap_t *heap, uint32_t slot_bytes) noexcept nogil
cdef void heap_add_cache(heap_t *heap, thread_cache_t *cache) noexcept nogil
cdef void heap_retire_cache(uint32_t id, int64_t generation, thread_cache_t *cache) noexcept nogil
cdef int64_t heap_idle_bytes(heap_t *heap) noexcept nogil
cdef void heap_reclaim(heap_t *heap) noexcept nogil
cdef void heap_collect(heap_t *heap) noexcept nogil
cdef int64_t heap_trim(heap_t *heap) noexcept nogil
cdef bint heap_collect_if_due(heap_t *heap) noexcept nogil
cdef heap_counts_t heap_counts(heap_t *heap) noexcept nogil
cdef class_counts_t heap_class_counts(heap_t *heap, int size_class) noexcept nogil
cdef const char *heap_check(heap_t *heap) noexcept nogil


cdef inline int64_t heap_end_class(heap_t *heap) noexcept nogil:
    """One past the last class of runs in use."""
    return FIRST_RUN_CLASS + atomic_load_i64(&heap.n_run_classes)


cdef inline uint32_t heap_key_hint(int64_t key) noexcept nogil:
    return <uint32_t>((<uint64_t>key * <uint64_t>0x9E3779B97F4A7C15) >> 56)
