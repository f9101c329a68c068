"""The slabs of one size class: page runs cut into equal slots."""

from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t

from pagealloc.core.page_heap cimport page_heap_t
from pagealloc.core.page_map cimport block_t
from pagealloc.core.page_run cimport run_t

cdef enum:
    N_FILLS = 8             # lists of partial slabs, by how full they are

cdef struct slab_t:
    run_t *run
    slab_t *next            # among the partial slabs, or the unused descriptors
    slab_t *previous
    uint32_t n_free
    uint32_t fill           # which list it is in, if it is partial
    uint32_t first_word     # no bit is set in the words before it
    uint64_t *free_bits     # a bit a slot: it is here, not in a magazine, a list, or live

cdef struct slabs_t:
    page_heap_t *pages
    uint32_t slot_bytes
    uint32_t n_slots_per_page
    uint32_t n_slots        # of a slab
    uint16_t size_class
    int64_t slab_pages
    slab_t *partial[N_FILLS]    # slabs with a free slot and a taken one, the fullest first
    slab_t *empty           # at most one wholly free slab, kept so that a lone slot is cheap
    bint empty_is_victim    # it was kept during the whole of a collection's time already
    slab_t *unused          # descriptors; never given back while the heap lives
    int64_t n_slabs
    int64_t n_taken         # slots

cdef void slabs_init(
    slabs_t *slabs, page_heap_t *pages, uint32_t slot_bytes, uint16_t size_class
) noexcept nogil
cdef void slabs_destroy(slabs_t *slabs) noexcept nogil
cdef int64_t slabs_take(
    slabs_t *slabs, block_t *slots, int64_t n, bint may_grow, int *error
) noexcept nogil
cdef void slabs_put(
    slabs_t *slabs, const block_t *slots, int64_t n, int freed
) noexcept nogil
cdef void slabs_collect(slabs_t *slabs) noexcept nogil
cdef void slabs_trim(slabs_t *slabs) noexcept nogil
cdef const char *slabs_check(slabs_t *slabs) noexcept nogil
