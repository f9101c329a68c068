"""A heap: what it is made of, and its size classes.

Classes are numbered: 1 .. n_slot_classes are slots, those below half a page first and then exact
ones; FIRST_RUN_CLASS .. are page runs of one page count and alignment, in the order in which they
were first asked for; UNCACHED_RUN is all runs that found no number left.
"""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from pagealloc.core.atomics cimport atomic_load_i64, atomic_load_u16
from pagealloc.core.backing cimport placement_t
from pagealloc.core.block_map cimport FIRST_RUN_CLASS, block_map_t
from pagealloc.core.central cimport central_t, run_key
from pagealloc.core.latency cimport latency_t
from pagealloc.core.mutex cimport mutex_t
from pagealloc.core.page_heap cimport page_heap_t
from pagealloc.core.size_class cimport size_class_of, size_classes_t
from pagealloc.core.thread_cache cimport MAX_SIZE_CLASSES, UNCACHED_RUN, thread_cache_t

cdef enum:
    MAX_HEAPS = 1024                # open at a time with magazines; further ones do without
    MAX_TABLE_PAGES = 16384         # runs up to here find their class by one load
    N_KEY_HINTS = 256
    N_TAGS = 256

cdef enum:                      # what a heap guards
    GUARD_SLOT = 1              # the page behind each block
    GUARD_FREED = 2             # what was freed, until it is used again

cdef struct heap_options_t:         # what a heap is told when it is made
    size_t arena_bytes
    placement_t placement
    int64_t budget_bytes            # -1: none
    int64_t purge_after_ns          # 0: never by itself
    bint zero_on_reuse              # what was in use before is handed out as zeros
    int guard                       # GUARD_...

cdef struct heap_t:             # page-aligned: cold fields first, as in thread_cache_t
    mutex_t direct_mutex            # who moves a block past the caches; so that no fork is between
    mutex_t collect_mutex           # one collection at a time
    mutex_t classes_mutex
    mutex_t caches_mutex
    heap_t *next                    # guarded by the registry's mutex
    heap_t *previous
    # What alloc and free read; written once.
    int64_t generation              # no heap before or after has the same
    uint32_t id                     # its place in a thread's table; MAX_HEAPS: none
    size_t largest_table_bytes      # of a request that finds its class by `class_of_pages`
    size_t largest_fast_bytes       # of one that takes the fast path; 0 if all are to be zeroed
    block_map_t blocks
    size_classes_t classes
    # Classes of runs; 0: none yet.  Atomic.
    uint16_t class_of_pages[MAX_TABLE_PAGES + 1]    # aligned to a page
    uint16_t key_hints[N_KEY_HINTS]                 # by hash of the key; to be verified

    page_heap_t pages
    central_t centrals[MAX_SIZE_CLASSES]
    latency_t latency
    int64_t time_every              # one allocation in so many is timed; 0: none; atomic
    int64_t purge_after_ns          # 0: never by itself
    bint zero_on_reuse
    int guard                       # GUARD_...; not 0: no magazines
    int64_t is_watched              # by the purger; atomic
    int64_t next_purge_ns           # atomic
    int64_t n_failed                # atomic
    int64_t n_collections           # atomic
    int64_t next_collection_ns      # atomic
    int64_t n_slot_classes          # written under classes_mutex; atomic
    int64_t n_run_classes           # the same
    int64_t n_collections_seen      # at the last vain search for a class to reuse
    thread_cache_t *caches          # of all threads
    thread_cache_t *cache_of_tag[N_TAGS]
    int64_t retired_allocs[MAX_SIZE_CLASSES]        # of threads that are gone; atomic

cdef void heap_init_classes(heap_t *heap) noexcept nogil
cdef int heap_run_class(heap_t *heap, int64_t key) noexcept nogil
cdef int heap_exact_class(heap_t *heap, uint32_t slot_bytes) noexcept nogil
cdef size_t heap_class_of_unusual(heap_t *heap, size_t nbytes, size_t align_bytes) noexcept nogil
cdef size_t heap_block_bytes(heap_t *heap, const char *address, size_t size_class) noexcept nogil
cdef void heap_come_near(heap_t *heap, const void *address) noexcept nogil


cdef inline int next_class(heap_t *heap, int size_class) noexcept nogil:
    """The next class in use after `size_class`, 0 to begin; MAX_SIZE_CLASSES at the end."""
    size_class += 1
    if size_class <= atomic_load_i64(&heap.n_slot_classes):
        return size_class
    if size_class < FIRST_RUN_CLASS:
        size_class = FIRST_RUN_CLASS
    if size_class < FIRST_RUN_CLASS + atomic_load_i64(&heap.n_run_classes):
        return size_class
    return UNCACHED_RUN if size_class <= UNCACHED_RUN else MAX_SIZE_CLASSES


cdef inline uint32_t heap_key_hint(int64_t key) noexcept nogil:
    """Where among the hints a key is looked for."""
    return <uint32_t>((<uint64_t>key * <uint64_t>0x9E3779B97F4A7C15) >> 56)


cdef inline size_t heap_class_of(heap_t *heap, size_t nbytes) noexcept nogil:
    """The class of a request of at least 1 byte, with no wish as to its alignment.

    0: there is none yet; for runs it is found by their pages.
    """
    if nbytes <= heap.classes.largest_bytes:
        return size_class_of(&heap.classes, nbytes)
    return atomic_load_u16(
        &heap.class_of_pages[(nbytes + heap.blocks.page_mask) >> heap.blocks.page_shift]
    )


cdef inline int64_t heap_key_of(
    const heap_t *heap, size_t nbytes, size_t align_bytes
) noexcept nogil:
    """The key of the runs that serve a request."""
    return run_key(
        <int64_t>(
            (nbytes >> heap.blocks.page_shift) + ((nbytes & heap.blocks.page_mask) != 0)
        ),
        align_bytes if align_bytes > heap.blocks.page_mask else heap.blocks.page_mask + 1
    )
