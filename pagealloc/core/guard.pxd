"""Blocks of a heap that finds errors: memory around them, or freed, that cannot be accessed."""

from pagealloc.core.heap_state cimport heap_t

cdef char *guarded_alloc(
    heap_t *heap, size_t nbytes, size_t align_bytes, bint *fresh, int *error
) noexcept nogil
cdef int guarded_free(heap_t *heap, char *address) noexcept nogil
cdef size_t guarded_bytes(heap_t *heap, const char *address) noexcept nogil
