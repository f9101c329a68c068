"""Changing what stands behind the pages of a window, all-or-nothing.

Purpose
    Commit, release, share and make private pages of a window.
Structure
    Every change is a *plan*: a list of moves of page runs from one extent (or none) to another
    (or none).

        commit        [4..9)  nothing -> own extent, fresh, zeros
        share         [0..4)  nothing -> the other window's extent
        make private  [3..4)  that extent -> own extent, fresh, a copy
        release       [0..3)  that extent -> nothing, which maps the own extent back

    Applying it goes through what may fail first: room in the books, the budget, filling fresh
    pages, mapping.  If one of these fails, what was done is undone.  The result is entered in the
    books last, which cannot fail.  A reader sees the same bytes all the while, for a page is
    mapped over by its equal, and the kernel replaces a mapping in one step.
Invariants
    before and after each function the invariants of extent_pages and window_pages hold, whatever
    the kernel refuses
    a page is mapped before sources name it, and filled before it is mapped
Locking
    Each function that the .pxd names takes the store's mutex.
Units
    Pages, unless a name says bytes.
"""

from libc.errno cimport EINVAL, ENOMEM
from libc.stdint cimport int64_t, uintptr_t
from libc.stdlib cimport free, realloc

from pagealloc.core.extent_pages cimport (
    extent_book,
    extent_dereference,
    extent_discard,
    extent_new,
    extent_offset,
    extent_reference,
    extent_t,
    store_admit,
    store_leave,
    store_may_map,
    store_t,
    window_t,
)
from pagealloc.core.interval_map cimport (
    imap_erase,
    imap_find,
    imap_next,
    imap_next_gap,
    imap_reserve,
    imap_set,
    interval_t,
)
from pagealloc.core.huge_pages cimport collapse_completed_huge_pages, populate_huge_pages
from pagealloc.core.os_file cimport os_file_commit, os_file_write, os_map_file
from pagealloc.core.os_memory cimport MADV_DONTDUMP, os_advise, os_page_bytes, os_populate_write
from pagealloc.core.window_pages cimport (
    WINDOW_CLOSED,
    WINDOW_TAKEN,
    WINDOW_VIEWED,
    extent_of,
    window_count_mappings,
    window_enter,
    window_has_strict_view,
    window_has_writable_view,
)

ctypedef struct move_t:
    int64_t first_page
    int64_t n_pages
    extent_t *source        # behind the pages now; NULL: they are uncommitted
    extent_t *target        # shall be behind them; NULL: they shall be uncommitted
    bint is_fresh           # the target's pages are holes, to be committed and filled
    const char *content     # address of the window whose bytes fill them; NULL: zeros
    bint is_done

ctypedef struct plan_t:
    window_t *window
    move_t *moves
    int64_t n_moves
    int64_t capacity
    int64_t n_fresh_pages

cdef int64_t page_bytes = os_page_bytes()


cdef inline extent_t *mapped(const window_t *window, extent_t *extent) noexcept nogil:
    """What is mapped where `extent` is the source; where there is none, the own extent."""
    return window.own if extent == NULL else extent


# ---------------------------------------------------------------------------------------------
# Making a plan

cdef int plan_move(
    plan_t *plan, int64_t first_page, int64_t n_pages, extent_t *source, extent_t *target
) noexcept nogil:
    cdef move_t *move
    cdef move_t *moves
    cdef int64_t capacity
    if plan.n_moves == plan.capacity:
        capacity = 2 * plan.capacity if plan.capacity else 8
        moves = <move_t *>realloc(plan.moves, <size_t>capacity * sizeof(move_t))
        if moves == NULL:
            return ENOMEM
        plan.moves = moves
        plan.capacity = capacity
    move = &plan.moves[plan.n_moves]
    plan.n_moves += 1
    move.first_page = first_page
    move.n_pages = n_pages
    move.source = source
    move.target = target
    move.is_fresh = False
    move.content = NULL
    move.is_done = False
    return 0


cdef int find_holes(
    window_t *window, int64_t page, int64_t end_page, extent_t **extent, int64_t *n_pages
) noexcept nogil:
    """The first extent of the window's chain with a hole at `page`, and how many follow there.

    The own extent comes first, so that copies go home.  A new extent, added when all others have
    that page in use, costs file offsets only.
    """
    cdef extent_t **link = &window.own
    cdef interval_t gap
    cdef int64_t start
    cdef int error
    while True:
        if link[0] == NULL:
            error = extent_new(window.store, window.n_pages, link)
            if error:
                return error
        start = page
        if imap_next_gap(&link[0].refs, &start, end_page, &gap) and gap.first_page == page:
            extent[0] = link[0]
            n_pages[0] = gap.n_pages
            return 0
        link = &link[0].next


cdef int plan_fresh(
    plan_t *plan, int64_t page, int64_t end_page, extent_t *source, const char *content
) noexcept nogil:
    """Move the pages to holes, filled with `content` (the bytes of its window; NULL: zeros)."""
    cdef move_t *move = &plan.moves[plan.n_moves - 1] if plan.n_moves else NULL
    cdef extent_t *target = NULL
    cdef int64_t n_pages = 0
    cdef int error
    while page < end_page:
        error = find_holes(plan.window, page, end_page, &target, &n_pages)
        if error:
            return error
        if (
            move != NULL and move.first_page + move.n_pages == page
            and move.source == source and move.target == target
        ):
            move.n_pages += n_pages
        else:
            error = plan_move(plan, page, n_pages, source, target)
            if error:
                return error
            move = &plan.moves[plan.n_moves - 1]
            move.is_fresh = True
            move.content = content
        plan.n_fresh_pages += n_pages
        page += n_pages
    return 0


# ---------------------------------------------------------------------------------------------
# Applying it

cdef int reserve_books(plan_t *plan) noexcept nogil:
    """Make room for everything that `book` and `extent_discard` will enter."""
    cdef int64_t n_runs = 4 * plan.n_moves      # two changes of two runs, for each move
    cdef int64_t i
    cdef move_t *move
    if imap_reserve(&plan.window.sources, n_runs):
        return ENOMEM
    for i in range(plan.n_moves):
        move = &plan.moves[i]
        if move.source != NULL and imap_reserve(&move.source.refs, n_runs):
            return ENOMEM
        if move.target != NULL and imap_reserve(&move.target.refs, n_runs):
            return ENOMEM
    return 0


cdef int fill(window_t *window, const move_t *move) noexcept nogil:
    """Commit the target's pages and give them their content; a code may leave a part done."""
    cdef int64_t start_bytes = move.first_page * page_bytes
    cdef int64_t nbytes = move.n_pages * page_bytes
    cdef int64_t offset
    cdef int code = EINVAL
    if not move.is_fresh:
        return 0
    offset = extent_offset(move.target, move.first_page)
    if move.content != NULL:
        return os_file_write(
            window.store.fd, move.content + start_bytes, <size_t>nbytes, offset
        )
    if move.target == window.own:   # it is mapped already: commit and fill page tables at once
        populate_huge_pages(window, move.first_page, move.n_pages)
        code = os_populate_write(window.address + start_bytes, <size_t>nbytes)
    if code == EINVAL:
        code = os_file_commit(window.store.fd, offset, nbytes)
    return code


cdef int map_over(window_t *window, const move_t *move, extent_t *extent) noexcept nogil:
    return os_map_file(
        window.address + move.first_page * page_bytes, <size_t>(move.n_pages * page_bytes),
        window.store.fd, extent_offset(extent, move.first_page),
    )


cdef inline bint needs_mapping(const window_t *window, const move_t *move) noexcept nogil:
    return mapped(window, move.source) != mapped(window, move.target)


cdef int keep_from_dumps(plan_t *plan) noexcept nogil:
    """A new mapping would be part of core dumps, and would not merge with its neighbours.

    One call for all moves; what lies between them is excluded already.
    """
    cdef move_t *last = &plan.moves[plan.n_moves - 1]
    cdef int64_t first_page = plan.moves[0].first_page
    return os_advise(
        plan.window.address + first_page * page_bytes,
        <size_t>((last.first_page + last.n_pages - first_page) * page_bytes), MADV_DONTDUMP,
    )


cdef int map_moves(plan_t *plan) noexcept nogil:
    """Map all targets.  If the kernel refuses one, map the sources back.

    A move that it refuses to take back, too, stays done: as good as any other state, and in the
    books like one.  The refused page run itself keeps its mapping (the kernel checks before it
    unmaps); it is mapped again all the same, for older kernels that had unmapped it by then.
    """
    cdef window_t *window = plan.window
    cdef move_t *move
    cdef int64_t i, n_tried = 0
    cdef bint is_remapped = False
    cdef int code = 0
    while code == 0 and n_tried < plan.n_moves:
        move = &plan.moves[n_tried]
        n_tried += 1
        if needs_mapping(window, move):
            code = map_over(window, move, mapped(window, move.target))
            is_remapped = True
        move.is_done = code == 0
    if code == 0 and is_remapped:
        code = keep_from_dumps(plan)
    if code:
        for i in range(n_tried):
            move = &plan.moves[i]
            if not needs_mapping(window, move):
                move.is_done = False
            elif map_over(window, move, mapped(window, move.source)) == 0:
                move.is_done = False
        if is_remapped:
            keep_from_dumps(plan)
    return code


cdef void book(window_t *window, const move_t *move) noexcept nogil:
    """Enter a move that is done.  Reserved, so nothing here fails."""
    cdef store_t *store = window.store
    if move.target == NULL:
        imap_erase(&window.sources, move.first_page, move.n_pages)
        window.n_committed_pages -= move.n_pages
    else:
        imap_set(
            &window.sources, move.first_page, move.n_pages, <int64_t><uintptr_t>move.target
        )
        if move.is_fresh:
            extent_book(store, move.target, move.first_page, move.n_pages)
        else:
            extent_reference(store, move.target, move.first_page, move.n_pages)
    if move.source == NULL:
        window.n_committed_pages += move.n_pages
    else:
        extent_dereference(store, move.source, move.first_page, move.n_pages)


cdef int plan_apply(plan_t *plan, int code) noexcept nogil:
    """Carry the plan out unless making it failed with `code`; then forget it."""
    cdef window_t *window = plan.window
    cdef int64_t i, n_filled = 0
    if code == 0 and plan.n_moves:
        code = reserve_books(plan)
        if code == 0:
            code = store_admit(window.store, plan.n_fresh_pages)
        while code == 0 and n_filled < plan.n_moves:
            code = fill(window, &plan.moves[n_filled])
            n_filled += 1
        if code == 0:
            code = map_moves(plan)
        for i in range(n_filled):
            if plan.moves[i].is_done:
                book(window, &plan.moves[i])
            elif plan.moves[i].is_fresh:
                extent_discard(
                    window.store, plan.moves[i].target, plan.moves[i].first_page,
                    plan.moves[i].n_pages,
                )
        window_count_mappings(window)
    free(plan.moves)
    return code


# ---------------------------------------------------------------------------------------------
# The changes

cdef int window_commit(window_t *window, int64_t first_page, int64_t n_pages) noexcept nogil:
    """Commit the pages of the range that are not."""
    cdef plan_t plan = [window, NULL, 0, 0, 0]
    cdef int64_t page = first_page
    cdef interval_t gap
    cdef int code = window_enter(window)
    if code:
        return code
    while code == 0 and imap_next_gap(&window.sources, &page, first_page + n_pages, &gap):
        code = plan_fresh(&plan, gap.first_page, gap.first_page + gap.n_pages, NULL, NULL)
    code = plan_apply(&plan, code)
    if code == 0 and plan.n_fresh_pages:
        collapse_completed_huge_pages(window, first_page, n_pages)
    store_leave(window.store)
    return code


cdef int window_release(window_t *window, int64_t first_page, int64_t n_pages) noexcept nogil:
    """Drop the committed pages of the range."""
    cdef plan_t plan = [window, NULL, 0, 0, 0]
    cdef int64_t page = first_page
    cdef interval_t run
    cdef int code = window_enter(window)
    if code:
        return code
    if window_has_strict_view(window, first_page, n_pages):
        code = WINDOW_VIEWED
    while code == 0 and imap_next(&window.sources, &page, first_page + n_pages, &run):
        code = plan_move(&plan, run.first_page, run.n_pages, extent_of(&run), NULL)
    code = plan_apply(&plan, code)
    store_leave(window.store)
    return code


cdef int window_share(
    window_t *window, window_t *other, int64_t first_page, int64_t n_pages
) noexcept nogil:
    """Map the other's committed pages of the range here, or copy them if mappings run short."""
    cdef plan_t plan = [window, NULL, 0, 0, 0]
    cdef int64_t page = first_page, end_page = first_page + n_pages
    cdef int64_t n_runs
    cdef bint may_map
    cdef interval_t run
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
    may_map = store_may_map(window.store, 2 * n_runs)
    page = first_page
    while code == 0 and imap_next(&other.sources, &page, end_page, &run):
        if may_map:
            code = plan_move(&plan, run.first_page, run.n_pages, NULL, extent_of(&run))
        else:
            code = plan_fresh(
                &plan, run.first_page, run.first_page + run.n_pages, NULL, other.address
            )
    code = plan_apply(&plan, code)
    store_leave(window.store)
    return code


cdef int window_make_private(
    window_t *window, int64_t first_page, int64_t n_pages, int64_t *n_copied_pages
) noexcept nogil:
    """Copy the pages of the range that other windows map, too, and map the copies instead."""
    cdef plan_t plan = [window, NULL, 0, 0, 0]
    cdef int64_t page = first_page, shared_page
    cdef interval_t run, shared
    cdef int code = window_enter(window)
    if code:
        return code
    while code == 0 and imap_next(&window.sources, &page, first_page + n_pages, &run):
        shared_page = run.first_page
        while code == 0 and imap_next(
            &extent_of(&run).refs, &shared_page, run.first_page + run.n_pages, &shared
        ):
            if shared.value > 1:
                code = plan_fresh(
                    &plan, shared.first_page, shared.first_page + shared.n_pages,
                    extent_of(&run), window.address,
                )
    code = plan_apply(&plan, code)
    store_leave(window.store)
    if code == 0:
        n_copied_pages[0] = plan.n_fresh_pages
    return code
