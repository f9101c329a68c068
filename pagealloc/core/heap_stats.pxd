"""What a heap holds, as Python sees it."""

from pagealloc.core.heap_state cimport heap_t

cdef object read_stats(heap_t *heap, object backing, object budget_bytes, object n_faults)
