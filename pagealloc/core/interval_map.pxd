"""Disjoint page ranges that carry a value.

Purpose: remember something about pages at a cost that grows with the number of runs of equal
pages, not with the number of pages.

A function that returns ``int`` returns 0 or an errno value, and has changed nothing unless it
returns 0.  After ``imap_reserve(map, 2 * n)`` the next n changes cannot fail.  Pages and counts
of pages throughout.  Locking: the owner's.
"""

from libc.stdint cimport int64_t

ctypedef struct interval_t:
    int64_t first_page
    int64_t n_pages
    int64_t value

ctypedef struct interval_map_t:
    interval_t *runs        # sorted by first_page
    int64_t n_runs
    int64_t capacity

cdef void imap_init(interval_map_t *map) noexcept nogil
cdef void imap_destroy(interval_map_t *map) noexcept nogil
cdef int imap_reserve(interval_map_t *map, int64_t n_runs) noexcept nogil

cdef int64_t imap_find(const interval_map_t *map, int64_t page) noexcept nogil
cdef bint imap_next(
    const interval_map_t *map, int64_t *page, int64_t end_page, interval_t *run
) noexcept nogil
cdef bint imap_next_gap(
    const interval_map_t *map, int64_t *page, int64_t end_page, interval_t *gap
) noexcept nogil

cdef int imap_set(
    interval_map_t *map, int64_t first_page, int64_t n_pages, int64_t value
) noexcept nogil
cdef int imap_erase(interval_map_t *map, int64_t first_page, int64_t n_pages) noexcept nogil
cdef int imap_add(
    interval_map_t *map, int64_t first_page, int64_t n_pages, int64_t delta
) noexcept nogil
cdef bint imap_is_valid(const interval_map_t *map) noexcept nogil
