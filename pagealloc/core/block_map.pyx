"""The state of blocks: setting up the arithmetic, and who may change what.

Purpose
    Say of every address whether a block starts there, and whether it is live, in a few
    instructions and two dependent loads.
Structure
    address -> chunk -> class of its page -> runs: a state a page | slots: a state every 64 bytes
    FREE --alloc--> the tag of the thread's cache (or SHARED) --free--> FREE
                                   --another thread's free--> tag, marked --> FREE
Invariants
    No compare-and-swap where a block has an owner, for each byte of the word has its writers:
    the whole word is written inside the lock of the cache that has the block, or had it last; if
    that is gone, or the kernel does not let anybody in, by compare-and-swap of (tag, marked)
    the mark alone is set, with a plain store of one byte, by who frees another cache's block; such
    a thread has seen the tag without a mark, and carries the block to the cache of that tag, where
    it is taken only if the word is (tag, marked) when it gets there
    Of two threads that free the same block in the same instant, both may set the mark, or the owner
    may overwrite it, or it may be set late on a block that is free by then: one of the two finds,
    when it arrives, something else than (tag, marked), and is dropped.  For alloc writes the whole
    word, a late mark never outlasts the next hand-out.
    SHARED is changed by compare-and-swap, by anybody, and never marked
    near_root and near_leaf are set once, near_leaf first
Locking
    None: written before it is read, or atomic.
Units
    Bytes; states.
"""

from libc.stdint cimport UINTPTR_MAX, int64_t, uint32_t, uintptr_t

from pagealloc.core.atomics cimport atomic_load_ptr, atomic_store_ptr
from pagealloc.core.page_map cimport CHUNK_BYTES


cdef extern from * nogil:
    int count_trailing_zeros "__builtin_ctzll"(unsigned long long bits)


cdef void block_map_init(block_map_t *blocks, page_map_t *map, size_t page_bytes) noexcept nogil:
    """Prepare a map whose memory is zero."""
    blocks.map = map
    blocks.page_shift = <uint32_t>count_trailing_zeros(page_bytes)
    blocks.page_mask = page_bytes - 1
    blocks.chunk_page_mask = (CHUNK_BYTES >> blocks.page_shift) - 1
    blocks.near_root = <void *>UINTPTR_MAX      # no address has this one


cdef void block_map_come_near(block_map_t *blocks, const void *address) noexcept nogil:
    """Take the short way to the 32 GiB around the first arena, which is in the page map already."""
    cdef uintptr_t root = <uintptr_t>address >> (CHUNK_BITS + LEAF_BITS)
    if not block_map_knows_near(blocks):
        blocks.near_leaf = <void **>atomic_load_ptr(&blocks.map.leaves[root])
        atomic_store_ptr(&blocks.near_root, <void *>root)


cdef void block_map_add_slots(
    block_map_t *blocks, int size_class, uint32_t slot_bytes
) noexcept nogil:
    """Enter a class of slots; exact for every offset in a page of up to 64 KiB."""
    blocks.slots[size_class].reciprocal = <uint32_t>(
        ((<int64_t>1 << 32) + slot_bytes - 1) // slot_bytes
    )
    blocks.slots[size_class].nbytes = slot_bytes
