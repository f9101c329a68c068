"""The latency histograms of a heap: which group a class belongs to, and switching them."""

from libc.stdint cimport int64_t

from pagealloc.core.heap_state cimport heap_t

cdef void heap_latency_init(heap_t *heap) noexcept nogil
cdef int heap_latency_group(heap_t *heap, size_t size_class) noexcept nogil
cdef void heap_time_every(heap_t *heap, int64_t every) noexcept nogil
cdef list heap_latencies(heap_t *heap)
