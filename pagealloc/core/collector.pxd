"""What others than its owner do with a thread's magazines and boxes."""

from libc.stdint cimport int64_t, uint32_t

from pagealloc.core.block_map cimport block_map_t
from pagealloc.core.central cimport central_t
from pagealloc.core.page_map cimport block_t
from pagealloc.core.thread_cache cimport outbox_t, thread_cache_t

cdef int64_t collector_take_outbox(thread_cache_t *cache, outbox_t *outbox) noexcept nogil
cdef uint32_t collector_fill_inbox(
    thread_cache_t *cache, const block_t *blocks, uint32_t n
) noexcept nogil
cdef bint collector_drain(
    thread_cache_t *cache, central_t *centrals, block_map_t *map, bint for_good
) noexcept nogil
cdef void collector_collect(
    thread_cache_t *cache, central_t *centrals, block_map_t *map
) noexcept nogil
cdef bint collector_forget(thread_cache_t *cache, int size_class) noexcept nogil
cdef void collector_count_idle(
    thread_cache_t *cache, block_map_t *map, int64_t *n_idle
) noexcept nogil
cdef void collector_time_every(thread_cache_t *cache, int64_t every) noexcept nogil
