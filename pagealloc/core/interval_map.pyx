"""Disjoint page ranges that carry a value.

Purpose
    Remember something about pages (which extent stands behind them, how many windows map them)
    at a cost that grows with the number of runs of equal pages, not with the number of pages.
Structure
    A sorted array; a page is found by binary search:

        runs  [ 0..4) = 1 | [4..9) = 2 | [16..20) = 1       pages 9..15 carry nothing

    Every change first cuts the runs that cross the ends of its range, then changes whole runs,
    then joins neighbours that have become equal.
Invariants
    runs[i].n_pages > 0
    runs[i].first_page + runs[i].n_pages <= runs[i + 1].first_page
    neighbours that touch carry different values
    n_runs <= capacity
    one change makes n_runs grow by at most 2 (hence what `imap_reserve` promises)
Locking
    The owner's.
Units
    Pages.
"""

cimport cython
from libc.errno cimport EINVAL, ENOMEM
from libc.stdint cimport INT64_MAX, int64_t
from libc.stdlib cimport free, realloc
from libc.string cimport memmove

from pagealloc.errors import InvariantError

cdef enum:
    FIRST_CAPACITY = 4


cdef inline int64_t end_of(const interval_t *run) noexcept nogil:
    return run.first_page + run.n_pages


cdef void imap_init(interval_map_t *map) noexcept nogil:
    map.runs = NULL
    map.n_runs = 0
    map.capacity = 0


cdef void imap_destroy(interval_map_t *map) noexcept nogil:
    free(map.runs)
    imap_init(map)


cdef int imap_reserve(interval_map_t *map, int64_t n_runs) noexcept nogil:
    """Make room for `n_runs` more runs than there are now; ENOMEM leaves the map as it was."""
    cdef int64_t capacity = map.capacity if map.capacity else FIRST_CAPACITY
    cdef interval_t *runs
    if map.n_runs + n_runs <= map.capacity:
        return 0
    while capacity < map.n_runs + n_runs:
        capacity *= 2
    runs = <interval_t *>realloc(map.runs, <size_t>capacity * sizeof(interval_t))
    if runs == NULL:
        return ENOMEM
    map.runs = runs
    map.capacity = capacity
    return 0


# ---------------------------------------------------------------------------------------------
# Looking

cdef int64_t imap_find(const interval_map_t *map, int64_t page) noexcept nogil:
    """Index of the run that holds `page`, else of the first run behind it (n_runs if none)."""
    cdef int64_t low = 0, high = map.n_runs, middle
    while low < high:
        middle = (low + high) // 2
        if end_of(&map.runs[middle]) <= page:
            low = middle + 1
        else:
            high = middle
    return low


cdef bint imap_next(
    const interval_map_t *map, int64_t *page, int64_t end_page, interval_t *run
) noexcept nogil:
    """Step through the runs in [page, end_page), cut to that range; false after the last.

    `page` is the only state, so the map may change between two steps.
    """
    cdef int64_t i = imap_find(map, page[0])
    cdef int64_t end
    if page[0] >= end_page or i == map.n_runs or map.runs[i].first_page >= end_page:
        return False
    end = min(end_of(&map.runs[i]), end_page)
    run.first_page = max(map.runs[i].first_page, page[0])
    run.n_pages = end - run.first_page
    run.value = map.runs[i].value
    page[0] = end
    return True


cdef bint imap_next_gap(
    const interval_map_t *map, int64_t *page, int64_t end_page, interval_t *gap
) noexcept nogil:
    """Step through the stretches of [page, end_page) that carry nothing; false after the last."""
    cdef int64_t i = imap_find(map, page[0])
    while i < map.n_runs and map.runs[i].first_page <= page[0]:
        page[0] = end_of(&map.runs[i])
        i += 1
    if page[0] >= end_page:
        return False
    gap.first_page = page[0]
    page[0] = end_page if i == map.n_runs else min(map.runs[i].first_page, end_page)
    gap.n_pages = page[0] - gap.first_page
    return True


# ---------------------------------------------------------------------------------------------
# Changing

cdef int64_t cut(interval_map_t *map, int64_t page) noexcept nogil:
    """Split the run that crosses `page`; index of the first run at or behind it."""
    cdef int64_t i = imap_find(map, page)
    cdef interval_t *run = &map.runs[i]
    if i == map.n_runs or run.first_page >= page:
        return i
    memmove(run + 1, run, <size_t>(map.n_runs - i) * sizeof(interval_t))
    map.n_runs += 1
    run[1].n_pages = end_of(run) - page
    run[1].first_page = page
    run.n_pages = page - run.first_page
    return i + 1


cdef void remove_runs(interval_map_t *map, int64_t i, int64_t j) noexcept nogil:
    memmove(&map.runs[i], &map.runs[j], <size_t>(map.n_runs - j) * sizeof(interval_t))
    map.n_runs -= j - i


cdef void join(interval_map_t *map, int64_t i, int64_t j) noexcept nogil:
    """Join equal neighbours among the runs i-1 .. j."""
    cdef int64_t kept = max(i - 1, <int64_t>0)   # the run that grows
    cdef int64_t k
    j = min(j, map.n_runs - 1)
    for k in range(kept + 1, j + 1):
        if (
            map.runs[k].value == map.runs[kept].value
            and map.runs[k].first_page == end_of(&map.runs[kept])
        ):
            map.runs[kept].n_pages += map.runs[k].n_pages
        else:
            kept += 1
            map.runs[kept] = map.runs[k]
    if kept < j:
        remove_runs(map, kept + 1, j + 1)


cdef int prepare(interval_map_t *map, int64_t first_page, int64_t n_pages) noexcept nogil:
    if first_page < 0 or n_pages < 0 or first_page > INT64_MAX - n_pages:
        return EINVAL
    return imap_reserve(map, 2)


cdef int imap_set(
    interval_map_t *map, int64_t first_page, int64_t n_pages, int64_t value
) noexcept nogil:
    """Let the pages carry `value`, whatever they carried before."""
    cdef int64_t i, j
    cdef int error = prepare(map, first_page, n_pages)
    if error or n_pages == 0:
        return error
    i = cut(map, first_page)
    j = cut(map, first_page + n_pages)
    if i == j:
        memmove(
            &map.runs[i + 1], &map.runs[i], <size_t>(map.n_runs - i) * sizeof(interval_t)
        )
        map.n_runs += 1
    else:
        remove_runs(map, i + 1, j)
    map.runs[i].first_page = first_page
    map.runs[i].n_pages = n_pages
    map.runs[i].value = value
    join(map, i, i + 1)
    return 0


cdef int imap_erase(interval_map_t *map, int64_t first_page, int64_t n_pages) noexcept nogil:
    """Let the pages carry nothing."""
    cdef int64_t i
    cdef int error = prepare(map, first_page, n_pages)
    if error or n_pages == 0:
        return error
    i = cut(map, first_page)
    remove_runs(map, i, cut(map, first_page + n_pages))
    return 0


cdef int imap_add(
    interval_map_t *map, int64_t first_page, int64_t n_pages, int64_t delta
) noexcept nogil:
    """Add `delta` to what each page carries; EINVAL if one of them carries nothing."""
    cdef interval_t gap
    cdef int64_t i, j, k
    cdef int64_t page = first_page
    cdef int error = prepare(map, first_page, n_pages)
    if error or n_pages == 0:
        return error
    if imap_next_gap(map, &page, first_page + n_pages, &gap):
        return EINVAL
    i = cut(map, first_page)
    j = cut(map, first_page + n_pages)
    for k in range(i, j):
        map.runs[k].value += delta
    join(map, i, j)
    return 0


cdef bint imap_is_valid(const interval_map_t *map) noexcept nogil:
    """True if the invariants in this file's header hold."""
    cdef int64_t i
    cdef const interval_t *run
    if map.n_runs > map.capacity:
        return False
    for i in range(map.n_runs):
        run = &map.runs[i]
        if run.n_pages <= 0 or run.first_page < 0:
            return False
        if i and end_of(run - 1) > run.first_page:
            return False
        if i and end_of(run - 1) == run.first_page and (run - 1).value == run.value:
            return False
    return True


# ---------------------------------------------------------------------------------------------
# The Python face, for tests

@cython.final
@cython.auto_pickle(False)
cdef class IntervalMap:
    """A map from pages to numbers that stores runs of equal pages.

    The core works on the C structure; this class shows the same functions to tests.  Not safe
    for use by several threads at once.
    """

    cdef interval_map_t map

    def __cinit__(self):
        imap_init(&self.map)

    def __dealloc__(self):
        imap_destroy(&self.map)

    def set(self, first_page: int, n_pages: int, value: int) -> None:
        """Let `n_pages` pages from `first_page` on carry `value`."""
        self.require(imap_set(&self.map, first_page, n_pages, value))

    def erase(self, first_page: int, n_pages: int) -> None:
        """Let the pages carry nothing."""
        self.require(imap_erase(&self.map, first_page, n_pages))

    def add(self, first_page: int, n_pages: int, delta: int) -> None:
        """Add `delta` to what each of the pages carries; every one must carry something."""
        self.require(imap_add(&self.map, first_page, n_pages, delta))

    def runs(self, first_page: int, n_pages: int) -> list[tuple[int, int, int]]:
        """Return (first_page, n_pages, value) for each run in the range, cut to it."""
        cdef int64_t page = first_page
        cdef interval_t run
        found = []
        while imap_next(&self.map, &page, <int64_t>first_page + <int64_t>n_pages, &run):
            found.append((run.first_page, run.n_pages, run.value))
        return found

    def gaps(self, first_page: int, n_pages: int) -> list[tuple[int, int]]:
        """Return (first_page, n_pages) for each stretch of the range that carries nothing."""
        cdef int64_t page = first_page
        cdef interval_t gap
        found = []
        while imap_next_gap(&self.map, &page, <int64_t>first_page + <int64_t>n_pages, &gap):
            found.append((gap.first_page, gap.n_pages))
        return found

    def check(self) -> None:
        """Raise `InvariantError` if an invariant of this structure is broken."""
        if not imap_is_valid(&self.map):
            raise InvariantError(f"broken interval map: {self.runs(0, INT64_MAX)}")

    def __len__(self) -> int:
        return self.map.n_runs

    cdef int require(self, int error) except -1:
        if error == EINVAL:
            raise ValueError("pages out of range, or pages that carry nothing")
        if error:
            raise MemoryError("no memory for one more run")
        return 0
