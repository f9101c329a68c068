"""The free blocks of one size class that no thread holds.

Purpose
    Pass blocks between threads in batches, so that a magazine is filled or emptied under one short
    hold of a mutex; give back to the page heap what nobody needs.
Structure
    magazines <--batches--> idle[coldest .. coldest + n_idle) <--> slabs (slots), or the page
                             cold                        hot       heap (runs)
Invariants
    n_out = n_idle + blocks in magazines + live blocks
    coldest + n_idle <= idle_capacity; coldest = 0 if n_idle = 0
    n_unused <= n_idle: the least n_idle since the last collection; the n_unused coldest blocks were
    not touched since
    block_bytes = run_pages * page_bytes for runs
Locking
    `mutex`; under it the page heap's for slots.  Runs are carved and merged outside of it: n_out
    counts a run from before it is carved until after it is merged.
Units
    Blocks; bytes and pages where named.
"""

from libc.stdint cimport INT64_MAX, int64_t, uint16_t, uint32_t
from libc.string cimport memcpy, memmove, memset

from pagealloc.core.backing cimport ERROR_RETRY
from pagealloc.core.atomics cimport atomic_add_i64, atomic_load_i64, atomic_store_i64
from pagealloc.core.block_map cimport block_map_t, known_block_state
from pagealloc.core.lock_waits cimport lock_shared
from pagealloc.core.mutex cimport mutex_destroy, mutex_init, mutex_unlock
from pagealloc.core.os_memory cimport os_abandon, os_page_bytes, os_reserve
from pagealloc.core.page_heap cimport (
    FREED_LONG_AGO,
    FREED_NOW,
    page_heap_alloc,
    page_heap_free,
    page_heap_has_own_arena,
    page_heap_t,
)
from pagealloc.core.page_map cimport block_t
from pagealloc.core.page_run cimport run_t
from pagealloc.core.slabs cimport (
    slabs_check,
    slabs_collect,
    slabs_destroy,
    slabs_init,
    slabs_put,
    slabs_take,
    slabs_trim,
)

cdef enum:
    PIECE = 64              # blocks given back at a time, between which others get the mutex
    MAX_OWN_ARENAS_IDLE = 1     # an arena made for one request is kept warm, not hoarded


cdef void central_init_slots(
    central_t *central, page_heap_t *pages, block_map_t *map, uint16_t size_class,
    uint32_t slot_bytes
) noexcept nogil:
    memset(central, 0, sizeof(central_t))
    mutex_init(&central.mutex)
    central.pages = pages
    central.map = map
    central.size_class = size_class
    central.block_bytes = slot_bytes
    central.max_idle = INT64_MAX
    slabs_init(&central.slabs, pages, slot_bytes, size_class)


cdef void central_init_runs(
    central_t *central, page_heap_t *pages, block_map_t *map, uint16_t size_class, int64_t key
) noexcept nogil:
    memset(central, 0, sizeof(central_t))
    mutex_init(&central.mutex)
    central.pages = pages
    central.map = map
    central.size_class = size_class
    set_key(central, key)


cdef void set_key(central_t *central, int64_t key) noexcept nogil:
    central.run_pages = key >> 6
    central.align_bytes = <size_t>1 << (key & 63)
    central.block_bytes = <size_t>central.run_pages * central.pages.page_bytes
    central.max_idle = INT64_MAX
    if page_heap_has_own_arena(central.pages, central.run_pages, central.align_bytes):
        central.max_idle = MAX_OWN_ARENAS_IDLE
    atomic_store_i64(&central.key, key)


cdef bint central_reuse(central_t *central, int64_t key) noexcept nogil:
    """Make this the class of other runs, if none of its own is out."""
    cdef bint is_unused
    lock_shared(&central.mutex)
    is_unused = atomic_load_i64(&central.n_out) == 0
    if is_unused:
        set_key(central, key)
    mutex_unlock(&central.mutex)
    return is_unused


cdef void central_destroy(central_t *central) noexcept nogil:
    """Free the tables; nothing may be out."""
    slabs_destroy(&central.slabs)
    drop_stack(central)
    mutex_destroy(&central.mutex)


# ---------------------------------------------------------------------------------------------
# The stack, locked

cdef void drop_stack(central_t *central) noexcept nogil:
    if central.idle != NULL:
        os_abandon(central.idle, <size_t>central.idle_capacity * sizeof(block_t))
    central.idle = NULL
    central.idle_capacity = 0
    central.coldest = 0


cdef bint make_room(central_t *central, int64_t n) noexcept nogil:
    """Room for `n` more; False if the kernel has no memory for it."""
    cdef int64_t capacity = central.idle_capacity
    cdef block_t *idle
    if central.coldest + central.n_idle + n <= capacity:
        return True
    if central.coldest > capacity // 4 and central.n_idle + n <= capacity:
        # As many were taken from the cold end since the last time: for each of them, three move.
        memmove(
            central.idle, central.idle + central.coldest,
            <size_t>central.n_idle * sizeof(block_t)
        )
        central.coldest = 0
        return True
    capacity = capacity * 2 if capacity else <int64_t>(os_page_bytes() // sizeof(block_t))
    while capacity < central.n_idle + n:
        capacity *= 2
    idle = <block_t *>os_reserve(<size_t>capacity * sizeof(block_t), os_page_bytes())
    if idle == NULL:
        return False
    memcpy(
        idle, central.idle + central.coldest, <size_t>central.n_idle * sizeof(block_t)
    )
    drop_stack(central)
    central.idle = idle
    central.idle_capacity = capacity
    return True


cdef int64_t pop(central_t *central, block_t *blocks, int64_t n) noexcept nogil:
    """Take up to `n` from the hot end; how many."""
    if n > central.n_idle:
        n = central.n_idle
    central.n_idle -= n
    memcpy(
        blocks, central.idle + central.coldest + central.n_idle, <size_t>n * sizeof(block_t)
    )
    if central.n_idle == 0:
        central.coldest = 0
    if central.n_unused > central.n_idle:
        central.n_unused = central.n_idle
    return n


cdef int64_t pop_cold(central_t *central, block_t *blocks, int64_t n) noexcept nogil:
    """Take up to `n` from the cold end; how many."""
    if n > central.n_idle:
        n = central.n_idle
    memcpy(blocks, central.idle + central.coldest, <size_t>n * sizeof(block_t))
    central.n_idle -= n
    central.coldest = central.coldest + n if central.n_idle else 0
    central.n_unused = central.n_unused - n if central.n_unused > n else 0
    return n


# ---------------------------------------------------------------------------------------------
# What others call

cdef void find_states(const central_t *central, block_t *blocks, int64_t n) noexcept nogil:
    cdef int64_t i
    for i in range(n):
        blocks[i].state = known_block_state(central.map, blocks[i].address, central.size_class)


cdef int64_t central_take(
    central_t *central, int64_t key, block_t *blocks, int64_t n, bint may_grow, bint *fresh,
    int *error
) noexcept nogil:
    """Fill in up to `n` blocks of the class that is `key`; how many.

    0 with a code in `error` if none can be had: ERROR_RETRY if the class is another by now, else as
    page_heap_alloc.  `fresh` is about the first block.
    """
    cdef int64_t n_taken
    cdef run_t *run
    fresh[0] = False
    error[0] = 0
    lock_shared(&central.mutex)
    if central.key != key:
        error[0] = ERROR_RETRY
        n_taken = 0
    elif central.n_idle:
        n_taken = pop(central, blocks, n)
    elif central.run_pages == 0:
        n_taken = slabs_take(&central.slabs, blocks, n, may_grow, error)
        find_states(central, blocks, n_taken)
        atomic_add_i64(&central.n_out, n_taken)
    else:
        n_taken = 0
        atomic_add_i64(&central.n_out, 1)
    mutex_unlock(&central.mutex)
    if n_taken or error[0]:
        return n_taken
    # One, not a batch: what nobody asked for would be committed.
    run = page_heap_alloc(
        central.pages, central.run_pages, central.align_bytes, central.size_class, NULL, may_grow,
        fresh, error
    )
    if run == NULL:
        atomic_add_i64(&central.n_out, -1)
        return 0
    blocks[0].address = run.address
    find_states(central, blocks, 1)
    return 1


cdef bint central_count_out(central_t *central, int64_t key) noexcept nogil:
    """Count one more block as out; False if the class is no longer `key`'s."""
    cdef bint is_same
    lock_shared(&central.mutex)
    is_same = atomic_load_i64(&central.key) == key
    if is_same:
        atomic_add_i64(&central.n_out, 1)
    mutex_unlock(&central.mutex)
    return is_same


cdef void central_put(central_t *central, const block_t *blocks, int64_t n) noexcept nogil:
    """Keep free blocks for whoever needs one next."""
    cdef int64_t n_kept = n
    lock_shared(&central.mutex)
    if n_kept > central.max_idle - central.n_idle:
        n_kept = central.max_idle - central.n_idle
    if make_room(central, n_kept):
        memcpy(
            central.idle + central.coldest + central.n_idle, blocks,
            <size_t>n_kept * sizeof(block_t)
        )
        central.n_idle += n_kept
    else:
        n_kept = 0
    mutex_unlock(&central.mutex)
    if n_kept < n:
        central_give_back(central, blocks + n_kept, n - n_kept, FREED_NOW)


cdef void central_give_back(
    central_t *central, const block_t *blocks, int64_t n, int freed
) noexcept nogil:
    """Let go of free blocks: slots to their slabs, runs to the page heap.

    `freed` as for page_heap_free.
    """
    if central.run_pages == 0:
        lock_shared(&central.mutex)
        slabs_put(&central.slabs, blocks, n, freed)
        mutex_unlock(&central.mutex)
    else:
        page_heap_free(central.pages, blocks, n, freed)
    atomic_add_i64(&central.n_out, -n)


cdef void give_back_cold(central_t *central, int64_t n, int freed) noexcept nogil:
    """Give back `n` idle blocks, the longest unused first."""
    cdef block_t blocks[PIECE]
    cdef int64_t n_piece
    while n > 0:
        lock_shared(&central.mutex)
        n_piece = pop_cold(central, blocks, n if n < PIECE else PIECE)
        mutex_unlock(&central.mutex)
        if n_piece == 0:
            return
        central_give_back(central, blocks, n_piece, freed)
        n -= n_piece


cdef void central_drain(central_t *central) noexcept nogil:
    """Give back all idle blocks."""
    give_back_cold(central, INT64_MAX, FREED_NOW)


cdef void central_collect(central_t *central) noexcept nogil:
    """One collection: give back what sat unused during this one and the one before."""
    cdef int64_t n_dropped
    lock_shared(&central.mutex)
    n_dropped = central.n_victims if central.n_victims < central.n_unused else central.n_unused
    central.n_victims = central.n_unused - n_dropped
    mutex_unlock(&central.mutex)
    give_back_cold(central, n_dropped, FREED_LONG_AGO)
    lock_shared(&central.mutex)
    central.n_unused = central.n_idle
    if central.run_pages == 0:
        slabs_collect(&central.slabs)
    mutex_unlock(&central.mutex)


cdef void central_trim(central_t *central) noexcept nogil:
    """Give back all idle blocks, the slab that is kept empty, and the stack's own memory."""
    central_drain(central)
    lock_shared(&central.mutex)
    slabs_trim(&central.slabs)
    if central.n_idle == 0:
        drop_stack(central)
    mutex_unlock(&central.mutex)


cdef const char *central_check(central_t *central) noexcept nogil:
    """NULL, or which invariant is broken."""
    cdef const char *broken = NULL
    lock_shared(&central.mutex)
    if central.run_pages == 0:
        broken = slabs_check(&central.slabs)
        if broken == NULL and central.slabs.n_taken != atomic_load_i64(&central.n_out):
            broken = "n_out is not the number of slots taken from slabs"
    elif central.block_bytes != <size_t>central.run_pages * central.pages.page_bytes:
        broken = "block_bytes is not the class's pages"
    if broken == NULL and not (
        0 <= central.n_unused <= central.n_idle <= central.idle_capacity - central.coldest
    ):
        broken = "n_unused <= n_idle <= idle_capacity - coldest does not hold"
    if broken == NULL and central.n_idle == 0 and central.coldest != 0:
        broken = "an empty stack does not start at its first place"
    if broken == NULL and central.n_idle > atomic_load_i64(&central.n_out):
        broken = "more blocks are idle than are out"
    mutex_unlock(&central.mutex)
    return broken
