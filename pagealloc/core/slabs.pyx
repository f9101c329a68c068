"""Slots of one size.

Purpose
    Cut page runs into equal slots, hand out those of the fullest slab, lowest first, so that the
    emptier ones run empty; take wholly free slabs back.
Structure
    slabs --partial[fill]--> slab <-> slab <-> ...    slabs with a free slot and a taken one
          --empty----------> slab                     at most one
    slab:  run  | free_bits 0110...1      all outside the slots themselves
Invariants
    a slot never straddles a page: slot i starts at page i // n_slots_per_page of its run, at a
    multiple of slot_bytes
    n_free = popcount(free_bits); no bit before first_word is set; a slab's run leads back to it
    n_taken = sum(n_slots - n_free) over all slabs; full slabs are in no list
Locking
    The central list's mutex; the page heap's may be taken under it.  That a slot is freed once is
    known before it comes here, by its state in the page map.
Units
    Slots; bytes where named.
"""

from libc.errno cimport ENOMEM
from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from pagealloc.core.arena cimport arena_t
from pagealloc.core.page_heap cimport (
    FREED_LONG_AGO,
    page_heap_alloc,
    page_heap_free,
    page_heap_t,
)
from pagealloc.core.page_map cimport block_t, page_map_arena
from pagealloc.core.page_run cimport RUN_SLAB
from pagealloc.core.size_class cimport SLAB_BYTES

cdef extern from * nogil:
    int count_trailing_zeros "__builtin_ctzll"(uint64_t bits)
    int popcount "__builtin_popcountll"(uint64_t bits)


cdef void slabs_init(
    slabs_t *slabs, page_heap_t *pages, uint32_t slot_bytes, uint16_t size_class
) noexcept nogil:
    memset(slabs, 0, sizeof(slabs_t))
    slabs.pages = pages
    slabs.slot_bytes = slot_bytes
    slabs.size_class = size_class
    slabs.n_slots_per_page = <uint32_t>(pages.page_bytes // slot_bytes)
    slabs.slab_pages = <int64_t>(SLAB_BYTES // pages.page_bytes)
    if slabs.slab_pages == 0:
        slabs.slab_pages = 1
    slabs.n_slots = slabs.n_slots_per_page * <uint32_t>slabs.slab_pages


cdef void slabs_destroy(slabs_t *slabs) noexcept nogil:
    """Free the descriptors; there may be no slab."""
    cdef slab_t *slab
    while slabs.unused != NULL:
        slab = slabs.unused
        slabs.unused = slab.next
        free(slab)


# ---------------------------------------------------------------------------------------------
# Slabs

cdef inline uint32_t n_words(const slabs_t *slabs) noexcept nogil:
    return (slabs.n_slots + 63) // 64


cdef inline char *slot_address(
    const slabs_t *slabs, const slab_t *slab, uint32_t i
) noexcept nogil:
    return (
        slab.run.address
        + i // slabs.n_slots_per_page * <int64_t>slabs.pages.page_bytes
        + i % slabs.n_slots_per_page * slabs.slot_bytes
    )


cdef slab_t *new_slab(slabs_t *slabs, bint may_grow, int *error) noexcept nogil:
    """Take a run from the page heap and make all its slots free."""
    cdef slab_t *slab = slabs.unused
    cdef uint32_t i
    cdef bint fresh
    if slab == NULL:
        slab = <slab_t *>calloc(1, sizeof(slab_t) + n_words(slabs) * sizeof(uint64_t))
        if slab == NULL:
            error[0] = ENOMEM
            return NULL
        slab.free_bits = <uint64_t *>(slab + 1)
    else:
        slabs.unused = slab.next
    slab.run = page_heap_alloc(
        slabs.pages, slabs.slab_pages, slabs.pages.page_bytes, slabs.size_class, slab, may_grow,
        &fresh, error
    )
    if slab.run == NULL:
        slab.next = slabs.unused
        slabs.unused = slab
        return NULL
    for i in range(n_words(slabs)):
        slab.free_bits[i] = ~<uint64_t>0
    if slabs.n_slots % 64:
        slab.free_bits[slabs.n_slots // 64] = (<uint64_t>1 << (slabs.n_slots % 64)) - 1
    slab.n_free = slabs.n_slots
    slab.first_word = 0
    slabs.n_slabs += 1
    return slab


cdef void drop_slab(slabs_t *slabs, slab_t *slab, int freed) noexcept nogil:
    """Give a wholly free slab's run back."""
    cdef block_t block
    block.address = slab.run.address
    page_heap_free(slabs.pages, &block, 1, freed)
    slab.run = NULL
    slab.next = slabs.unused
    slabs.unused = slab
    slabs.n_slabs -= 1


cdef void keep_or_drop(slabs_t *slabs, slab_t *slab, int freed) noexcept nogil:
    """Keep a slab that has run empty, if none is kept."""
    if slabs.empty == NULL:
        slabs.empty = slab
        slabs.empty_is_victim = False
    else:
        drop_slab(slabs, slab, freed)


cdef inline uint32_t fill_of(const slabs_t *slabs, const slab_t *slab) noexcept nogil:
    """Which list is a partial slab's: 0 for those with the fewest free slots."""
    return (slab.n_free * N_FILLS - 1) // slabs.n_slots


cdef void link_partial(slabs_t *slabs, slab_t *slab) noexcept nogil:
    slab.fill = fill_of(slabs, slab)
    slab.previous = NULL
    slab.next = slabs.partial[slab.fill]
    if slab.next != NULL:
        slab.next.previous = slab
    slabs.partial[slab.fill] = slab


cdef void unlink_partial(slabs_t *slabs, slab_t *slab) noexcept nogil:
    if slab.next != NULL:
        slab.next.previous = slab.previous
    if slab.previous != NULL:
        slab.previous.next = slab.next
    else:
        slabs.partial[slab.fill] = slab.next


cdef slab_t *take_slab(slabs_t *slabs, bint may_grow, int *error) noexcept nogil:
    """The fullest slab that has a free slot, or else the kept or a new one; in no list."""
    cdef slab_t *slab
    cdef int fill
    for fill in range(N_FILLS):
        slab = slabs.partial[fill]
        if slab != NULL:
            unlink_partial(slabs, slab)
            return slab
    slab = slabs.empty
    slabs.empty = NULL
    return slab if slab != NULL else new_slab(slabs, may_grow, error)


# ---------------------------------------------------------------------------------------------
# What others call

cdef int64_t slabs_take(
    slabs_t *slabs, block_t *slots, int64_t n, bint may_grow, int *error
) noexcept nogil:
    """Fill in the addresses of up to `n` slots of one slab; how many.

    0 with a code in `error` if none can be had.
    """
    cdef slab_t *slab
    cdef uint32_t word, i
    cdef int64_t n_taken = 0
    error[0] = 0
    slab = take_slab(slabs, may_grow, error)
    if slab == NULL:
        return 0
    word = slab.first_word
    while n_taken < n and slab.n_free:
        while slab.free_bits[word] == 0:
            word += 1
        i = word * 64 + <uint32_t>count_trailing_zeros(slab.free_bits[word])
        slab.free_bits[word] &= slab.free_bits[word] - 1
        slab.n_free -= 1
        slots[n_taken].address = slot_address(slabs, slab, i)
        n_taken += 1
    slab.first_word = word
    if slab.n_free:
        link_partial(slabs, slab)
    slabs.n_taken += n_taken
    return n_taken


cdef slab_t *slab_of(const slabs_t *slabs, const char *slot) noexcept nogil:
    # Without the page heap's mutex: this slab's entries stay while one of its slots is taken.
    cdef const arena_t *arena = <const arena_t *>page_map_arena(
        slabs.pages.map, slot, slabs.pages.owner
    )
    return <slab_t *>arena.run_of_page[
        (slot - arena.address) // <int64_t>slabs.pages.page_bytes
    ].slab


cdef void slabs_put(
    slabs_t *slabs, const block_t *slots, int64_t n, int freed
) noexcept nogil:
    """Take back slots that `slabs_take` gave; `freed` as for page_heap_free."""
    cdef size_t page_bytes = slabs.pages.page_bytes
    cdef size_t offset
    cdef uint32_t i
    cdef int64_t k
    cdef slab_t *slab
    for k in range(n):
        slab = slab_of(slabs, slots[k].address)
        offset = <size_t>(slots[k].address - slab.run.address)
        i = <uint32_t>(offset // page_bytes) * slabs.n_slots_per_page
        i += <uint32_t>(offset % page_bytes) // slabs.slot_bytes
        slab.free_bits[i // 64] |= <uint64_t>1 << (i % 64)
        if i // 64 < slab.first_word:
            slab.first_word = i // 64
        slab.n_free += 1
        if slab.n_free == 1:            # never all: a slab has two slots at least
            link_partial(slabs, slab)
        elif slab.n_free == slabs.n_slots:
            unlink_partial(slabs, slab)
            keep_or_drop(slabs, slab, freed)
        elif fill_of(slabs, slab) != slab.fill:
            unlink_partial(slabs, slab)
            link_partial(slabs, slab)
    slabs.n_taken -= n


cdef void slabs_collect(slabs_t *slabs) noexcept nogil:
    """One collection: the kept empty slab goes at the second that finds it."""
    if slabs.empty != NULL and slabs.empty_is_victim:
        slabs_trim(slabs)
    slabs.empty_is_victim = True


cdef void slabs_trim(slabs_t *slabs) noexcept nogil:
    """Give the kept empty slab back to the page heap."""
    if slabs.empty != NULL:
        drop_slab(slabs, slabs.empty, FREED_LONG_AGO)
        slabs.empty = NULL


cdef const char *check_slab(
    const slabs_t *slabs, const slab_t *slab, uint32_t *n_used
) noexcept nogil:
    cdef uint32_t i, n_free = 0
    if slab.run.state != RUN_SLAB or slab.run.slab != slab:
        return "a slab's run does not lead back to it"
    for i in range(n_words(slabs)):
        n_free += <uint32_t>popcount(slab.free_bits[i])
        if i < slab.first_word and slab.free_bits[i]:
            return "a slab has a free slot before first_word"
    if n_free != slab.n_free:
        return "a slab's n_free is not its number of free bits"
    n_used[0] = slabs.n_slots - n_free
    return NULL


cdef const char *slabs_check(slabs_t *slabs) noexcept nogil:
    """NULL, or which invariant is broken."""
    cdef const char *broken = NULL
    cdef int64_t n_taken = 0, n_slabs = 0, n_full
    cdef uint32_t n_used = 0, fill
    cdef slab_t *slab
    for fill in range(N_FILLS):
        slab = slabs.partial[fill]
        while slab != NULL and broken == NULL:
            broken = check_slab(slabs, slab, &n_used)
            if broken == NULL and (n_used == 0 or n_used == slabs.n_slots):
                broken = "a partial slab is empty or full"
            if broken == NULL and (slab.fill != fill or fill_of(slabs, slab) != fill):
                broken = "a partial slab is not in the list of those as full"
            n_taken += n_used
            n_slabs += 1
            slab = slab.next
    if broken == NULL and slabs.empty != NULL:
        broken = check_slab(slabs, slabs.empty, &n_used)
        if broken == NULL and n_used:
            broken = "the slab kept as empty has taken slots"
        n_slabs += 1
    n_full = slabs.n_slabs - n_slabs
    if broken == NULL and n_taken + n_full * <int64_t>slabs.n_slots != slabs.n_taken:
        broken = "n_taken is not the number of slots in use"
    return broken
