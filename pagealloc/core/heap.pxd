"""A heap: size classes over central lists over a page heap.  The allocator's C level."""

from libc.stdint cimport int64_t

from pagealloc.core.central cimport central_t
from pagealloc.core.page_heap cimport page_heap_t
from pagealloc.core.size_class cimport MAX_CLASSES, size_classes_t

cdef struct heap_t:
    page_heap_t pages
    size_classes_t classes
    central_t centrals[MAX_CLASSES]
    # Atomic:
    int64_t n_allocs
    int64_t n_frees
    int64_t n_failed
    # Guarded by the registry's mutex:
    heap_t *next
    heap_t *previous

cdef struct heap_counts_t:
    int64_t reserved_bytes
    int64_t committed_bytes
    int64_t used_bytes          # of live runs and slabs
    int64_t n_live              # slots and runs
    int64_t n_allocs
    int64_t n_frees
    int64_t n_failed

cdef struct class_counts_t:
    int64_t slot_bytes
    int64_t n_slots             # of all slabs
    int64_t n_live
    int64_t n_slabs
    int64_t slab_bytes          # of all slabs

cdef heap_t *heap_new(size_t arena_bytes, int ladder, int64_t budget_bytes) noexcept nogil
cdef int heap_delete(heap_t *heap) noexcept nogil
cdef char *heap_alloc(
    heap_t *heap, size_t nbytes, size_t align_bytes, bint *fresh, int *error
) noexcept nogil
cdef int heap_free(heap_t *heap, char *address) noexcept nogil
cdef int64_t heap_trim(heap_t *heap) noexcept nogil
cdef heap_counts_t heap_counts(heap_t *heap) noexcept nogil
cdef class_counts_t heap_class_counts(heap_t *heap, int i) noexcept nogil
