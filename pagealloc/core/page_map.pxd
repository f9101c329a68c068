"""Address -> chunk, for every address of the process.

A two-level table over 2 MiB chunks of a 48-bit address space: the root has 2^13 entries, a leaf
2^14.  Reads take no lock; writers hold the map's mutex.  A leaf, once made, stays, and so does the
memory of a chunk's descriptor, which serves another chunk later: whoever follows a pointer that was
freed long ago finds a descriptor, and in it that nothing is live there.
"""

from libc.stdint cimport uint16_t, uintptr_t

from pagealloc.core.atomics cimport atomic_load_ptr
from pagealloc.core.mutex cimport mutex_t

cdef enum:
    CHUNK_BITS = 21                 # 2 MiB
    CHUNK_BYTES = 1 << CHUNK_BITS
    CHUNK_MAX_PAGES = CHUNK_BYTES // 4096
    CHUNK_MAX_SLOTS = CHUNK_BYTES // 64
    LEAF_BITS = 14
    ROOT_BITS = 13
    LEAF_ENTRIES = 1 << LEAF_BITS
    ROOT_ENTRIES = 1 << ROOT_BITS

cdef struct page_t:                 # side by side: a free reads both
    uint16_t size_class             # of the run that starts here or the slab it is in; 0: neither
    uint16_t state                  # of the run that starts here

cdef struct chunk_t:                # 33 cache lines: an odd number spreads them over the cache
    void *owner                     # the heap; set last and cleared first; atomic
    void *arena
    uint16_t *state_of_slot         # of every 64 bytes, used as far as slabs have slots; atomic
    chunk_t *next                   # in a list of chunks that are in no place
    void *padding[4]
    page_t pages[CHUNK_MAX_PAGES]   # atomic

cdef struct block_t:                # as it travels between magazines and lists
    char *address
    uint16_t *state                 # where its state is: computed once, not at every allocation

cdef struct page_map_t:
    mutex_t mutex                   # writers
    chunk_t *unused                 # descriptors; all their states and classes are 0
    void *leaves[ROOT_ENTRIES]      # chunk_t *[LEAF_ENTRIES] each, or NULL

cdef void page_map_init(page_map_t *map) noexcept nogil
cdef int page_map_add(
    page_map_t *map, const void *address, size_t nbytes, void *owner, void *arena
) noexcept nogil
cdef chunk_t *page_map_detach(page_map_t *map, const void *address, size_t nbytes) noexcept nogil
cdef void page_map_attach(
    page_map_t *map, const void *address, chunk_t *chunks, void *owner, void *arena
) noexcept nogil
cdef void page_map_recycle(page_map_t *map, chunk_t *chunks) noexcept nogil


cdef inline chunk_t *page_map_chunk(page_map_t *map, const void *address) noexcept nogil:
    """The descriptor of the chunk that holds `address`, whoever owns it; NULL if nobody does."""
    cdef uintptr_t chunk = <uintptr_t>address >> CHUNK_BITS
    cdef void **leaf
    if chunk >> (LEAF_BITS + ROOT_BITS):
        return NULL
    leaf = <void **>atomic_load_ptr(&map.leaves[chunk >> LEAF_BITS])
    if leaf == NULL:
        return NULL
    return <chunk_t *>atomic_load_ptr(&leaf[chunk & (LEAF_ENTRIES - 1)])


cdef inline void *page_map_arena(
    page_map_t *map, const void *address, const void *owner
) noexcept nogil:
    """The arena that holds `address` if it is `owner`'s; NULL for foreign memory."""
    cdef chunk_t *chunk = page_map_chunk(map, address)
    if chunk == NULL or atomic_load_ptr(&chunk.owner) != owner:
        return NULL
    return chunk.arena
