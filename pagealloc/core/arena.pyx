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
    if error[0] != 0 or resident_bytes < <int64_t>huge_bytes:
        if error[0] == 0:
            error[0] = ENOMEM
        os_release(address, nbytes)
        return NULL
    return address


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
        os_release(address, nbytes)
        return NULL
    return address


cdef arena_t *arena_new(
    size_t nbytes, size_t align_bytes, int backing, int *error
) noexcept nogil:
    """Reserve an arena of at least `nbytes` that starts on `align_bytes`.

    Walks down the ladder for BACKING_AUTO; a backing asked for by name is had or refused.
    Returns NULL with an errno value in `error` when the kernel refuses; nothing is left behind.
    """
    cdef size_t huge_bytes = os_huge_page_bytes()
    cdef size_t page_bytes = os_page_bytes()
    cdef size_t range_bytes = round_up(nbytes, CHUNK_BYTES)
    cdef size_t huge_range_bytes = round_up(range_bytes, huge_bytes)
    cdef int achieved = BACKING_BASE
    cdef void *address = NULL
    cdef arena_t *arena

    error[0] = ENOMEM
    if align_bytes < CHUNK_BYTES:
        align_bytes = CHUNK_BYTES
    # A huge page far above the request (512 MiB where base pages have 64 KiB) serves nobody.
    if huge_bytes <= 2 * range_bytes:
        if backing in (BACKING_AUTO, BACKING_HUGETLB) and align_bytes <= huge_bytes:
            achieved = BACKING_HUGETLB
            address = os_reserve_hugetlb(huge_range_bytes, huge_bytes)
            if address == NULL:
                error[0] = errno
        if address == NULL and backing in (BACKING_AUTO, BACKING_THP):
            achieved = BACKING_THP
            address = reserve_thp(
                huge_range_bytes, align_bytes if align_bytes > huge_bytes else huge_bytes, error
            )
    if address == NULL and backing in (BACKING_AUTO, BACKING_BASE):
        achieved = BACKING_BASE
        address = reserve_base(range_bytes, align_bytes, error)
    if address == NULL:
        return NULL

    arena = <arena_t *>calloc(1, sizeof(arena_t))
    if arena == NULL:
        os_release(address, range_bytes if achieved == BACKING_BASE else huge_range_bytes)
        error[0] = ENOMEM
        return NULL
    arena.address = <char *>address
    arena.nbytes = range_bytes if achieved == BACKING_BASE else huge_range_bytes
    arena.n_pages = <int64_t>(arena.nbytes // page_bytes)
    arena.requested_backing = backing
    arena.achieved_backing = achieved
    arena.granule_bytes = page_bytes if achieved == BACKING_BASE else huge_bytes
    arena.n_granules = <int64_t>(arena.nbytes // arena.granule_bytes)
    # Mapped, not malloced: these tables are long and mostly never touched.
    arena.run_of_page = <run_t **>os_reserve(pages_table_bytes(arena), page_bytes)
    arena.committed = <uint64_t *>os_reserve(committed_table_bytes(arena), page_bytes)
    if arena.run_of_page == NULL or arena.committed == NULL:
        error[0] = errno
        arena_delete(arena)
        return NULL
    error[0] = 0
    return arena


cdef inline size_t pages_table_bytes(const arena_t *arena) noexcept nogil:
    return round_up(<size_t>arena.n_pages * sizeof(run_t *), os_page_bytes())


cdef inline size_t committed_table_bytes(const arena_t *arena) noexcept nogil:
    return round_up(<size_t>(arena.n_granules + 63) // 64 * sizeof(uint64_t), os_page_bytes())


cdef int arena_delete(arena_t *arena) noexcept nogil:
    """Unmap the range and its tables; an errno value, and the arena as it was, on refusal."""
    cdef int error = os_release(arena.address, arena.nbytes)
    if error:
        return error
    # A refusal below leaks the table's address space, which is all there is to lose.
    if arena.run_of_page != NULL:
        os_release(arena.run_of_page, pages_table_bytes(arena))
    if arena.committed != NULL:
        os_release(arena.committed, committed_table_bytes(arena))
    free(arena)
    return 0


# ---------------------------------------------------------------------------------------------
# The ledger of committed granules

cdef int64_t arena_missing_bytes(
    const arena_t *arena, const char *address, int64_t nbytes
) noexcept nogil:
    """Bytes that using the range would add to what may be backed."""
    cdef int64_t first = (address - arena.address) // <int64_t>arena.granule_bytes
    cdef int64_t last = (address + nbytes - 1 - arena.address) // <int64_t>arena.granule_bytes
    cdef int64_t i, n_missing = 0
    for i in range(first, last + 1):
        n_missing += not granule_is_committed(arena, i)
    return n_missing * <int64_t>arena.granule_bytes


cdef bint arena_commit(arena_t *arena, const char *address, int64_t nbytes) noexcept nogil:
    """Mark the range as about to be used; true if all of it is fresh, hence still zero."""
    cdef int64_t first = (address - arena.address) // <int64_t>arena.granule_bytes
    cdef int64_t last = (address + nbytes - 1 - arena.address) // <int64_t>arena.granule_bytes
    cdef int64_t i
    cdef bint fresh = True
    for i in range(first, last + 1):
        if granule_is_committed(arena, i):
            fresh = False
        else:
            arena.committed[i >> 6] |= <uint64_t>1 << (i & 63)
            arena.n_committed += 1
    return fresh


cdef int64_t arena_purge(arena_t *arena, char *address, int64_t nbytes) noexcept nogil:
    """Give back the committed granules that lie wholly inside a free range.

    Only whole granules: purging part of a huge page lowers the RSS and gives the machine nothing
    back.  Returns the physical bytes that went back, counted before the purge; hugetlb pages are
    kept, for purging them would also drop the reservation that protects from SIGBUS.
    """
    cdef int64_t granule_bytes = <int64_t>arena.granule_bytes
    cdef int64_t i = (address - arena.address + granule_bytes - 1) // granule_bytes
    cdef int64_t end = (address + nbytes - arena.address) // granule_bytes
    cdef int64_t first, j, resident_bytes, purged_bytes = 0
    if arena.achieved_backing == BACKING_HUGETLB:
        return 0
    while i < end:
        if not granule_is_committed(arena, i):
            i += 1
            continue
        first = i
        while i < end and granule_is_committed(arena, i):
            i += 1
        resident_bytes = os_resident_bytes(
            arena.address + first * granule_bytes, (i - first) * granule_bytes
        )
        if os_purge(arena.address + first * granule_bytes, (i - first) * granule_bytes) != 0:
            continue    # refused: still backed, so it stays in the ledger and is tried again
        for j in range(first, i):
            arena.committed[j >> 6] &= ~(<uint64_t>1 << (j & 63))
        arena.n_committed -= i - first
        if resident_bytes > 0:
            purged_bytes += resident_bytes
    return purged_bytes


cdef int64_t arena_held_bytes(const arena_t *arena) noexcept nogil:
    """Physical bytes behind the arena, by mincore over its committed granules; -1 if refused."""
    cdef int64_t granule_bytes = <int64_t>arena.granule_bytes
    cdef int64_t i = 0, first, resident_bytes, held_bytes = 0
    while i < arena.n_granules:
        if not granule_is_committed(arena, i):
            i += 64 if i & 63 == 0 and arena.committed[i >> 6] == 0 else 1
            continue
        first = i
        while i < arena.n_granules and granule_is_committed(arena, i):
            i += 1
        resident_bytes = os_resident_bytes(
            arena.address + first * granule_bytes, (i - first) * granule_bytes
        )
        if resident_bytes < 0:
            return -1
        held_bytes += resident_bytes
    return held_bytes


cdef bint arena_check(const arena_t *arena) noexcept nogil:
    """True if the ledger's count is its number of set bits."""
    cdef int64_t i, n_committed = 0
    for i in range(arena.n_granules):
        n_committed += granule_is_committed(arena, i)
    return n_committed == arena.n_committed
