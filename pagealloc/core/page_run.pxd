"""Page runs: their descriptors, and the free ones ordered for best fit.

Descriptors live outside the memory they describe, in a pool of their own that grows by 64 KiB.
"""

from libc.stdint cimport int64_t, uint32_t, uint8_t

cdef enum:
    RUN_UNUSED = 0      # the descriptor is in the pool
    RUN_FREE = 1        # in the tree
    RUN_LIVE = 2        # handed out
    RUN_SLAB = 3        # cut into slots

cdef struct run_t:
    char *address
    int64_t n_pages
    void *arena
    void *slab              # RUN_SLAB: its slab_t
    run_t *left             # RUN_FREE: the tree; RUN_UNUSED: `left` is the pool's next
    run_t *right
    uint32_t priority
    uint8_t state

cdef struct run_pool_t:
    run_t *unused
    void *blocks            # each block starts with the pointer to the next
    uint32_t random         # state of the xorshift that gives priorities

cdef void run_pool_init(run_pool_t *pool) noexcept nogil
cdef void run_pool_destroy(run_pool_t *pool) noexcept nogil
cdef run_t *run_new(run_pool_t *pool) noexcept nogil
cdef void run_delete(run_pool_t *pool, run_t *run) noexcept nogil

cdef void run_tree_insert(run_t **root, run_t *run) noexcept nogil
cdef void run_tree_remove(run_t **root, run_t *run) noexcept nogil
cdef run_t *run_tree_best(run_t *root, int64_t n_pages) noexcept nogil
cdef int64_t run_tree_check(
    const run_t *root, const run_t *before, const run_t *after
) noexcept nogil
