"""A live block made longer or shorter."""

from pagealloc.core.heap_state cimport heap_t

cdef char *heap_resize(
    heap_t *heap, char *address, size_t old_bytes, size_t nbytes, size_t align_bytes, int *error
) noexcept nogil
