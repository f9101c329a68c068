"""alloc and free: the allocator's C level.

All functions are nogil and may be called from any thread.  The fast ones never wait, fault or
enter the kernel; what they cannot do goes on in the function named `_slow`.
"""

from pagealloc.core.heap_state cimport heap_t

cdef char *heap_alloc(
    heap_t *heap, size_t nbytes, size_t align_bytes, bint *fresh, int *error
) noexcept nogil
cdef char *heap_alloc_fast(heap_t *heap, size_t nbytes, size_t align_bytes) noexcept nogil
cdef char *heap_alloc_slow(
    heap_t *heap, size_t nbytes, size_t align_bytes, size_t slot_class, bint *fresh, int *error
) noexcept nogil
cdef char *heap_alloc_class(heap_t *heap, size_t size_class) noexcept nogil

cdef int heap_free(heap_t *heap, char *address) noexcept nogil
cdef bint heap_free_fast(heap_t *heap, char *address) noexcept nogil
cdef int heap_free_slow(heap_t *heap, char *address) noexcept nogil

cdef void *heap_alloc_checked(heap_t *heap, size_t nbytes, size_t align_bytes) noexcept nogil
cdef int heap_free_checked(heap_t *heap, void *address) noexcept nogil

cdef int heap_alloc_many(
    heap_t *heap, size_t nbytes, size_t align_bytes, size_t n, char **addresses, int *error
) noexcept nogil
cdef size_t heap_free_many(heap_t *heap, char *const *addresses, size_t n) noexcept nogil
cdef size_t heap_usable_bytes(heap_t *heap, const char *address) noexcept nogil
