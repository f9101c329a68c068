"""Where the state of a block is: the arithmetic from an address to one word.

It is inline, so that alloc and free stay one straight line; and here is what a state can be.
"""

from libc.stdint cimport UINTPTR_MAX, uint16_t, uint32_t, uintptr_t

from pagealloc.core.atomics cimport atomic_load_ptr, atomic_load_u16
from pagealloc.core.page_map cimport (
    CHUNK_BITS,
    LEAF_BITS,
    LEAF_ENTRIES,
    chunk_t,
    page_map_chunk,
    page_map_t,
)

cdef extern from * nogil:
    """
    #include <stdint.h>
    #define PAGEALLOC_LIKELY(condition) __builtin_expect(!!(condition), 1)
    #define PAGEALLOC_MARK_BYTE (__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__)
    static inline void pagealloc_mark(uint16_t *state)
    { __atomic_store_n((uint8_t *)state + PAGEALLOC_MARK_BYTE, 1, __ATOMIC_RELAXED); }
    """
    bint LIKELY "PAGEALLOC_LIKELY"(bint condition)
    void mark_returning "pagealloc_mark"(uint16_t *state)

cdef enum:
    FIRST_RUN_CLASS = 128       # classes of slots are below, classes of runs from here on
    SLOT_UNIT_BITS = 6          # there is a state for every 64 bytes of a slab

cdef enum:                      # the state of a block: one word of two bytes
    STATE_FREE = 0
    STATE_FIRST_TAG = 1         # up to STATE_SHARED - 1: live, allocated by the cache of this tag
    STATE_SHARED = 255          # live, and no thread's in particular
    STATE_MARK = 256            # beside a tag: another thread freed it; it is on its way back

cdef struct slot_shape_t:
    uint32_t nbytes             # 0: there is no such class
    uint32_t reciprocal         # ceil(2**32 / nbytes): offset * reciprocal >> 32 = offset / nbytes

cdef struct block_map_t:
    page_map_t *map
    uint32_t page_shift         # log2 of the page size
    size_t page_mask            # page_bytes - 1
    size_t chunk_page_mask      # pages of a chunk - 1
    # The leaf of the map that the first arena lies in, and most others do: read while the address
    # is still being computed.
    void *near_root             # its number; atomic
    void **near_leaf
    slot_shape_t slots[FIRST_RUN_CLASS]

cdef void block_map_init(block_map_t *blocks, page_map_t *map, size_t page_bytes) noexcept nogil
cdef void block_map_come_near(block_map_t *blocks, const void *address) noexcept nogil
cdef void block_map_add_slots(
    block_map_t *blocks, int size_class, uint32_t slot_bytes
) noexcept nogil


cdef inline bint block_map_knows_near(block_map_t *blocks) noexcept nogil:
    """True once block_map_come_near() has been called."""
    return <uintptr_t>atomic_load_ptr(&blocks.near_root) != UINTPTR_MAX     # no address has this


cdef inline chunk_t *block_chunk(block_map_t *blocks, const void *address) noexcept nogil:
    """The descriptor of the chunk that holds `address`, whoever owns it; NULL if nobody does."""
    if LIKELY(
        <uintptr_t>address >> (CHUNK_BITS + LEAF_BITS)
        == <uintptr_t>atomic_load_ptr(&blocks.near_root)
    ):
        return <chunk_t *>atomic_load_ptr(
            &blocks.near_leaf[(<uintptr_t>address >> CHUNK_BITS) & (LEAF_ENTRIES - 1)]
        )
    return page_map_chunk(blocks.map, address)


cdef inline size_t page_in_chunk(block_map_t *blocks, const void *address) noexcept nogil:
    return (<uintptr_t>address >> blocks.page_shift) & blocks.chunk_page_mask


cdef inline size_t block_class(
    block_map_t *blocks, chunk_t *chunk, const void *address
) noexcept nogil:
    """The class of the run that starts at `address`'s page, or of the slab that covers it."""
    return atomic_load_u16(&chunk.pages[page_in_chunk(blocks, address)].size_class)


cdef inline uint16_t *block_state(
    block_map_t *blocks, chunk_t *chunk, const void *address, size_t size_class
) noexcept nogil:
    """The state of the block that starts at `address`; NULL if none of the class can."""
    cdef size_t page = page_in_chunk(blocks, address)
    cdef size_t offset = <uintptr_t>address & blocks.page_mask
    cdef size_t slot
    if LIKELY(size_class >= FIRST_RUN_CLASS):
        return &chunk.pages[page].state if LIKELY(offset == 0) else NULL
    slot = offset * blocks.slots[size_class].reciprocal >> 32
    if slot * blocks.slots[size_class].nbytes != offset:
        return NULL
    return &chunk.state_of_slot[(page << (blocks.page_shift - SLOT_UNIT_BITS)) + slot]


cdef inline bint is_live(uint32_t state) noexcept nogil:
    return STATE_FIRST_TAG <= state <= STATE_SHARED


cdef inline uint16_t *known_block_state(
    block_map_t *blocks, const void *address, size_t size_class
) noexcept nogil:
    """The state of a block that is known to be one."""
    return block_state(blocks, block_chunk(blocks, address), address, size_class)
