"""Changing what stands behind the pages of a window, all-or-nothing.

Purpose
    Commit, release, share, make private and shift pages of a window: what each of them means, as a
    plan of moves (`window_plan`).
Invariants
    before and after each function the invariants of extent_pages and window_pages hold, whatever
    the kernel refuses
Locking
    Each function that the .pxd names takes the store's mutex.
Units
    Pages.
"""

from libc.errno cimport ENOMEM
from libc.stdint cimport int64_t

from pagealloc.core.extent_pages cimport extent_t, store_leave, store_may_map, window_t
from pagealloc.core.huge_pages cimport collapse_completed_huge_pages
from pagealloc.core.interval_map cimport imap_find, imap_next, imap_next_gap, interval_t
from pagealloc.core.window_pages cimport (
    WINDOW_CLOSED,
    WINDOW_HOLE,
    WINDOW_TAKEN,
    WINDOW_UNMAPPED,
    WINDOW_VIEWED,
    piece_t,
    window_enter,
    window_has_strict_view,
    window_has_writable_view,
    window_next_piece,
)
from pagealloc.core.window_plan cimport place_t, plan_apply, plan_fresh, plan_move, plan_t

cdef place_t NOTHING = [NULL, 0]


cdef inline place_t place_of(const piece_t *piece, int64_t at) noexcept nogil:
    """Where the piece's page number `at` stands."""
    return place_t(piece.extent, piece.extent_page + at)


cdef int enter_mapped(window_t *window) noexcept nogil:
    """As window_enter, for what takes a window with addresses."""
    if window.is_unmapped:
        return WINDOW_UNMAPPED
    return window_enter(window)


cdef int window_commit(window_t *window, int64_t first_page, int64_t n_pages) noexcept nogil:
    """Commit the pages of the range that are not."""
    cdef plan_t plan = [window, NULL, 0, 0, 0]
    cdef int64_t page = first_page
    cdef interval_t gap
    cdef int code = enter_mapped(window)
    if code:
        return code
    while code == 0 and imap_next_gap(&window.sources, &page, first_page + n_pages, &gap):
        code = plan_fresh(&plan, gap.first_page, gap.first_page + gap.n_pages, NOTHING, NULL)
    code = plan_apply(&plan, code)
    if code == 0 and plan.n_fresh_pages:
        collapse_completed_huge_pages(window, first_page, n_pages)
    store_leave(window.store)
    return code


cdef int window_release(window_t *window, int64_t first_page, int64_t n_pages) noexcept nogil:
    """Drop the committed pages of the range."""
    cdef plan_t plan = [window, NULL, 0, 0, 0]
    cdef int64_t page = first_page
    cdef piece_t piece
    cdef int code = window_enter(window)
    if code:
        return code
    if window_has_strict_view(window, first_page, n_pages):
        code = WINDOW_VIEWED
    while code == 0 and window_next_piece(window, &page, first_page + n_pages, &piece):
        code = plan_move(&plan, piece.first_page, piece.n_pages, place_of(&piece, 0), NOTHING)
    code = plan_apply(&plan, code)
    store_leave(window.store)
    return code


cdef int window_share(
    window_t *window, window_t *other, int64_t first_page, int64_t n_pages
) noexcept nogil:
    """Map the other's committed pages of the range here, or copy them if mappings run short.

    What has no addresses costs no mappings, and cannot be copied from.
    """
    cdef plan_t plan = [window, NULL, 0, 0, 0]
    cdef int64_t page = first_page, end_page = first_page + n_pages
    cdef int64_t n_runs
    cdef bint may_map
    cdef interval_t run
    cdef piece_t piece
    cdef int code = window_enter(window)
    if code:
        return code
    if other.is_closed:
        code = WINDOW_CLOSED
    elif imap_next(&window.sources, &page, end_page, &run):
        code = WINDOW_TAKEN
    elif (
        window_has_writable_view(window, first_page, n_pages)
        or window_has_writable_view(other, first_page, n_pages)
    ):
        code = WINDOW_VIEWED
    n_runs = imap_find(&other.sources, end_page) - imap_find(&other.sources, first_page) + 1
    may_map = (
        window.is_unmapped or other.is_unmapped or store_may_map(window.store, 2 * n_runs)
    )
    page = first_page
    while code == 0 and window_next_piece(other, &page, end_page, &piece):
        if may_map:
            code = plan_move(
                &plan, piece.first_page, piece.n_pages, NOTHING, place_of(&piece, 0)
            )
        else:
            code = plan_fresh(
                &plan, piece.first_page, piece.first_page + piece.n_pages, NOTHING, other.address
            )
    code = plan_apply(&plan, code)
    store_leave(window.store)
    return code


cdef int window_share_foreign(
    window_t *window, extent_t *extent, const shift_t *runs, int64_t n_runs
) noexcept nogil:
    """Map runs of another process's pages, in ascending order and apart, where nothing is."""
    cdef plan_t plan = [window, NULL, 0, 0, 0]
    cdef const shift_t *run
    cdef interval_t taken
    cdef int64_t page, i
    cdef int code = enter_mapped(window)
    if code:
        return code
    for i in range(n_runs):
        run = &runs[i]
        page = run.first_page
        if imap_next(&window.sources, &page, run.first_page + run.n_pages, &taken):
            code = WINDOW_TAKEN
        elif window_has_writable_view(window, run.first_page, run.n_pages):
            code = WINDOW_VIEWED
        elif code == 0:
            code = plan_move(
                &plan, run.first_page, run.n_pages, NOTHING, place_t(extent, run.target_page)
            )
    if code == 0 and not store_may_map(window.store, 2 * n_runs):
        code = ENOMEM
    code = plan_apply(&plan, code)
    store_leave(window.store)
    return code


cdef int window_make_private(
    window_t *window, int64_t first_page, int64_t n_pages, int64_t *n_copied_pages
) noexcept nogil:
    """Copy the pages of the range that other windows map, too, and map the copies instead."""
    cdef plan_t plan = [window, NULL, 0, 0, 0]
    cdef int64_t page = first_page, shared_page, at
    cdef piece_t piece
    cdef interval_t shared
    cdef int code = enter_mapped(window)
    if code:
        return code
    while code == 0 and window_next_piece(window, &page, first_page + n_pages, &piece):
        shared_page = piece.extent_page
        while code == 0 and imap_next(
            &piece.extent.refs, &shared_page, piece.extent_page + piece.n_pages, &shared
        ):
            if shared.value > 1:
                at = shared.first_page - piece.extent_page
                code = plan_fresh(
                    &plan, piece.first_page + at, piece.first_page + at + shared.n_pages,
                    place_of(&piece, at), window.address,
                )
    code = plan_apply(&plan, code)
    store_leave(window.store)
    if code == 0:
        n_copied_pages[0] = plan.n_fresh_pages
    return code


cdef int plan_piece_at(
    plan_t *plan, const piece_t *piece, int64_t target_page
) noexcept nogil:
    """Plan that a piece comes to stand at `target_page`, whatever stands there now."""
    cdef int64_t page = target_page, first_page = target_page
    cdef int64_t end_page = target_page + piece.n_pages
    cdef piece_t there
    cdef bint is_taken
    cdef int code = 0
    while code == 0 and page < end_page:
        is_taken = window_next_piece(plan.window, &page, end_page, &there)
        if not is_taken:
            there.first_page = page = end_page
        if first_page < there.first_page:
            code = plan_move(
                plan, first_page, there.first_page - first_page, NOTHING,
                place_of(piece, first_page - target_page),
            )
        if code == 0 and is_taken:
            code = plan_move(
                plan, there.first_page, there.n_pages, place_of(&there, 0),
                place_of(piece, there.first_page - target_page),
            )
        first_page = page
    return code


cdef int plan_shift(plan_t *plan, const shift_t *shift) noexcept nogil:
    """Plan that committed pages come to stand further to the front, and nothing where they were.

    In ascending order: a page is taken at its target before its own place lets go of it.
    """
    cdef window_t *window = plan.window
    cdef int64_t end_page = shift.first_page + shift.n_pages
    cdef int64_t page = shift.first_page
    cdef piece_t piece
    cdef interval_t gap
    cdef int code = 0
    if imap_next_gap(&window.sources, &page, end_page, &gap):
        return WINDOW_HOLE
    page = shift.first_page
    while code == 0 and window_next_piece(window, &page, end_page, &piece):
        code = plan_piece_at(
            plan, &piece, piece.first_page - shift.first_page + shift.target_page
        )
    page = max(shift.first_page, shift.target_page + shift.n_pages)
    while code == 0 and window_next_piece(window, &page, end_page, &piece):
        code = plan_move(plan, piece.first_page, piece.n_pages, place_of(&piece, 0), NOTHING)
    return code


cdef int window_shift(window_t *window, const shift_t *shifts, int64_t n_shifts) noexcept nogil:
    """Map committed pages further to the front; ranges of different shifts do not meet."""
    cdef plan_t plan = [window, NULL, 0, 0, 0]
    cdef const shift_t *shift
    cdef int64_t i, n_pages
    cdef int code = enter_mapped(window)
    if code:
        return code
    for i in range(n_shifts):
        shift = &shifts[i]
        n_pages = shift.first_page + shift.n_pages - shift.target_page
        if (
            window_has_strict_view(window, shift.target_page, n_pages)
            or window_has_writable_view(window, shift.target_page, n_pages)
        ):
            code = WINDOW_VIEWED
        if code == 0:
            code = plan_shift(&plan, shift)
    if code == 0 and not store_may_map(window.store, plan.n_moves):
        code = ENOMEM
    code = plan_apply(&plan, code)
    store_leave(window.store)
    return code
