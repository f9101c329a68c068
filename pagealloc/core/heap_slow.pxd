"""What alloc and free do when the magazine does not do."""

from libc.stdint cimport uint16_t

from pagealloc.core.heap_state cimport heap_t
from pagealloc.core.page_map cimport block_t
from pagealloc.core.thread_cache cimport thread_cache_t

cdef char *heap_supply(
    heap_t *heap, thread_cache_t *cache, size_t size_class, size_t nbytes, size_t align_bytes,
    size_t slot_class, bint *fresh, int *error
) noexcept nogil
cdef bint heap_take_back(
    heap_t *heap, thread_cache_t *cache, block_t block, size_t size_class, uint16_t live
) noexcept nogil
cdef void heap_note_slow(heap_t *heap, thread_cache_t *cache) noexcept nogil
