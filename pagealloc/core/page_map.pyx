"""Address -> arena: the writing half.

Purpose
    Tell from an address alone whose memory it is, so that a foreign pointer is never freed.
Structure
    address --bits 47..35--> leaves[] --bits 34..21--> (heap, arena)
Invariants
    an entry has an owner iff its chunk lies in an arena of that heap that is mapped now
Locking
    Writers hold the map's mutex, which is the last one anybody takes; readers need nothing.
Units
    Bytes; entries are 2 MiB chunks.
"""

from libc.errno cimport ENOMEM
from libc.stdint cimport uintptr_t

from pagealloc.core.atomics cimport atomic_store_ptr
from pagealloc.core.mutex cimport mutex_init, mutex_lock, mutex_unlock
from pagealloc.core.os_memory cimport os_page_bytes, os_reserve


cdef void page_map_init(page_map_t *map) noexcept nogil:
    """Prepare a map whose memory is zero."""
    mutex_init(&map.mutex, NULL)


cdef int make_leaves(page_map_t *map, uintptr_t first_leaf, uintptr_t last_leaf) noexcept nogil:
    cdef uintptr_t i
    cdef void *leaf
    for i in range(first_leaf, last_leaf + 1):
        if map.leaves[i] == NULL:
            leaf = os_reserve(LEAF_ENTRIES * sizeof(page_map_entry_t), os_page_bytes())
            if leaf == NULL:
                return ENOMEM
            atomic_store_ptr(&map.leaves[i], leaf)
    return 0


cdef int page_map_set(
    page_map_t *map, const void *address, size_t nbytes, void *owner, void *value
) noexcept nogil:
    """Set all chunks of the range; ENOMEM (and nothing set) if a leaf cannot be had."""
    cdef uintptr_t first = <uintptr_t>address >> CHUNK_BITS
    cdef uintptr_t last = (<uintptr_t>address + nbytes - 1) >> CHUNK_BITS
    cdef uintptr_t i
    cdef page_map_entry_t *entry
    cdef int error
    if last >> (LEAF_BITS + ROOT_BITS):
        return ENOMEM
    mutex_lock(&map.mutex)
    error = make_leaves(map, first >> LEAF_BITS, last >> LEAF_BITS)
    if error == 0:
        for i in range(first, last + 1):
            entry = &(<page_map_entry_t *>map.leaves[i >> LEAF_BITS])[i & (LEAF_ENTRIES - 1)]
            if owner != NULL:
                entry.value = value
            atomic_store_ptr(&entry.owner, owner)
    mutex_unlock(&map.mutex)
    return error


cdef void page_map_clear(page_map_t *map, const void *address, size_t nbytes) noexcept nogil:
    """Forget a range that `page_map_set` has set."""
    page_map_set(map, address, nbytes, NULL, NULL)  # its leaves exist: it cannot fail
