"""Memory made physical before somebody waits for it."""

from libc.stdint cimport int64_t

from pagealloc.core.buffer cimport Buffer
from pagealloc.core.heap_owner cimport Heap

cdef int prefault_buffer(Buffer buffer) except -1
cdef int64_t prefault_heap(
    Heap heap, size_t nbytes, object n_threads, object progress, object cancel
) except -1
