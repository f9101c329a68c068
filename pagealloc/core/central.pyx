"""Slots of one size.

Purpose
    Cut page runs into equal slots, hand them out lowest slot first, give wholly free slabs back.
Structure
    central --partial--> slab <-> slab <-> ...      slabs with a free slot and a live one
            --empty----> slab                       at most one
    slab:  run  | free_bits 0110...1      all outside the slots themselves
Invariants
    a slot never straddles a page: slot i starts at page i // n_slots_per_page of its run, at a
    multiple of slot_bytes
    n_free = popcount(free_bits); no bit before first_word is set; a slab's run leads back to it
    n_live = sum(n_slots - n_free) over all slabs; full slabs are in no list
Locking
    `mutex` for everything; under it the page heap's mutex may be taken.
Units
    Slots; bytes where named.
"""

from libc.errno cimport ENOMEM
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from pagealloc.core.mutex cimport mutex_destroy, mutex_init, mutex_lock, mutex_unlock
from pagealloc.core.page_heap cimport (
    FREED,
    NOT_LIVE,
    NOT_OURS,
    page_heap_alloc,
    page_heap_free_slab,
)
from pagealloc.core.page_run cimport RUN_SLAB
from pagealloc.core.size_class cimport SLAB_BYTES

cdef extern from "poison.h" nogil:
    void poison "pagealloc_poison"(void *address, size_t nbytes)
    void unpoison "pagealloc_unpoison"(void *address, size_t nbytes)

cdef extern from * nogil:
    int count_trailing_zeros "__builtin_ctzll"(uint64_t bits)
    int popcount "__builtin_popcountll"(uint64_t bits)


cdef void central_init(central_t *central, page_heap_t *pages, uint32_t slot_bytes) noexcept nogil:
    memset(central, 0, sizeof(central_t))
    mutex_init(&central.mutex, NULL)
    central.pages = pages
    central.slot_bytes = slot_bytes
    central.n_slots_per_page = <uint32_t>(pages.page_bytes // slot_bytes)
    central.slab_pages = <int64_t>(SLAB_BYTES // pages.page_bytes)
    if central.slab_pages == 0:
        central.slab_pages = 1
    central.n_slots = central.n_slots_per_page * <uint32_t>central.slab_pages


cdef void central_destroy(central_t *central) noexcept nogil:
    """Free the descriptors; there may be no slab."""
    cdef slab_t *slab
    while central.unused != NULL:
        slab = central.unused
        central.unused = slab.next
        free(slab)
    mutex_destroy(&central.mutex)


# ---------------------------------------------------------------------------------------------
# Slabs, locked

cdef inline uint32_t n_words(const central_t *central) noexcept nogil:
    return (central.n_slots + 63) // 64


cdef inline char *slot_address(
    const central_t *central, const slab_t *slab, uint32_t i
) noexcept nogil:
    return (
        slab.run.address
        + i // central.n_slots_per_page * <int64_t>central.pages.page_bytes
        + i % central.n_slots_per_page * central.slot_bytes
    )


cdef slab_t *new_slab(central_t *central, int *error) noexcept nogil:
    """Take a run from the page heap and make all its slots free."""
    cdef slab_t *slab = central.unused
    cdef uint32_t i
    cdef bint fresh
    if slab == NULL:
        slab = <slab_t *>calloc(1, sizeof(slab_t) + n_words(central) * sizeof(uint64_t))
        if slab == NULL:
            error[0] = ENOMEM
            return NULL
        slab.central = central
        slab.free_bits = <uint64_t *>(slab + 1)
    else:
        central.unused = slab.next
    slab.run = page_heap_alloc(
        central.pages, central.slab_pages, central.pages.page_bytes, RUN_SLAB, slab, &fresh, error
    )
    if slab.run == NULL:
        slab.next = central.unused
        central.unused = slab
        return NULL
    for i in range(n_words(central)):
        slab.free_bits[i] = ~<uint64_t>0
    if central.n_slots % 64:
        slab.free_bits[central.n_slots // 64] = (<uint64_t>1 << (central.n_slots % 64)) - 1
    slab.n_free = central.n_slots
    slab.first_word = 0
    central.n_slabs += 1
    poison(slab.run.address, <size_t>central.slab_pages * central.pages.page_bytes)
    return slab


cdef void drop_slab(central_t *central, slab_t *slab) noexcept nogil:
    """Give a wholly free slab's run back."""
    page_heap_free_slab(central.pages, slab.run)
    slab.run = NULL
    slab.next = central.unused
    central.unused = slab
    central.n_slabs -= 1


cdef void link_partial(central_t *central, slab_t *slab) noexcept nogil:
    slab.previous = NULL
    slab.next = central.partial
    if slab.next != NULL:
        slab.next.previous = slab
    central.partial = slab


cdef void unlink_partial(central_t *central, slab_t *slab) noexcept nogil:
    if slab.next != NULL:
        slab.next.previous = slab.previous
    if slab.previous != NULL:
        slab.previous.next = slab.next
    else:
        central.partial = slab.next


cdef slab_t *take_empty(central_t *central, int *error) noexcept nogil:
    """A wholly free slab, kept or new, put among the partial ones."""
    cdef slab_t *slab = central.empty
    if slab != NULL:
        central.empty = NULL
    else:
        slab = new_slab(central, error)
    if slab != NULL:
        link_partial(central, slab)
    return slab


# ---------------------------------------------------------------------------------------------
# What others call

cdef char *central_alloc(central_t *central, int *error) noexcept nogil:
    """A slot; NULL with ERROR_BUDGET or an errno value in `error` if none can be had."""
    cdef slab_t *slab
    cdef uint32_t word, i
    cdef char *address = NULL
    error[0] = 0
    mutex_lock(&central.mutex)
    slab = central.partial
    if slab == NULL:
        slab = take_empty(central, error)
    if slab != NULL:
        word = slab.first_word
        while slab.free_bits[word] == 0:
            word += 1
        slab.first_word = word
        i = word * 64 + <uint32_t>count_trailing_zeros(slab.free_bits[word])
        slab.free_bits[word] &= slab.free_bits[word] - 1
        slab.n_free -= 1
        if slab.n_free == 0:
            unlink_partial(central, slab)
        central.n_live += 1
        address = slot_address(central, slab, i)
        unpoison(address, central.slot_bytes)
    mutex_unlock(&central.mutex)
    return address


cdef int central_free(slab_t *slab, char *address) noexcept nogil:
    """Take a slot back: FREED, NOT_OURS for a place inside one, NOT_LIVE for one that is free."""
    cdef central_t *central = <central_t *>slab.central
    cdef int outcome
    mutex_lock(&central.mutex)
    outcome = take_back(central, slab, address)
    mutex_unlock(&central.mutex)
    return outcome


cdef int take_back(central_t *central, slab_t *slab, char *address) noexcept nogil:
    cdef size_t page_bytes = central.pages.page_bytes
    cdef size_t offset
    cdef uint32_t in_page, i
    # A slab that another thread has just emptied: its descriptor is unused, or leads elsewhere.
    if slab.run == NULL or address < slab.run.address:
        return NOT_LIVE
    offset = <size_t>(address - slab.run.address)
    if offset >= <size_t>central.slab_pages * page_bytes:
        return NOT_LIVE
    in_page = <uint32_t>(offset % page_bytes)
    if in_page % central.slot_bytes or in_page // central.slot_bytes >= central.n_slots_per_page:
        return NOT_OURS
    i = <uint32_t>(offset // page_bytes) * central.n_slots_per_page + in_page // central.slot_bytes
    if (slab.free_bits[i // 64] >> (i % 64)) & 1:
        return NOT_LIVE
    poison(address, central.slot_bytes)
    slab.free_bits[i // 64] |= <uint64_t>1 << (i % 64)
    if i // 64 < slab.first_word:
        slab.first_word = i // 64
    slab.n_free += 1
    central.n_live -= 1
    if slab.n_free == 1:
        link_partial(central, slab)
    if slab.n_free == central.n_slots:
        unlink_partial(central, slab)
        if central.empty == NULL:
            central.empty = slab
        else:
            drop_slab(central, slab)
    return FREED


cdef void central_trim(central_t *central) noexcept nogil:
    """Give the kept empty slab back to the page heap."""
    mutex_lock(&central.mutex)
    if central.empty != NULL:
        drop_slab(central, central.empty)
        central.empty = NULL
    mutex_unlock(&central.mutex)


cdef const char *check_slab(
    const central_t *central, const slab_t *slab, uint32_t *n_used
) noexcept nogil:
    cdef uint32_t i, n_free = 0
    if slab.run.state != RUN_SLAB or slab.run.slab != slab:
        return "a slab's run does not lead back to it"
    for i in range(n_words(central)):
        n_free += <uint32_t>popcount(slab.free_bits[i])
        if i < slab.first_word and slab.free_bits[i]:
            return "a slab has a free slot before first_word"
    if n_free != slab.n_free:
        return "a slab's n_free is not its number of free bits"
    n_used[0] = central.n_slots - n_free
    return NULL


cdef const char *central_check(central_t *central) noexcept nogil:
    """NULL, or which invariant is broken."""
    cdef const char *broken = NULL
    cdef int64_t n_live = 0, n_slabs = 0, n_full
    cdef uint32_t n_used = 0
    cdef slab_t *slab
    mutex_lock(&central.mutex)
    slab = central.partial
    while slab != NULL and broken == NULL:
        broken = check_slab(central, slab, &n_used)
        if broken == NULL and (n_used == 0 or n_used == central.n_slots):
            broken = "a partial slab is empty or full"
        n_live += n_used
        n_slabs += 1
        slab = slab.next
    if broken == NULL and central.empty != NULL:
        broken = check_slab(central, central.empty, &n_used)
        if broken == NULL and n_used:
            broken = "the slab kept as empty has live slots"
        n_slabs += 1
    n_full = central.n_slabs - n_slabs
    if broken == NULL and n_live + n_full * <int64_t>central.n_slots != central.n_live:
        broken = "n_live is not the number of slots in use"
    mutex_unlock(&central.mutex)
    return broken
