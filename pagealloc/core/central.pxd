"""The central list of one size class: slabs of equal slots."""

from libc.stdint cimport int64_t, uint32_t, uint64_t

from pagealloc.core.mutex cimport mutex_t
from pagealloc.core.page_heap cimport page_heap_t
from pagealloc.core.page_run cimport run_t

cdef struct slab_t:
    run_t *run
    void *central           # its central_t
    slab_t *next            # among the partial slabs, or the unused descriptors
    slab_t *previous
    uint32_t n_free
    uint32_t first_word     # no bit is set in the words before it
    uint64_t *free_bits     # a bit a slot: it can be handed out, so freeing it again is caught

cdef struct central_t:
    mutex_t mutex
    page_heap_t *pages
    uint32_t slot_bytes
    uint32_t n_slots_per_page
    uint32_t n_slots        # of a slab
    int64_t slab_pages
    # All below: guarded by `mutex`.
    slab_t *partial         # slabs with a free slot and a live one; the one freed into first
    slab_t *empty           # at most one wholly free slab, kept so that a lone slot is cheap
    slab_t *unused          # descriptors; never given back while the heap lives
    int64_t n_slabs
    int64_t n_live

cdef void central_init(central_t *central, page_heap_t *pages, uint32_t slot_bytes) noexcept nogil
cdef void central_destroy(central_t *central) noexcept nogil
cdef char *central_alloc(central_t *central, int *error) noexcept nogil
cdef int central_free(slab_t *slab, char *address) noexcept nogil
cdef void central_trim(central_t *central) noexcept nogil
cdef const char *central_check(central_t *central) noexcept nogil
