"""Blocks of a heap that finds errors.

Purpose
    Let an access behind a block, or of one that was freed, end in a fault at once.
Structure
    GUARD_SLOT:   run = | ...... block | guard |     a block shorter than a page ends at its page's
                                                     end, as far as its alignment lets it
    GUARD_FREED:  run = | guard  guard  guard  |     from free to the next use
Invariants
    such a heap has base pages and no magazines: each block is a run of its own, without a class,
    and nobody's in particular
    where a live block starts in its first page is in that page's entry among the states of slots
Locking
    direct_mutex, so that no fork comes between; the block is free, and the caller's, while its
    guards change.
Units
    Bytes; pages where named.
"""

from libc.stdint cimport int64_t, uint16_t, uintptr_t

from pagealloc.core.atomics cimport (
    atomic_add_i64,
    atomic_load_ptr,
    atomic_load_u16,
    atomic_store_u16,
    atomic_swap_u16,
)
from pagealloc.core.block_map cimport (
    SLOT_UNIT_BITS,
    STATE_FREE,
    STATE_SHARED,
    block_chunk,
    block_class,
    block_map_knows_near,
    page_in_chunk,
)
from pagealloc.core.central cimport central_give_back
from pagealloc.core.heap_state cimport (
    GUARD_FREED,
    GUARD_SLOT,
    UNCACHED_RUN,
    heap_come_near,
    heap_t,
)
from pagealloc.core.mutex cimport mutex_lock, mutex_unlock
from pagealloc.core.os_pages cimport os_guard, os_unguard
from pagealloc.core.page_heap cimport (
    FREED,
    FREED_NOW,
    NOT_LIVE,
    NOT_OURS,
    page_heap_alloc,
    page_heap_free,
    page_heap_run_bytes,
)
from pagealloc.core.page_map cimport block_t, chunk_t
from pagealloc.core.page_run cimport run_t

cdef extern from "poison.h" nogil:
    void unpoison "pagealloc_unpoison"(void *address, size_t nbytes)


cdef inline uint16_t *start_entry(heap_t *heap, chunk_t *chunk, const char *page) noexcept nogil:
    """Where it is noted where in a page the block starts, in units of the shortest slot."""
    return &chunk.state_of_slot[
        page_in_chunk(&heap.blocks, page) << (heap.blocks.page_shift - SLOT_UNIT_BITS)
    ]


cdef inline size_t start_in_page(
    size_t nbytes, size_t align_bytes, size_t page_bytes
) noexcept nogil:
    """Where a block starts so that it ends as near to its page's end as its alignment lets it."""
    if align_bytes < <size_t>1 << SLOT_UNIT_BITS:
        align_bytes = <size_t>1 << SLOT_UNIT_BITS
    if nbytes >= page_bytes or align_bytes >= page_bytes:
        return 0
    return (page_bytes - nbytes) & ~(align_bytes - 1)


cdef char *guarded_alloc(
    heap_t *heap, size_t nbytes, size_t align_bytes, bint *fresh, int *error
) noexcept nogil:
    """A block of a run of its own; NULL with a code in `error`, as page_heap_alloc."""
    cdef size_t page_bytes = heap.pages.page_bytes
    cdef size_t start = start_in_page(nbytes, align_bytes, page_bytes)
    cdef int64_t n_pages = <int64_t>((nbytes + page_bytes - 1) // page_bytes)
    cdef int64_t n_guards = 1 if heap.guard & GUARD_SLOT else 0
    cdef run_t *run
    cdef block_t block
    cdef chunk_t *chunk
    mutex_lock(&heap.direct_mutex)
    run = page_heap_alloc(
        &heap.pages, n_pages + n_guards, align_bytes if align_bytes > page_bytes else page_bytes,
        UNCACHED_RUN, NULL, True, fresh, error
    )
    if run != NULL:
        block.address = run.address
        error[0] = os_unguard(run.address, <size_t>run.n_pages * page_bytes)
        if error[0] == 0 and n_guards:
            error[0] = os_guard(run.address + n_pages * <int64_t>page_bytes, page_bytes)
        if error[0]:
            page_heap_free(&heap.pages, &block, 1, FREED_NOW)
    if error[0]:
        mutex_unlock(&heap.direct_mutex)
        atomic_add_i64(&heap.n_failed, 1)
        return NULL
    if not block_map_knows_near(&heap.blocks):
        heap_come_near(heap, block.address)
    atomic_add_i64(&heap.centrals[UNCACHED_RUN].n_out, 1)
    atomic_add_i64(&heap.retired_allocs[UNCACHED_RUN], 1)
    chunk = block_chunk(&heap.blocks, block.address)
    atomic_store_u16(start_entry(heap, chunk, block.address), <uint16_t>(start >> SLOT_UNIT_BITS))
    unpoison(block.address + start, <size_t>n_pages * page_bytes - start)
    atomic_store_u16(
        &chunk.pages[page_in_chunk(&heap.blocks, block.address)].state, STATE_SHARED
    )
    mutex_unlock(&heap.direct_mutex)
    return block.address + start


cdef chunk_t *chunk_of(heap_t *heap, const char *address) noexcept nogil:
    """The chunk of a block that starts at `address`, live or not; NULL: there is none."""
    cdef chunk_t *chunk = block_chunk(&heap.blocks, address)
    if (
        chunk == NULL or atomic_load_ptr(&chunk.owner) != heap
        or block_class(&heap.blocks, chunk, address) == 0
        or <size_t>atomic_load_u16(start_entry(heap, chunk, address)) << SLOT_UNIT_BITS
        != <uintptr_t>address & heap.blocks.page_mask
    ):
        return NULL
    return chunk


cdef int guarded_free(heap_t *heap, char *address) noexcept nogil:
    """FREED, or NOT_OURS / NOT_LIVE and nothing changed."""
    cdef chunk_t *chunk = chunk_of(heap, address)
    cdef block_t block
    cdef int outcome = NOT_LIVE
    if chunk == NULL:
        return NOT_OURS
    block.address = address - (<uintptr_t>address & heap.blocks.page_mask)
    block.state = &chunk.pages[page_in_chunk(&heap.blocks, address)].state
    mutex_lock(&heap.direct_mutex)
    if atomic_swap_u16(block.state, STATE_SHARED, STATE_FREE):
        outcome = FREED
        atomic_store_u16(start_entry(heap, chunk, address), 0)
        if heap.guard & GUARD_FREED:    # refused, this one is found out by nobody
            os_guard(block.address, page_heap_run_bytes(&heap.pages, block.address))
        central_give_back(&heap.centrals[UNCACHED_RUN], &block, 1, FREED_NOW)
    mutex_unlock(&heap.direct_mutex)
    return outcome


cdef size_t guarded_bytes(heap_t *heap, const char *address) noexcept nogil:
    """What can be accessed of the live block that starts at `address`; 0: there is none."""
    cdef chunk_t *chunk = chunk_of(heap, address)
    cdef size_t start = <uintptr_t>address & heap.blocks.page_mask
    if chunk == NULL or atomic_load_u16(
        &chunk.pages[page_in_chunk(&heap.blocks, address)].state
    ) != STATE_SHARED:
        return 0
    return page_heap_run_bytes(&heap.pages, address - start) - start - (
        heap.pages.page_bytes if heap.guard & GUARD_SLOT else 0
    )
