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

cdef char *heap_alloc(
    heap_t *heap, size_t nbytes, size_t align_bytes, bint *fresh, int *error
) noexcept nogil
cdef int heap_free(heap_t *heap, char *address) noexcept nogil

cdef class Heap:
    cdef heap_t *heap               # NULL once closed
    cdef object __weakref__
    cdef readonly object backing
    cdef readonly object arena_bytes
    cdef readonly object budget_bytes
    cdef heap_t *open_heap(self) except NULL
    cdef object refusal(self, size_t nbytes, size_t align_bytes, int error)
