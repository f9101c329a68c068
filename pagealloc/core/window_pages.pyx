"""Windows: contiguous address ranges over the extents of a store.

Purpose
    Open and close windows; know what stands behind each page, and which views are alive.
Structure
    A window is a reserved address range with its own extent mapped over all of it.  Pages that
    are shared in, and copies for which the own extent has no room (a page there may still be
    mapped by others), come from other extents, mapped over parts of it:

        pages      0 1 2 3        4 5    6 7 8     9 ...
        sources    extent of A    own    -         -          - : uncommitted
        mapped     extent of A    own ------------------      two mappings

    `sources` carries, for each committed page, its page in the file less its page in the window:
    a run of equal values is what the kernel maps as one range.  A *piece* is such a run as far as
    it lies in one extent.  The own extent is the first of a chain: when it has no room for a copy
    the next one takes it.

    A window without addresses only refers to pages of others, and thereby keeps them.
Invariants
    sources knows a page iff the page is committed here
    refs(extent, page) = windows whose sources name that extent for that page
    a page that sources does not know is mapped to the own extent
    a page is private, and may be written, iff its refs = 1
    n_committed_pages = pages that sources knows
    n_mappings = ranges of neighbouring pages that are mapped to neighbours in the file
    is_unmapped: address and own are NULL from its birth, n_mappings = 0
Locking
    The store's mutex.  window_open and window_abandon take it; window_enter
    returns with it held; the rest wants it held.
Units
    Pages, unless a name says bytes.
"""

from libc.errno cimport ENOMEM
from libc.stdint cimport int64_t
from libc.stdlib cimport calloc, free

from pagealloc.core.extent_pages cimport (
    extent_at,
    extent_dereference,
    extent_detach,
    extent_new,
    extent_offset,
    extent_pages,
    extent_t,
    store_add_window,
    store_count_mappings,
    store_enter,
    store_is_frozen,
    store_leave,
    store_remove_window,
    store_t,
    store_wait,
    view_t,
    window_t,
)
from pagealloc.core.interval_map cimport (
    imap_destroy,
    imap_is_valid,
    imap_next,
    imap_next_gap,
    imap_reserve,
    interval_t,
)
from pagealloc.core.os_file cimport os_map_file
from pagealloc.core.os_memory cimport (
    MADV_DONTDUMP,
    MADV_HUGEPAGE,
    os_advise,
    os_huge_page_bytes,
    os_release,
    os_reserve,
)


# ---------------------------------------------------------------------------------------------
# Opening and closing

cdef int window_open(
    store_t *store, int64_t n_pages, bint is_mapped, window_t **opened
) noexcept nogil:
    """A window of `n_pages`, nothing of it committed."""
    cdef size_t nbytes = <size_t>(n_pages * store.page_bytes)
    cdef window_t *window
    cdef int code = store_enter(store)
    if code:
        return code
    window = <window_t *>calloc(1, sizeof(window_t))
    if window == NULL:
        code = ENOMEM
    else:
        window.store = store
        window.n_pages = n_pages
        window.is_unmapped = not is_mapped
        if is_mapped:
            code = map_own_extent(window, nbytes)
        if code == 0:
            store_add_window(store, window)
            window_count_mappings(window)
            opened[0] = window
        else:
            free(window)
    store_leave(store)
    return code


cdef int map_own_extent(window_t *window, size_t nbytes) noexcept nogil:
    cdef int code
    window.address = <char *>os_reserve(nbytes, os_huge_page_bytes())
    if window.address == NULL:
        return ENOMEM
    code = extent_new(window.store, window.n_pages, &window.own)
    if code == 0:
        code = os_map_file(
            window.address, nbytes, window.store.fd, extent_offset(window.store, window.own, 0)
        )
        if code == 0:
            code = window_advise(window, 0, window.n_pages)
        if code:
            extent_detach(window.store, window.own)
    if code:    # a refusal to unmap costs address space only
        os_release(window.address, nbytes)
    return code


cdef int window_advise(
    const window_t *window, int64_t first_page, int64_t n_pages
) noexcept nogil:
    """Tell the kernel what new mappings are for: all alike, or they would not merge."""
    cdef char *address = window.address + (first_page << window.store.page_shift)
    cdef size_t nbytes = <size_t>(n_pages << window.store.page_shift)
    if window.store.wants_folios:
        os_advise(address, nbytes, MADV_HUGEPAGE)   # refused, base pages do
    return os_advise(address, nbytes, MADV_DONTDUMP)


cdef int window_close(window_t *window) noexcept nogil:
    cdef store_t *store = window.store
    cdef extent_t *extent = window.own
    cdef extent_t *next_extent
    cdef piece_t piece
    cdef int64_t page = 0, n_pieces = 0
    cdef int code
    if window.n_views:
        return WINDOW_VIEWED
    while window_next_piece(window, &page, window.n_pages, &piece):
        n_pieces += 1
    page = 0
    while window_next_piece(window, &page, window.n_pages, &piece):
        if imap_reserve(&piece.extent.refs, 4 * n_pieces):
            return ENOMEM
    if window.address != NULL:
        code = os_release(window.address, <size_t>(window.n_pages * store.page_bytes))
        if code:
            return code
    store_remove_window(store, window)
    store_count_mappings(store, -window.n_mappings)
    if not window.is_closed:    # Window.close() has set it, for those who look with the GIL held
        window.is_closed = True
    window.address = NULL
    if not store_is_frozen(store):  # else the pages are the parent's
        page = 0
        while window_next_piece(window, &page, window.n_pages, &piece):
            extent_dereference(store, piece.extent, piece.extent_page, piece.n_pages)
        while extent != NULL:
            next_extent = extent.next
            extent_detach(store, extent)
            extent = next_extent
    window.own = NULL
    window.n_committed_pages = 0
    window.n_mappings = 0
    imap_destroy(&window.sources)
    return 0


cdef void window_abandon(window_t *window) noexcept nogil:
    """Close and free the window; if the kernel refuses, a later change of the store tries again."""
    cdef store_t *store = window.store
    store_wait(store)
    if window.is_closed or window_close(window) == 0:
        free(window)
    else:
        window.is_abandoned = True
        store.n_abandoned += 1
    store_leave(store)


cdef void windows_close_abandoned(store_t *store) noexcept nogil:
    cdef window_t *window = store.windows
    cdef window_t *next_window
    while window != NULL:
        next_window = window.next
        if window.is_abandoned and window_close(window) == 0:
            store.n_abandoned -= 1
            free(window)
        window = next_window


cdef void windows_forget_abandoned(store_t *store) noexcept nogil:
    """The store is going.  What the kernel refuses to unmap once more stays mapped for good."""
    cdef window_t *window
    windows_close_abandoned(store)
    while store.windows != NULL:
        window = store.windows
        store_remove_window(store, window)
        store_count_mappings(store, -window.n_mappings)
        imap_destroy(&window.sources)
        free(window)
    store.n_abandoned = 0


cdef int window_enter(window_t *window) noexcept nogil:
    """Take the mutex in order to change the window."""
    cdef int code = store_enter(window.store)
    if code == 0 and window.is_closed:
        store_leave(window.store)
        code = WINDOW_CLOSED
    if code == 0 and window.store.n_abandoned:
        windows_close_abandoned(window.store)
    return code


# ---------------------------------------------------------------------------------------------
# Looking

cdef bint window_next_piece(
    const window_t *window, int64_t *page, int64_t end_page, piece_t *piece
) noexcept nogil:
    """Step through the committed pages in [page, end_page), extent by extent; false at the end."""
    cdef interval_t run
    cdef int64_t room
    if not imap_next(&window.sources, page, end_page, &run):
        return False
    piece.extent = extent_at(window.store, run.value + run.first_page)
    piece.extent_page = run.value + run.first_page - piece.extent.first_page
    room = extent_pages(window.store, piece.extent) - piece.extent_page
    if run.n_pages > room:      # two extents that are neighbours in the file
        run.n_pages = room
        page[0] = run.first_page + room
    piece.first_page = run.first_page
    piece.n_pages = run.n_pages
    return True


cdef inline bint covers(
    const window_t *window, const view_t *view, int64_t first_page, int64_t n_pages
) noexcept nogil:
    cdef int64_t start_bytes = first_page << window.store.page_shift
    return (
        view.offset_bytes < start_bytes + (n_pages << window.store.page_shift)
        and view.offset_bytes + view.nbytes > start_bytes
    )


cdef bint window_has_writable_view(
    const window_t *window, int64_t first_page, int64_t n_pages
) noexcept nogil:
    """True if somebody may write to the range: its pages must stay private."""
    cdef view_t *view = window.views
    while view != NULL:
        if view.is_writable and covers(window, view, first_page, n_pages):
            return True
        view = view.next
    return False


cdef bint window_has_strict_view(
    const window_t *window, int64_t first_page, int64_t n_pages
) noexcept nogil:
    """True if a view relies on the range: its pages must stay committed."""
    cdef view_t *view = window.views
    while view != NULL:
        if not view.may_have_holes and covers(window, view, first_page, n_pages):
            return True
        view = view.next
    return False


cdef bint window_is_private(
    const window_t *window, int64_t first_page, int64_t n_pages
) noexcept nogil:
    """True if no other window maps a committed page of the range."""
    cdef int64_t page = first_page, shared_page
    cdef piece_t piece
    cdef interval_t shared
    while window_next_piece(window, &page, first_page + n_pages, &piece):
        shared_page = piece.extent_page
        while imap_next(
            &piece.extent.refs, &shared_page, piece.extent_page + piece.n_pages, &shared
        ):
            if shared.value > 1:
                return False
    return True


cdef int window_add_view(
    window_t *window, view_t *view, int64_t first_page, int64_t n_pages
) noexcept nogil:
    """Export a part of the window, if these pages, which cover it, are as the view promises."""
    cdef int64_t page = first_page
    cdef interval_t gap
    if window.address == NULL:
        return WINDOW_UNMAPPED if window.is_unmapped else WINDOW_CLOSED
    if not view.may_have_holes and imap_next_gap(
        &window.sources, &page, first_page + n_pages, &gap
    ):
        return WINDOW_HOLE
    if view.is_writable and not window_is_private(window, first_page, n_pages):
        return WINDOW_SHARED
    view.previous = NULL
    view.next = window.views
    if window.views != NULL:
        window.views.previous = view
    window.views = view
    window.n_views += 1
    return 0


cdef void window_remove_view(window_t *window, view_t *view) noexcept nogil:
    if view.previous != NULL:
        view.previous.next = view.next
    else:
        window.views = view.next
    if view.next != NULL:
        view.next.previous = view.previous
    window.n_views -= 1


cdef int64_t window_uses(
    const window_t *window, page_use_t *uses, int64_t capacity
) noexcept nogil:
    """List the committed page runs of equal standing; how many there are, even past `capacity`."""
    cdef int64_t page = 0, shared_page, n_uses = 0
    cdef piece_t piece
    cdef interval_t shared
    while window_next_piece(window, &page, window.n_pages, &piece):
        shared_page = piece.extent_page
        while imap_next(
            &piece.extent.refs, &shared_page, piece.extent_page + piece.n_pages, &shared
        ):
            if n_uses < capacity:
                uses[n_uses].first_page = piece.first_page + shared.first_page - piece.extent_page
                uses[n_uses].n_pages = shared.n_pages
                uses[n_uses].file_offset = extent_offset(
                    window.store, piece.extent, shared.first_page
                )
                uses[n_uses].n_references = shared.value
                uses[n_uses].is_own = window_owns(window, piece.extent)
            n_uses += 1
    return n_uses


cdef bint window_owns(const window_t *window, const extent_t *extent) noexcept nogil:
    """True if the extent is in the window's chain."""
    cdef const extent_t *own = window.own
    while own != NULL and own != extent:
        own = own.next
    return own != NULL


cdef const char *window_broken_invariant(const window_t *window) noexcept nogil:
    """What is wrong with the window, or NULL."""
    cdef int64_t page = 0, extent_page, n_committed = 0
    cdef piece_t piece
    cdef interval_t part
    if not imap_is_valid(&window.sources):
        return "a window's sources are no interval map"
    while window_next_piece(window, &page, window.n_pages, &piece):
        n_committed += piece.n_pages
        extent_page = piece.extent_page
        if imap_next_gap(
            &piece.extent.refs, &extent_page, piece.extent_page + piece.n_pages, &part
        ):
            return "a window maps a page that refs do not know"
        extent_page = piece.extent_page
        while imap_next(
            &piece.extent.refs, &extent_page, piece.extent_page + piece.n_pages, &part
        ):
            if part.value < 1:
                return "a window maps a page without references"
    if n_committed != window.n_committed_pages:
        return "a window's committed pages are not those in its sources"
    if not window.is_closed and mappings_of(window) != window.n_mappings:
        return "a window's mappings are not counted right"
    return NULL


cdef int64_t mappings_of(const window_t *window) noexcept nogil:
    """Count from page to page where other than the file's next page begins to be mapped."""
    cdef int64_t home, i, n_mappings = 0, end_page = 0
    cdef int64_t current = -1
    cdef bint is_first = True
    cdef interval_t *run
    if window.own == NULL:
        return 0
    home = window.own.first_page
    for i in range(window.sources.n_runs):
        run = &window.sources.runs[i]
        if end_page < run.first_page and (is_first or current != home):
            n_mappings += 1
            current = home
            is_first = False
        if is_first or current != run.value:
            n_mappings += 1
            current = run.value
            is_first = False
        end_page = run.first_page + run.n_pages
    return n_mappings + (end_page < window.n_pages and (is_first or current != home))


cdef void window_count_mappings(window_t *window) noexcept nogil:
    cdef int64_t n_mappings = mappings_of(window)
    store_count_mappings(window.store, n_mappings - window.n_mappings)
    window.n_mappings = n_mappings
