"""Page runs: descriptors, and the best-fit tree of the free ones.

Purpose
    Find the smallest free run that is long enough, the lowest in memory among equals, in
    O(log n) steps whatever the sizes.
Structure
    A treap: a binary search tree ordered by (n_pages, address) that is at the same time a heap by
    random priority, so that its depth stays about 2 log2(n) without any balancing state.

                (8, a)  priority 900
               /      \\
          (3, c)      (8, d)
Invariants
    left < node < right by (n_pages, address); node.priority >= its children's
    a run is in the tree iff its state is RUN_FREE
Locking
    The owner's (the page heap's mutex).
Units
    Pages; addresses.
"""

from libc.stdint cimport int64_t
from libc.string cimport memset

from pagealloc.core.os_memory cimport os_abandon, os_page_bytes, os_reserve

cdef enum:
    BLOCK_BYTES = 65536


# ---------------------------------------------------------------------------------------------
# The pool of descriptors

cdef void run_pool_init(run_pool_t *pool) noexcept nogil:
    memset(pool, 0, sizeof(run_pool_t))
    pool.random = 2463534242


cdef void run_pool_destroy(run_pool_t *pool) noexcept nogil:
    """Unmap every block; no descriptor may be in use."""
    cdef void *block = pool.blocks
    cdef void *next_block
    while block != NULL:
        next_block = (<void **>block)[0]
        os_abandon(block, BLOCK_BYTES)
        block = next_block
    run_pool_init(pool)


cdef run_t *run_new(run_pool_t *pool) noexcept nogil:
    """A descriptor with all fields zero but the priority; NULL if the kernel refuses memory."""
    cdef run_t *run
    cdef char *block
    cdef size_t i
    if pool.unused == NULL:
        block = <char *>os_reserve(BLOCK_BYTES, os_page_bytes())
        if block == NULL:
            return NULL
        (<void **>block)[0] = pool.blocks
        pool.blocks = block
        for i in range((BLOCK_BYTES - sizeof(void *)) // sizeof(run_t)):
            run_delete(pool, <run_t *>(block + sizeof(void *)) + i)
    run = pool.unused
    pool.unused = run.left
    memset(run, 0, sizeof(run_t))
    pool.random ^= pool.random << 13
    pool.random ^= pool.random >> 17
    pool.random ^= pool.random << 5
    run.priority = pool.random
    return run


cdef void run_delete(run_pool_t *pool, run_t *run) noexcept nogil:
    run.state = RUN_UNUSED
    run.left = pool.unused
    pool.unused = run


# ---------------------------------------------------------------------------------------------
# The tree

cdef inline bint precedes(const run_t *a, const run_t *b) noexcept nogil:
    if a.n_pages != b.n_pages:
        return a.n_pages < b.n_pages
    return a.address < b.address


cdef void run_tree_insert(run_t **root, run_t *run) noexcept nogil:
    """Go down to where the priority belongs, then split what is below around `run`."""
    cdef run_t *rest
    cdef run_t **less = &run.left
    cdef run_t **more = &run.right
    while root[0] != NULL and root[0].priority >= run.priority:
        root = &root[0].left if precedes(run, root[0]) else &root[0].right
    rest = root[0]
    root[0] = run
    while rest != NULL:
        if precedes(rest, run):
            less[0] = rest
            less = &rest.right
            rest = rest.right
        else:
            more[0] = rest
            more = &rest.left
            rest = rest.left
    less[0] = NULL
    more[0] = NULL


cdef void run_tree_remove(run_t **root, run_t *run) noexcept nogil:
    """Find `run`, then merge its two subtrees in its place."""
    cdef run_t *a = run.left
    cdef run_t *b = run.right
    while root[0] != run:
        root = &root[0].left if precedes(run, root[0]) else &root[0].right
    while a != NULL and b != NULL:
        if a.priority >= b.priority:
            root[0] = a
            root = &a.right
            a = a.right
        else:
            root[0] = b
            root = &b.left
            b = b.left
    root[0] = a if a != NULL else b
    run.left = run.right = NULL


cdef run_t *run_tree_best(run_t *root, int64_t n_pages) noexcept nogil:
    """The shortest run of at least `n_pages`, the lowest of those; NULL if there is none."""
    cdef run_t *best = NULL
    while root != NULL:
        if root.n_pages >= n_pages:
            best = root
            root = root.left
        else:
            root = root.right
    return best


cdef int64_t run_tree_check(
    const run_t *root, const run_t *before, const run_t *after
) noexcept nogil:
    """Number of runs in the tree, all between `before` and `after`; -1 if that is broken."""
    cdef int64_t n_left, n_right
    if root == NULL:
        return 0
    if root.state != RUN_FREE:
        return -1
    if (before != NULL and not precedes(before, root)) or (
        after != NULL and not precedes(root, after)
    ):
        return -1
    if (root.left != NULL and root.left.priority > root.priority) or (
        root.right != NULL and root.right.priority > root.priority
    ):
        return -1
    n_left = run_tree_check(root.left, before, root)
    n_right = run_tree_check(root.right, root, after)
    return -1 if n_left < 0 or n_right < 0 else n_left + n_right + 1
