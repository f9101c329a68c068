"""One arena.

Purpose
    Reserve a range from the kernel with the best backing that can be had, know what backing that
    really is, and keep the ledger of what may be backed.
Structure
    address                                                       address + nbytes
    |  granule  |  granule  |  granule  | ...                            |
     committed:1       0           1
    A granule is the unit in which a touch takes memory from the machine: a page on base pages, a
    huge page under THP and hugetlb.
Invariants
    address and nbytes are multiples of granule_bytes and of CHUNK_BYTES
    n_committed = popcount(committed); a page that was ever touched since the last purge of its
    granule lies in a committed granule
    achieved_backing is what one touch was *seen* to back, not what was asked for
    all granules of a hugetlb arena are committed: they left the machine's pool when it was made
Locking
    The page heap's mutex.
Units
    Bytes, pages and granules.
"""

from libc.errno cimport EINVAL, ENOMEM, errno
from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport calloc, free

from pagealloc.core.os_memory cimport (
    MADV_HUGEPAGE,
    MADV_NOHUGEPAGE,
    os_abandon,
    os_advise,
    os_huge_page_bytes,
    os_page_bytes,
    os_purge,
    os_release,
    os_reserve,
    os_reserve_hugetlb,
    os_resident_bytes,
)
from pagealloc.core.page_map cimport CHUNK_BYTES
from pagealloc.core.page_run cimport run_t


cdef extern from * nogil:
    int count_trailing_zeros "__builtin_ctzll"(uint64_t bits)
    int popcount "__builtin_popcountll"(uint64_t bits)


cdef inline size_t round_up(size_t nbytes, size_t unit_bytes) noexcept nogil:
    return (nbytes + unit_bytes - 1) // unit_bytes * unit_bytes


# ---------------------------------------------------------------------------------------------
# The ladder: hugetlb -> thp -> base

cdef void *reserve_thp(size_t nbytes, size_t align_bytes, int *error) noexcept nogil:
    """Reserve a range in which one touch was seen to back a whole huge page.

    The advice alone proves nothing: THP may be off for this process, or memory too fragmented.
    So the first huge page is touched, counted, and given back: a new arena is untouched.
    """
    cdef size_t huge_bytes = os_huge_page_bytes()
    cdef char *address = <char *>os_reserve(nbytes, align_bytes)
    cdef int64_t resident_bytes = 0
    if address == NULL:
        error[0] = errno
        return NULL
    error[0] = os_advise(address, nbytes, MADV_HUGEPAGE)
    if error[0] == 0:
        (<volatile char *>address)[0] = 0
        resident_bytes = os_resident_bytes(address, huge_bytes)
        error[0] = os_purge(address, huge_bytes)
    if error[0] == 0 and resident_bytes == <int64_t>huge_bytes:
        return address
    os_abandon(address, nbytes)
    error[0] = ERROR_NO_HUGE_PAGES
    return NULL


cdef void *reserve_base(size_t nbytes, size_t align_bytes, int *error) noexcept nogil:
    """Reserve a range on base pages, also where the system gives huge pages unasked."""
    cdef void *address = os_reserve(nbytes, align_bytes)
    cdef int refusal
    if address == NULL:
        error[0] = errno
        return NULL
    refusal = os_advise(address, nbytes, MADV_NOHUGEPAGE)
    if refusal not in (0, EINVAL):  # EINVAL: a kernel without THP, which is base pages as well
        error[0] = refusal
        os_abandon(address, nbytes)
        return NULL
    return address


cdef void *walk_ladder(
    int ladder, size_t nbytes, size_t huge_nbytes, size_t align_bytes, int *achieved, int *error
) noexcept nogil:
    """The range from the highest rung that can be had, and which rung that is."""
    cdef size_t huge_bytes = os_huge_page_bytes()
    cdef void *address = NULL
    error[0] = ERROR_NO_HUGE_PAGES
    # A huge page far above the request (512 MiB where base pages have 64 KiB) serves nobody.
    if huge_bytes <= 2 * nbytes:
        if ladder & BACKING_HUGETLB:
            achieved[0] = BACKING_HUGETLB
            if align_bytes <= huge_bytes:
                address = os_reserve_hugetlb(huge_nbytes, huge_bytes)
                if address == NULL:
                    error[0] = errno
            else:
                error[0] = ERROR_ALIGNMENT
        if address == NULL and ladder & BACKING_THP:
            achieved[0] = BACKING_THP
            address = reserve_thp(
                huge_nbytes, align_bytes if align_bytes > huge_bytes else huge_bytes, error
            )
    if address == NULL and ladder & BACKING_BASE:
        achieved[0] = BACKING_BASE
        address = reserve_base(nbytes, align_bytes, error)
    return address


cdef arena_t *arena_new(
    size_t nbytes, size_t align_bytes, int ladder, int *error
) noexcept nogil:
    """Reserve an arena of at least `nbytes` that starts on `align_bytes`.

    NULL with an errno value or a code in `error` when it cannot be had; nothing is left behind.
    """
    cdef size_t huge_bytes = os_huge_page_bytes()
    cdef size_t page_bytes = os_page_bytes()
    cdef size_t range_bytes = round_up(nbytes, CHUNK_BYTES)
    cdef size_t huge_range_bytes = round_up(range_bytes, huge_bytes)
    cdef arena_t *arena = <arena_t *>calloc(1, sizeof(arena_t))
    if arena == NULL:
        error[0] = ENOMEM
        return NULL
    if align_bytes < CHUNK_BYTES:
        align_bytes = CHUNK_BYTES
    arena.address = <char *>walk_ladder(
        ladder, range_bytes, huge_range_bytes, align_bytes, &arena.achieved_backing, error
    )
    if arena.address == NULL:
        free(arena)
        return NULL
    arena.nbytes = range_bytes if arena.achieved_backing == BACKING_BASE else huge_range_bytes
    arena.n_pages = <int64_t>(arena.nbytes // page_bytes)
    arena.granule_bytes = page_bytes if arena.achieved_backing == BACKING_BASE else huge_bytes
    arena.n_granules = <int64_t>(arena.nbytes // arena.granule_bytes)
    # Mapped, not malloced: these tables are long and mostly never touched.
    arena.run_of_page = <run_t **>os_reserve(pages_table_bytes(arena), page_bytes)
    arena.committed = <uint64_t *>os_reserve(committed_table_bytes(arena), page_bytes)
    if arena.run_of_page == NULL or arena.committed == NULL:
        error[0] = errno
        arena_abandon(arena)
        return NULL
    if arena.achieved_backing == BACKING_HUGETLB:
        arena_commit(arena, arena.address, <int64_t>arena.nbytes)
    error[0] = 0
    return arena


cdef inline size_t pages_table_bytes(const arena_t *arena) noexcept nogil:
    return round_up(<size_t>arena.n_pages * sizeof(run_t *), os_page_bytes())


cdef inline size_t committed_table_bytes(const arena_t *arena) noexcept nogil:
    return round_up(<size_t>(arena.n_granules + 63) // 64 * sizeof(uint64_t), os_page_bytes())


cdef void drop_tables(arena_t *arena) noexcept nogil:
    if arena.run_of_page != NULL:
        os_abandon(arena.run_of_page, pages_table_bytes(arena))
    if arena.committed != NULL:
        os_abandon(arena.committed, committed_table_bytes(arena))
    free(arena)


cdef int arena_delete(arena_t *arena) noexcept nogil:
    """Unmap the range and its tables; an errno value, and the arena as it was, on refusal."""
    cdef int error = os_release(arena.address, arena.nbytes)
    if error == 0:
        drop_tables(arena)
    return error


cdef void arena_abandon(arena_t *arena) noexcept nogil:
    """Give up an arena that nobody has used yet."""
    os_abandon(arena.address, arena.nbytes)
    drop_tables(arena)


# ---------------------------------------------------------------------------------------------
# The ledger of committed granules: 64 at a time, for a run may have thousands

cdef inline int64_t first_granule(const arena_t *arena, const char *address) noexcept nogil:
    return (address - arena.address) // <int64_t>arena.granule_bytes


cdef inline int64_t end_granule(const arena_t *arena, const char *end) noexcept nogil:
    return (end - 1 - arena.address) // <int64_t>arena.granule_bytes + 1


cdef inline uint64_t word_mask(int64_t word, int64_t first, int64_t end) noexcept nogil:
    """The bits of a word that stand for granules in [first, end)."""
    cdef uint64_t mask = ~<uint64_t>0
    if first > word * 64:
        mask &= ~<uint64_t>0 << (first - word * 64)
    if end < word * 64 + 64:
        mask &= ~<uint64_t>0 >> (word * 64 + 64 - end)
    return mask


cdef inline int64_t next_granule(
    const arena_t *arena, int64_t i, int64_t end, bint committed
) noexcept nogil:
    """The first granule from `i` on that is committed, or is not; `end` if there is none."""
    cdef uint64_t flip = 0 if committed else ~<uint64_t>0
    cdef uint64_t bits
    while i < end:
        bits = (arena.committed[i >> 6] ^ flip) >> (i & 63)
        if bits:
            i += count_trailing_zeros(bits)
            return i if i < end else end
        i = (i | 63) + 1
    return end


cdef int64_t arena_missing_bytes(
    const arena_t *arena, const char *address, int64_t nbytes
) noexcept nogil:
    """Bytes that using the range would add to what may be backed."""
    cdef int64_t first = first_granule(arena, address)
    cdef int64_t end = end_granule(arena, address + nbytes)
    cdef int64_t n_committed = 0, word
    for word in range(first >> 6, ((end - 1) >> 6) + 1):
        n_committed += popcount(arena.committed[word] & word_mask(word, first, end))
    return (end - first - n_committed) * <int64_t>arena.granule_bytes


cdef bint arena_commit(arena_t *arena, const char *address, int64_t nbytes) noexcept nogil:
    """Mark the range as about to be used; true if all of it is fresh, hence still zero."""
    cdef int64_t first = first_granule(arena, address)
    cdef int64_t end = end_granule(arena, address + nbytes)
    cdef int64_t n_missing = (
        arena_missing_bytes(arena, address, nbytes) // <int64_t>arena.granule_bytes
    )
    cdef int64_t word
    for word in range(first >> 6, ((end - 1) >> 6) + 1):
        arena.committed[word] |= word_mask(word, first, end)
    arena.n_committed += n_missing
    return n_missing == end - first


cdef int64_t arena_purge(arena_t *arena, char *address, int64_t nbytes) noexcept nogil:
    """Give back the committed granules that lie wholly inside a free range.

    Only whole granules: purging part of a huge page lowers the RSS and gives the machine nothing
    back.  Returns the physical bytes that went back, counted before the purge; hugetlb pages are
    kept, for purging them would also drop the reservation that protects from SIGBUS.
    """
    cdef int64_t granule_bytes = <int64_t>arena.granule_bytes
    cdef int64_t i = (address - arena.address + granule_bytes - 1) // granule_bytes
    cdef int64_t end = (address + nbytes - arena.address) // granule_bytes
    cdef int64_t first, word, resident_bytes, purged_bytes = 0
    if arena.achieved_backing == BACKING_HUGETLB:
        return 0
    while True:
        first = next_granule(arena, i, end, True)
        if first >= end:
            return purged_bytes
        i = next_granule(arena, first, end, False)
        resident_bytes = os_resident_bytes(
            arena.address + first * granule_bytes, (i - first) * granule_bytes
        )
        if os_purge(arena.address + first * granule_bytes, (i - first) * granule_bytes) != 0:
            continue    # refused: still backed, so it stays in the ledger and is tried again
        for word in range(first >> 6, ((i - 1) >> 6) + 1):
            arena.committed[word] &= ~word_mask(word, first, i)
        arena.n_committed -= i - first
        if resident_bytes > 0:
            purged_bytes += resident_bytes


cdef int64_t arena_held_bytes(const arena_t *arena) noexcept nogil:
    """Physical bytes behind the arena, by mincore over its committed granules; -1 if refused."""
    cdef int64_t granule_bytes = <int64_t>arena.granule_bytes
    cdef int64_t i = 0, first, resident_bytes, held_bytes = 0
    while True:
        first = next_granule(arena, i, arena.n_granules, True)
        if first == arena.n_granules:
            return held_bytes
        i = next_granule(arena, first, arena.n_granules, False)
        resident_bytes = os_resident_bytes(
            arena.address + first * granule_bytes, (i - first) * granule_bytes
        )
        if resident_bytes < 0:
            return -1
        held_bytes += resident_bytes


cdef bint arena_check(const arena_t *arena) noexcept nogil:
    """True if the ledger's count is its number of set bits, none of them behind the end."""
    cdef int64_t word, n_committed = 0
    for word in range((arena.n_granules + 63) >> 6):
        if arena.committed[word] & ~word_mask(word, 0, arena.n_granules):
            return False
        n_committed += popcount(arena.committed[word])
    return n_committed == arena.n_committed
