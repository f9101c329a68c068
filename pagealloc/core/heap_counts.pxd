"""What a heap holds, counted; and whether that adds up."""

from libc.stdint cimport int64_t

from pagealloc.core.heap_state cimport heap_t

cdef struct heap_counts_t:
    int64_t reserved_bytes
    int64_t committed_bytes
    int64_t active_bytes        # pages in runs that are out, and in slabs
    int64_t purged_bytes        # that went back to the kernel since the start
    int64_t live_bytes          # handed out, in whole slots and pages
    int64_t idle_bytes          # free, in caches and central lists
    int64_t n_live              # slots and runs
    int64_t n_allocs
    int64_t n_frees
    int64_t n_failed
    int64_t n_collections
    int64_t n_conflicts         # of all heaps: freed by two threads in one instant

cdef struct class_counts_t:
    int64_t block_bytes
    int64_t n_live
    int64_t n_idle              # in caches and the central list
    int64_t n_slabs
    int64_t n_unused_slots      # in slabs
    int64_t n_allocs

cdef void heap_count_classes(heap_t *heap, class_counts_t *counts) noexcept nogil
cdef heap_counts_t heap_counts(heap_t *heap) noexcept nogil
cdef const char *heap_check(heap_t *heap) noexcept nogil
