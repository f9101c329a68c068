"""Address -> chunk: the writing half.

Purpose
    Tell from an address alone whose memory it is and what starts there, so that a foreign pointer
    is never followed, and a free needs no lock to be checked.
Structure
    address --bits 47..35--> leaves[] --bits 34..21--> chunk_t: owner, classes, states
Invariants
    a chunk has an owner iff it lies in an arena of that heap that is mapped now (of an arena made
    for one request, only the first chunk is entered: nothing starts in the others)
    the descriptors in `unused` have no owner, and all their classes are 0, and no state is live
Locking
    Writers hold the map's mutex, which is the last one anybody takes; readers need nothing.  What
    is in a chunk's tables is its heap's to order.
Units
    Bytes; entries are 2 MiB chunks.
"""

from libc.errno cimport ENOMEM
from libc.stdint cimport uint16_t, uintptr_t

from pagealloc.core.atomics cimport atomic_store_ptr
from pagealloc.core.mutex cimport mutex_init, mutex_lock, mutex_unlock
from pagealloc.core.os_memory cimport os_page_bytes, os_reserve

cdef enum:
    BLOCK_CHUNKS = 64               # descriptors made at a time: 132 KiB, and 4 MiB of slot states
    STATES_BYTES = CHUNK_MAX_SLOTS * sizeof(uint16_t)


cdef void page_map_init(page_map_t *map) noexcept nogil:
    """Prepare a map whose memory is zero."""
    mutex_init(&map.mutex)


cdef inline size_t whole_pages(size_t nbytes) noexcept nogil:
    return (nbytes + os_page_bytes() - 1) // os_page_bytes() * os_page_bytes()


cdef inline chunk_t **entry_of(page_map_t *map, uintptr_t chunk) noexcept nogil:
    return &(<chunk_t **>map.leaves[chunk >> LEAF_BITS])[chunk & (LEAF_ENTRIES - 1)]


# ---------------------------------------------------------------------------------------------
# Locked

cdef int make_leaves(page_map_t *map, uintptr_t first_leaf, uintptr_t last_leaf) noexcept nogil:
    cdef uintptr_t i
    cdef void *leaf
    for i in range(first_leaf, last_leaf + 1):
        if map.leaves[i] == NULL:
            leaf = os_reserve(whole_pages(LEAF_ENTRIES * sizeof(chunk_t *)), os_page_bytes())
            if leaf == NULL:
                return ENOMEM
            atomic_store_ptr(&map.leaves[i], leaf)
    return 0


cdef int make_descriptors(page_map_t *map) noexcept nogil:
    """Add a block of unused ones; mapped, for their tables are mostly never touched."""
    cdef size_t tables_bytes = whole_pages(BLOCK_CHUNKS * sizeof(chunk_t))
    cdef char *block = <char *>os_reserve(
        tables_bytes + BLOCK_CHUNKS * STATES_BYTES, os_page_bytes()
    )
    cdef chunk_t *chunk
    cdef int i
    if block == NULL:
        return ENOMEM
    for i in range(BLOCK_CHUNKS):
        chunk = <chunk_t *>block + i
        chunk.state_of_slot = <uint16_t *>(block + tables_bytes + i * STATES_BYTES)
        chunk.next = map.unused
        map.unused = chunk
    return 0


cdef chunk_t *take_descriptors(page_map_t *map, size_t n_chunks) noexcept nogil:
    """A list of `n_chunks`; NULL, and nothing taken, if they cannot be had."""
    cdef chunk_t *first = NULL
    cdef chunk_t *chunk
    cdef size_t _i
    for _i in range(n_chunks):
        if map.unused == NULL and make_descriptors(map) != 0:
            push_unused(map, first)
            return NULL
        chunk = map.unused
        map.unused = chunk.next
        chunk.next = first
        first = chunk
    return first


cdef void push_unused(page_map_t *map, chunk_t *chunks) noexcept nogil:
    cdef chunk_t *chunk
    while chunks != NULL:
        chunk = chunks
        chunks = chunk.next
        chunk.next = map.unused
        map.unused = chunk


# ---------------------------------------------------------------------------------------------
# What others call

cdef int page_map_add(
    page_map_t *map, const void *address, size_t nbytes, void *owner, void *arena
) noexcept nogil:
    """Enter all chunks of the range; ENOMEM (and nothing entered) if a table cannot be had."""
    cdef uintptr_t first = <uintptr_t>address >> CHUNK_BITS
    cdef uintptr_t last = (<uintptr_t>address + nbytes - 1) >> CHUNK_BITS
    cdef chunk_t *chunks = NULL
    if last >> (LEAF_BITS + ROOT_BITS):
        return ENOMEM
    mutex_lock(&map.mutex)
    if make_leaves(map, first >> LEAF_BITS, last >> LEAF_BITS) == 0:
        chunks = take_descriptors(map, last - first + 1)
    mutex_unlock(&map.mutex)
    if chunks == NULL:
        return ENOMEM
    page_map_attach(map, address, chunks, owner, arena)
    return 0


cdef void page_map_attach(
    page_map_t *map, const void *address, chunk_t *chunks, void *owner, void *arena
) noexcept nogil:
    """Enter `chunks` from `address` on, where leaves exist: it cannot fail."""
    cdef uintptr_t i = <uintptr_t>address >> CHUNK_BITS
    cdef chunk_t *chunk
    mutex_lock(&map.mutex)
    while chunks != NULL:
        chunk = chunks
        chunks = chunk.next
        chunk.arena = arena
        atomic_store_ptr(&chunk.owner, owner)
        atomic_store_ptr(<void **>entry_of(map, i), chunk)
        i += 1
    mutex_unlock(&map.mutex)


cdef chunk_t *page_map_detach(page_map_t *map, const void *address, size_t nbytes) noexcept nogil:
    """Forget a range in which nothing is live; its descriptors, in order."""
    cdef uintptr_t first = <uintptr_t>address >> CHUNK_BITS
    cdef uintptr_t i = (<uintptr_t>address + nbytes - 1) >> CHUNK_BITS
    cdef chunk_t *chunks = NULL
    cdef chunk_t *chunk
    mutex_lock(&map.mutex)
    while i >= first:
        chunk = entry_of(map, i)[0]
        atomic_store_ptr(<void **>entry_of(map, i), NULL)
        atomic_store_ptr(&chunk.owner, NULL)
        chunk.next = chunks
        chunks = chunk
        i -= 1
    mutex_unlock(&map.mutex)
    return chunks


cdef void page_map_recycle(page_map_t *map, chunk_t *chunks) noexcept nogil:
    """Keep detached descriptors for other chunks."""
    mutex_lock(&map.mutex)
    push_unused(map, chunks)
    mutex_unlock(&map.mutex)
