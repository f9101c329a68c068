"""The thread that gives idle memory back."""

from pagealloc.core.heap_state cimport heap_t

cdef void purger_watch(heap_t *heap) noexcept nogil
