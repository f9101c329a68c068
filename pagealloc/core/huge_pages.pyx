"""Huge pages behind windows.

Purpose
    Back whole huge pages of a window by huge pages, where the kernel can: that commits not one
    byte more, and makes the range cheap to map again.  The first read of a fork then costs a
    fault a huge page instead of one every sixteen pages.
Structure
    commit of whole huge pages of holes: populate one page of each, collapse, then fill
    commit that completes a huge page:   fill, then collapse (the kernel copies its pages)
Invariants
    nothing depends on success: what is refused stays, or becomes, base pages
    only pages that this window alone maps, from its own extent, are collapsed
Locking
    The store's mutex, held by the caller.
Units
    Pages.
"""

from libc.stdint cimport int64_t

from pagealloc.core.extent_pages cimport window_t
from pagealloc.core.interval_map cimport imap_next, interval_t
from pagealloc.core.os_memory cimport (
    MADV_COLLAPSE,
    os_advise,
    os_populate_write,
)


cdef void collapse(window_t *window, int64_t first_page, int64_t n_pages) noexcept nogil:
    cdef int64_t page_bytes = window.store.page_bytes
    os_advise(
        window.address + first_page * page_bytes, <size_t>(n_pages * page_bytes), MADV_COLLAPSE
    )


cdef void populate_huge_pages(
    window_t *window, int64_t first_page, int64_t n_pages
) noexcept nogil:
    """Back the whole huge pages among a range of holes of the own extent.

    The kernel collapses only a range that is not empty, hence the one page first: populated, not
    touched, for a touch that finds no memory is SIGBUS.
    """
    cdef int64_t page_bytes = window.store.page_bytes
    cdef int64_t per_huge = window.store.pages_per_huge
    cdef int64_t first = (first_page + per_huge - 1) // per_huge * per_huge
    cdef int64_t end = (first_page + n_pages) // per_huge * per_huge
    cdef int64_t page = first
    if not window.store.wants_huge_pages:
        return
    while page < end:
        if os_populate_write(window.address + page * page_bytes, <size_t>page_bytes) != 0:
            return
        page += per_huge
    if first < end:
        collapse(window, first, end - first)


cdef bint is_own_and_private(window_t *window, int64_t first_page, int64_t n_pages) noexcept nogil:
    """True if all these pages are committed, each at its place in the own extent, for it alone."""
    cdef interval_t run
    cdef int64_t page = first_page
    cdef int64_t end_page = first_page + n_pages
    if not imap_next(&window.sources, &page, end_page, &run):
        return False
    if run.n_pages != n_pages or run.value != window.own.first_page:
        return False
    page = first_page
    return imap_next(&window.own.refs, &page, end_page, &run) and (
        run.n_pages == n_pages and run.value == 1
    )


cdef void collapse_completed_huge_pages(
    window_t *window, int64_t first_page, int64_t n_pages
) noexcept nogil:
    """Collapse the huge pages at both ends of a range just committed, if it completed them."""
    cdef int64_t per_huge = window.store.pages_per_huge
    cdef int64_t end_page = first_page + n_pages
    cdef int64_t first = first_page // per_huge * per_huge
    cdef int64_t last = (end_page - 1) // per_huge * per_huge
    if not window.store.wants_huge_pages:
        return
    if first < first_page and is_own_and_private(window, first, per_huge):
        collapse(window, first, per_huge)
    if (
        last + per_huge > end_page
        and (last > first or first == first_page)
        and is_own_and_private(window, last, per_huge)
    ):
        collapse(window, last, per_huge)
