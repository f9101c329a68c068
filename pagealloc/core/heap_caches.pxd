"""The caches of all threads of a heap, and how what is idle in them goes back."""

from libc.stdint cimport int64_t, uint16_t

from pagealloc.core.heap_state cimport heap_t
from pagealloc.core.page_map cimport block_t
from pagealloc.core.thread_cache cimport thread_cache_t

cdef void heap_add_cache(heap_t *heap, thread_cache_t *cache) noexcept nogil
cdef void heap_retire_cache(heap_t *heap, thread_cache_t *cache, bint for_good) noexcept nogil
cdef void heap_drop_caches(heap_t *heap) noexcept nogil
cdef void heap_deliver(heap_t *heap, thread_cache_t *cache) noexcept nogil
cdef void heap_return_block(heap_t *heap, block_t block, uint16_t tag) noexcept nogil
cdef void heap_hold(heap_t *heap) noexcept nogil
cdef void heap_let_go(heap_t *heap) noexcept nogil
cdef void heap_count_idle(heap_t *heap, int64_t *n_idle) noexcept nogil
cdef int64_t heap_idle_bytes(heap_t *heap) noexcept nogil
cdef void heap_reclaim(heap_t *heap) noexcept nogil
cdef void heap_collect(heap_t *heap) noexcept nogil
cdef void heap_collect_if_due(heap_t *heap) noexcept nogil
cdef int64_t heap_trim(heap_t *heap) noexcept nogil
