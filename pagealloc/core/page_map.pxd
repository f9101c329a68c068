"""Address -> arena, for every address of the process.

A two-level table over 2 MiB chunks of a 48-bit address space: the root has 2^13 entries, a leaf
2^14.  Reads take no lock (two acquire loads); writers hold the map's mutex.  A leaf, once made,
stays: at 256 KiB of mostly untouched memory for 32 GiB of addresses that is cheaper than proving
that nobody reads it.
"""

from libc.stdint cimport uintptr_t

from pagealloc.core.atomics cimport atomic_load_ptr
from pagealloc.core.mutex cimport mutex_t

cdef enum:
    CHUNK_BITS = 21                 # 2 MiB
    CHUNK_BYTES = 1 << CHUNK_BITS
    LEAF_BITS = 14
    ROOT_BITS = 13
    LEAF_ENTRIES = 1 << LEAF_BITS
    ROOT_ENTRIES = 1 << ROOT_BITS

cdef struct page_map_entry_t:
    void *owner                     # the heap; set last and cleared first
    void *value                     # its arena

cdef struct page_map_t:
    mutex_t mutex                   # writers
    void *leaves[ROOT_ENTRIES]      # page_map_entry_t[LEAF_ENTRIES] each, or NULL

cdef void page_map_init(page_map_t *map) noexcept nogil
cdef int page_map_set(
    page_map_t *map, const void *address, size_t nbytes, void *owner, void *value
) noexcept nogil
cdef void page_map_clear(page_map_t *map, const void *address, size_t nbytes) noexcept nogil


cdef inline void *page_map_find(
    page_map_t *map, const void *address, const void *owner
) noexcept nogil:
    """The arena that holds `address` if it is `owner`'s; NULL for foreign memory.

    Another owner's arena is compared by the entry alone, never followed: it may be unmapped at
    any moment.
    """
    cdef uintptr_t chunk = <uintptr_t>address >> CHUNK_BITS
    cdef page_map_entry_t *entry
    if chunk >> (LEAF_BITS + ROOT_BITS):
        return NULL
    entry = <page_map_entry_t *>atomic_load_ptr(&map.leaves[chunk >> LEAF_BITS])
    if entry == NULL:
        return NULL
    entry += chunk & (LEAF_ENTRIES - 1)
    return entry.value if atomic_load_ptr(&entry.owner) == owner else NULL
