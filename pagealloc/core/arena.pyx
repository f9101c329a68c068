"""One arena.

Purpose
    Hold a range reserved from the kernel, and the ledger of what of it may be backed.
Structure
    address                                                       address + nbytes
    |  granule  |  granule  |  granule  | ...                            |
    committed: 11111111   1..1..11    00000000      a bit a page
    split:        0           1           0         a bit a huge page
    A granule is what one touch takes from the machine: a page on base pages, a huge page under THP
    and hugetlb, but again a page in a huge page that was split.
    A piece (a chunk, or a huge page that is longer) has the tick at which memory in it was freed
    last: what decides when idle memory goes back by itself.
Invariants
    address and nbytes are multiples of the granule and of CHUNK_BYTES
    n_committed = popcount(committed); a page that was ever touched since it was purged last is
    committed; so are all pages of a huge page that is not split, or none
    achieved_backing is what one touch was *seen* to back, not what was asked for
    all pages of a hugetlb arena are committed: they left the machine's pool when it was made
    n_dirty = number of pieces with a tick
Locking
    The page heap's mutex.
Units
    Pages, counted from the arena's start; bytes where named.
"""

from libc.errno cimport ENOMEM, errno
from libc.stdint cimport int32_t, int64_t, uint64_t
from libc.stdlib cimport calloc, free

from pagealloc.core.backing cimport (
    BACKING_BASE,
    BACKING_HUGETLB,
    BACKING_THP,
    backing_collapse,
    backing_reserve,
    backing_t,
    placement_t,
    round_up,
)
from pagealloc.core.os_memory cimport (
    MADV_HUGEPAGE,
    MADV_NOHUGEPAGE,
    os_abandon,
    os_advise,
    os_page_bytes,
    os_purge,
    os_release,
    os_reserve,
    os_resident_bytes,
)
from pagealloc.core.os_pages cimport os_node_of_page, os_private_bytes
from pagealloc.core.page_map cimport CHUNK_BYTES
from pagealloc.core.page_run cimport run_t

cdef enum:
    NODE_LOOKS = 16     # committed pages that are asked for their node: some were never touched

cdef extern from * nogil:
    int count_trailing_zeros "__builtin_ctzll"(uint64_t bits)
    int popcount "__builtin_popcountll"(uint64_t bits)


cdef arena_t *arena_new(
    const placement_t *placement, size_t nbytes, size_t align_bytes, int *error
) noexcept nogil:
    """Reserve an arena of at least `nbytes` that starts on `align_bytes`.

    NULL with an errno value or a code in `error` when it cannot be had; nothing is left behind.
    """
    cdef size_t page_bytes = os_page_bytes()
    cdef backing_t backing
    cdef arena_t *arena = <arena_t *>calloc(1, sizeof(arena_t))
    if arena == NULL:
        error[0] = ENOMEM
        return NULL
    if not backing_reserve(
        placement, round_up(nbytes, CHUNK_BYTES),
        align_bytes if align_bytes > CHUNK_BYTES else CHUNK_BYTES, &backing, error
    ):
        free(arena)
        return NULL
    arena.address = backing.address
    arena.nbytes = backing.nbytes
    arena.achieved_backing = backing.achieved
    arena.collapses = backing.collapses
    arena.page_bytes = page_bytes
    arena.n_pages = <int64_t>(arena.nbytes // page_bytes)
    arena.granule_pages = <int64_t>(backing.granule_bytes // page_bytes)
    arena.piece_pages = <int64_t>(CHUNK_BYTES // page_bytes)
    if arena.piece_pages < arena.granule_pages:
        arena.piece_pages = arena.granule_pages
    arena.n_pieces = (arena.n_pages + arena.piece_pages - 1) // arena.piece_pages
    # Mapped, not malloced: these tables are long and mostly never touched.
    arena.committed = <uint64_t *>os_reserve(tables_bytes(arena), page_bytes)
    if arena.committed == NULL:
        error[0] = errno
        arena_abandon(arena)
        return NULL
    arena.split = arena.committed + n_words(arena.n_pages)
    arena.freed_at = <int32_t *>(arena.split + n_words(n_granules(arena)))
    arena.run_of_page = <run_t **>(arena.freed_at + even(arena.n_pieces))
    if arena.achieved_backing == BACKING_HUGETLB:
        arena_commit(arena, arena.address, <int64_t>arena.nbytes)
    error[0] = 0
    return arena


cdef inline int64_t n_granules(const arena_t *arena) noexcept nogil:
    return arena.n_pages // arena.granule_pages


cdef inline int64_t n_words(int64_t n_bits) noexcept nogil:
    return (n_bits + 63) // 64


cdef inline int64_t even(int64_t n) noexcept nogil:
    return n + (n & 1)


cdef inline size_t tables_bytes(const arena_t *arena) noexcept nogil:
    """All tables, one behind the other in one mapping, the shorter ones first."""
    return round_up(
        <size_t>(n_words(arena.n_pages) + n_words(n_granules(arena))) * sizeof(uint64_t)
        + <size_t>even(arena.n_pieces) * sizeof(int32_t)
        + <size_t>arena.n_pages * sizeof(run_t *),
        arena.page_bytes
    )


cdef void arena_forget(arena_t *arena) noexcept nogil:
    """Give up the tables of an arena whose memory is gone, or another's."""
    if arena.committed != NULL:
        os_abandon(arena.committed, tables_bytes(arena))
    free(arena)


cdef int arena_delete(arena_t *arena) noexcept nogil:
    """Unmap the range and its tables; an errno value, and the arena as it was, on refusal."""
    cdef int error = os_release(arena.address, arena.nbytes)
    if error == 0:
        arena_forget(arena)
    return error


cdef void arena_abandon(arena_t *arena) noexcept nogil:
    """Give up an arena that nobody has used yet."""
    os_abandon(arena.address, arena.nbytes)
    arena_forget(arena)


# ---------------------------------------------------------------------------------------------
# Ranges of bits: 64 at a time, for a run may have thousands of pages

cdef inline uint64_t word_mask(int64_t word, int64_t first, int64_t end) noexcept nogil:
    """The bits of a word that stand for [first, end)."""
    cdef uint64_t mask = ~<uint64_t>0
    if first > word * 64:
        mask &= ~<uint64_t>0 << (first - word * 64)
    if end < word * 64 + 64:
        mask &= ~<uint64_t>0 >> (word * 64 + 64 - end)
    return mask


cdef inline int64_t count_bits(const uint64_t *bits, int64_t first, int64_t end) noexcept nogil:
    cdef int64_t word, n = 0
    for word in range(first >> 6, ((end - 1) >> 6) + 1):
        n += popcount(bits[word] & word_mask(word, first, end))
    return n


cdef inline int64_t next_bit(
    const uint64_t *bits, int64_t i, int64_t end, bint wanted
) noexcept nogil:
    """The first place from `i` on whose bit is `wanted`; `end` if there is none."""
    cdef uint64_t flip = 0 if wanted else ~<uint64_t>0
    cdef uint64_t word
    while i < end:
        word = (bits[i >> 6] ^ flip) >> (i & 63)
        if word:
            i += count_trailing_zeros(word)
            return i if i < end else end
        i = (i | 63) + 1
    return end


cdef inline bint is_split(const arena_t *arena, int64_t granule) noexcept nogil:
    return arena.split[granule >> 6] >> (granule & 63) & 1


# ---------------------------------------------------------------------------------------------
# The ledger of what may be backed

cdef void touched_pages(
    const arena_t *arena, const char *address, int64_t nbytes, int64_t *first, int64_t *end
) noexcept nogil:
    """The pages that are backed once every page of the range was touched."""
    cdef int64_t granule
    first[0] = (address - arena.address) // <int64_t>arena.page_bytes
    end[0] = (address + nbytes - 1 - arena.address) // <int64_t>arena.page_bytes + 1
    if arena.granule_pages == 1:
        return
    granule = first[0] // arena.granule_pages
    if not is_split(arena, granule):
        first[0] = granule * arena.granule_pages
    granule = (end[0] - 1) // arena.granule_pages
    if not is_split(arena, granule):
        end[0] = (granule + 1) * arena.granule_pages


cdef int64_t arena_missing_pages(
    const arena_t *arena, const char *address, int64_t nbytes
) noexcept nogil:
    """Pages that using the range would add to what may be backed."""
    cdef int64_t first, end
    touched_pages(arena, address, nbytes, &first, &end)
    return end - first - count_bits(arena.committed, first, end)


cdef bint arena_commit(arena_t *arena, const char *address, int64_t nbytes) noexcept nogil:
    """Mark the range as about to be used; true if all of it is fresh, hence still zero."""
    cdef int64_t first, end, n_committed, word
    cdef uint64_t mask
    cdef bint is_fresh
    touched_pages(arena, address, nbytes, &first, &end)
    # Bits of a new arena are written and not read before: a read is a page fault of its own.
    n_committed = count_bits(arena.committed, first, end) if arena.n_committed else 0
    if n_committed == end - first:
        return False
    is_fresh = n_committed == 0 or count_bits(
        arena.committed, (address - arena.address) // <int64_t>arena.page_bytes,
        (address + nbytes - 1 - arena.address) // <int64_t>arena.page_bytes + 1
    ) == 0
    if arena.collapses:
        collapse_missing(arena, first, end)
    for word in range(first >> 6, ((end - 1) >> 6) + 1):
        mask = word_mask(word, first, end)
        arena.committed[word] = mask if mask == ~<uint64_t>0 else arena.committed[word] | mask
    arena.n_committed += end - first - n_committed
    return is_fresh


cdef void collapse_missing(arena_t *arena, int64_t first, int64_t end) noexcept nogil:
    """Back the huge pages of a range that are not committed yet, where no touch does that."""
    cdef int64_t granule
    for granule in range(first // arena.granule_pages, end // arena.granule_pages):
        if not is_split(arena, granule) and count_bits(
            arena.committed, granule * arena.granule_pages, (granule + 1) * arena.granule_pages
        ) == 0:
            backing_collapse(
                page_address(arena, granule * arena.granule_pages),
                <size_t>arena.granule_pages * arena.page_bytes
            )


cdef inline char *page_address(const arena_t *arena, int64_t page) noexcept nogil:
    return arena.address + page * <int64_t>arena.page_bytes


cdef int64_t arena_purge(arena_t *arena, int64_t first, int64_t end) noexcept nogil:
    """Give back the committed pages of a free range of pages, but for parts of a huge page.

    Purging part of a huge page lowers the RSS and gives the machine nothing back, unless it is
    split.  Returns the physical bytes that went back, looked at before the purge.  Hugetlb pages
    are kept, for purging them would also drop the reservation that protects from SIGBUS.
    """
    cdef int64_t i, granule, begin, word, private_bytes, purged_bytes = 0
    cdef size_t nbytes
    if arena.achieved_backing == BACKING_HUGETLB:
        return 0
    if arena.granule_pages > 1:
        granule = first // arena.granule_pages
        if first % arena.granule_pages and not is_split(arena, granule):
            first = (granule + 1) * arena.granule_pages
        granule = end // arena.granule_pages
        if end % arena.granule_pages and not is_split(arena, granule):
            end = granule * arena.granule_pages
    i = first
    while True:
        begin = next_bit(arena.committed, i, end, True)
        if begin >= end:
            break
        i = next_bit(arena.committed, begin, end, False)
        nbytes = <size_t>(i - begin) * arena.page_bytes
        private_bytes = os_private_bytes(page_address(arena, begin), nbytes)
        if os_purge(page_address(arena, begin), nbytes) != 0:
            continue    # refused: still backed, so it stays in the ledger and is tried again
        for word in range(begin >> 6, ((i - 1) >> 6) + 1):
            arena.committed[word] &= ~word_mask(word, begin, i)
        arena.n_committed -= i - begin
        if private_bytes > 0:
            purged_bytes += private_bytes
    if arena.granule_pages > 1:
        heal_split(arena, first, end)
    return purged_bytes


# ---------------------------------------------------------------------------------------------
# Huge pages that are split

cdef bint arena_may_split(const arena_t *arena, int64_t page) noexcept nogil:
    """True if `page` lies in a huge page that is in use as such."""
    cdef int64_t granule = page // arena.granule_pages
    return (
        arena.achieved_backing == BACKING_THP and not is_split(arena, granule)
        and count_bits(
            arena.committed, granule * arena.granule_pages, (granule + 1) * arena.granule_pages
        ) > 0
    )


cdef bint arena_split(arena_t *arena, int64_t page) noexcept nogil:
    """Have the huge page of `page` back single pages from now on; False if the kernel refuses.

    The kernel must not make a huge page of it again by itself: the ledger would not know.
    """
    cdef int64_t granule = page // arena.granule_pages
    if os_advise(
        page_address(arena, granule * arena.granule_pages),
        <size_t>arena.granule_pages * arena.page_bytes, MADV_NOHUGEPAGE
    ) != 0:
        return False
    arena.split[granule >> 6] |= <uint64_t>1 << (granule & 63)
    return True


cdef void heal_split(arena_t *arena, int64_t first, int64_t end) noexcept nogil:
    """Let what was split, and holds nothing any more, be backed by huge pages again."""
    cdef int64_t begin
    cdef int64_t granule = next_bit(
        arena.split, first // arena.granule_pages, n_granules(arena), True
    )
    while granule * arena.granule_pages < end:
        begin = granule * arena.granule_pages
        if count_bits(arena.committed, begin, begin + arena.granule_pages) == 0 and os_advise(
            page_address(arena, begin), <size_t>arena.granule_pages * arena.page_bytes,
            MADV_HUGEPAGE
        ) == 0:
            arena.split[granule >> 6] &= ~(<uint64_t>1 << (granule & 63))
        granule = next_bit(arena.split, granule + 1, n_granules(arena), True)


# ---------------------------------------------------------------------------------------------

cdef void arena_note_free(
    arena_t *arena, const char *address, int64_t nbytes, int32_t tick
) noexcept nogil:
    """Note when memory in the range's pieces was freed; an earlier tick than theirs is no news."""
    cdef int64_t piece_bytes = arena.piece_pages * <int64_t>arena.page_bytes
    cdef int64_t i
    for i in range(
        (address - arena.address) // piece_bytes,
        (address + nbytes - 1 - arena.address) // piece_bytes + 1
    ):
        arena.n_dirty += arena.freed_at[i] == 0
        if arena.freed_at[i] == 0 or arena.freed_at[i] < tick:
            arena.freed_at[i] = tick


cdef void arena_note_kept(arena_t *arena, const char *address, int64_t nbytes) noexcept nogil:
    """Note that the range is kept, though it is free: of pieces that lie in it as a whole."""
    cdef int64_t piece_bytes = arena.piece_pages * <int64_t>arena.page_bytes
    cdef int64_t i
    for i in range(
        (address - arena.address + piece_bytes - 1) // piece_bytes,
        (address + nbytes - arena.address) // piece_bytes
    ):
        arena.n_dirty -= arena.freed_at[i] != 0
        arena.freed_at[i] = 0


cdef int64_t arena_held_bytes(const arena_t *arena) noexcept nogil:
    """Physical bytes behind the arena, by mincore over its committed pages; -1 if refused."""
    cdef int64_t i = 0, first, resident_bytes, held_bytes = 0
    while True:
        first = next_bit(arena.committed, i, arena.n_pages, True)
        if first == arena.n_pages:
            return held_bytes
        i = next_bit(arena.committed, first, arena.n_pages, False)
        resident_bytes = os_resident_bytes(
            page_address(arena, first), <size_t>(i - first) * arena.page_bytes
        )
        if resident_bytes < 0:
            return -1
        held_bytes += resident_bytes


cdef int arena_node(const arena_t *arena) noexcept nogil:
    """The NUMA node its first backed page lies on; negative if none is known."""
    cdef int64_t page = 0, n_left = NODE_LOOKS
    cdef int node = -1
    while node < 0 and n_left:
        page = next_bit(arena.committed, page, arena.n_pages, True)
        if page == arena.n_pages:
            break
        node = os_node_of_page(page_address(arena, page))
        page += 1
        n_left -= 1
    return node


cdef bint arena_check(const arena_t *arena) noexcept nogil:
    """True if the ledger's counts are its numbers of set bits, and huge pages are whole."""
    cdef int64_t i, n, n_dirty = 0
    if count_bits(arena.committed, 0, arena.n_pages) != arena.n_committed:
        return False
    if arena.achieved_backing != BACKING_BASE:
        for i in range(n_granules(arena)):
            n = count_bits(
                arena.committed, i * arena.granule_pages, (i + 1) * arena.granule_pages
            )
            if not is_split(arena, i) and n != 0 and n != arena.granule_pages:
                return False
    for i in range(arena.n_pieces):
        n_dirty += arena.freed_at[i] != 0
    return n_dirty == arena.n_dirty
