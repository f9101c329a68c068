"""The life of heaps: how one begins and ends, and what fork() does with all."""

from libc.stdint cimport int64_t, uint32_t

from pagealloc.core.heap_state cimport heap_options_t, heap_t
from pagealloc.core.thread_cache cimport thread_cache_t

cdef heap_t *heap_new(const heap_options_t *options) noexcept nogil
cdef int heap_delete(heap_t *heap) noexcept nogil
cdef void heap_end_thread(uint32_t id, int64_t generation, thread_cache_t *cache) noexcept nogil
cdef heap_t *heap_hold_next(int64_t generation) noexcept nogil
cdef void heap_release_held() noexcept nogil
