"""The central list of one size class: free blocks that no thread holds."""

from libc.stdint cimport int64_t, uint16_t, uint32_t

from pagealloc.core.block_map cimport block_map_t
from pagealloc.core.mutex cimport mutex_t
from pagealloc.core.page_heap cimport page_heap_t
from pagealloc.core.page_map cimport block_t
from pagealloc.core.slabs cimport slabs_t

cdef extern from * nogil:
    int count_trailing_zeros "__builtin_ctzll"(unsigned long long bits)

cdef struct central_t:
    mutex_t mutex
    page_heap_t *pages
    block_map_t *map
    uint16_t size_class
    # What the class is.  It changes only while nothing is out (see central_reuse).
    size_t block_bytes
    size_t align_bytes
    int64_t run_pages       # of a class of runs; 0: slots
    int64_t key             # run_key() of these; 0: slots; atomic
    # All below: guarded by `mutex`.
    slabs_t slabs           # of a class of slots
    block_t *idle           # a stack: the last one in is the first one out,
    int64_t coldest         # ... from here on
    int64_t n_idle
    int64_t idle_capacity
    int64_t max_idle        # beyond it, blocks go back at once
    int64_t n_out           # blocks taken from the page heap or the slabs; atomic to read
    int64_t n_unused        # least n_idle since the last collection: these nobody has needed
    int64_t n_victims       # of these, how many sat unused during the collection before as well

cdef void central_init_slots(
    central_t *central, page_heap_t *pages, block_map_t *map, uint16_t size_class,
    uint32_t slot_bytes
) noexcept nogil
cdef void central_init_runs(
    central_t *central, page_heap_t *pages, block_map_t *map, uint16_t size_class, int64_t key
) noexcept nogil
cdef bint central_reuse(central_t *central, int64_t key) noexcept nogil
cdef void central_destroy(central_t *central) noexcept nogil
cdef int64_t central_take(
    central_t *central, int64_t key, block_t *blocks, int64_t n, bint may_grow, bint *fresh,
    int *error
) noexcept nogil
cdef bint central_count_out(central_t *central, int64_t key) noexcept nogil
cdef void central_put(central_t *central, const block_t *blocks, int64_t n) noexcept nogil
cdef void central_give_back(
    central_t *central, const block_t *blocks, int64_t n, int freed
) noexcept nogil
cdef void central_drain(central_t *central) noexcept nogil
cdef void central_collect(central_t *central) noexcept nogil
cdef void central_trim(central_t *central) noexcept nogil
cdef const char *central_check(central_t *central) noexcept nogil


cdef inline int64_t run_key(int64_t run_pages, size_t align_bytes) noexcept nogil:
    """What a class of runs is, in one number: its pages, and the power of two it is aligned to."""
    return run_pages << 6 | count_trailing_zeros(align_bytes)
