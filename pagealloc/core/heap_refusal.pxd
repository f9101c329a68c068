"""What a refused request is told."""

from pagealloc.core.heap_state cimport heap_t

cdef object refusal_of(
    heap_t *heap, str backing, size_t nbytes, size_t align_bytes, int error, Py_ssize_t n_blocks
)
