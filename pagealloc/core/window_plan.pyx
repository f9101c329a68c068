"""A change of what stands behind the pages of a window: planned, then applied, all or nothing.

Purpose
    What commit, release, share, make_private and shift (`remap`) have in common.
Structure
    A *plan* is a list of moves of page runs from one place in the file (or none) to another (or
    none).

        commit        [4..9)  nothing -> own extent, fresh, zeros
        share         [0..4)  nothing -> the other window's extent
        make private  [3..4)  that extent -> own extent, fresh, a copy
        shift         [2..6)  own extent at 2 -> own extent at 5;  [6..9)  own extent -> nothing
        release       [0..3)  that extent -> nothing, which maps the own extent back

    Applying it goes through what may fail first: room in the books, the budget, filling fresh
    pages, mapping.  If one of these fails, what was done is undone.  The result is entered in the
    books last, which cannot fail.  A reader sees the same bytes all the while, for a page is
    mapped over by its equal, and the kernel replaces a mapping in one step.
Invariants
    before and after, the invariants of extent_pages and window_pages hold, whatever the kernel
    refuses
    a page is mapped before sources name it, and filled before it is mapped
    no two fresh moves of a plan go to the same page of an extent
    moves are booked in order: who lets go of a page that another move takes comes later
Locking
    The store's mutex, held by the caller.
Units
    Pages, unless a name says bytes.
"""

from libc.errno cimport EINVAL, ENOMEM
from libc.stdint cimport int64_t
from libc.stdlib cimport free, realloc
from libc.string cimport memcpy

from pagealloc.core.extent_pages cimport (
    extent_at,
    extent_book,
    extent_dereference,
    extent_discard,
    extent_new,
    extent_offset,
    extent_pages,
    extent_reference,
    extent_t,
    store_admit,
    store_t,
    window_t,
)
from pagealloc.core.huge_pages cimport populate_huge_pages
from pagealloc.core.interval_map cimport (
    imap_erase,
    imap_next,
    imap_next_gap,
    imap_reserve,
    imap_set,
    interval_t,
)
from pagealloc.core.os_file cimport (
    os_file_commit,
    os_file_write,
    os_map_file,
    os_map_file_to_read,
)
from pagealloc.core.os_memory cimport (
    os_populate_write,
    os_release,
    os_reserve,
)
from pagealloc.core.window_pages cimport window_advise, window_count_mappings, window_owns


# ---------------------------------------------------------------------------------------------
# Making a plan

cdef int plan_move(
    plan_t *plan, int64_t first_page, int64_t n_pages, place_t source, place_t target
) noexcept nogil:
    """Plan that other pages stand behind these."""
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


cdef int64_t unplanned(
    const plan_t *plan, const extent_t *extent, int64_t page, int64_t end_page
) noexcept nogil:
    """How many pages of the extent from `page` on no fresh move of the plan goes to yet.

    Less than 0: so many pages further on, the moves that go there end.
    """
    cdef int64_t i, start, end
    for i in range(plan.n_moves):
        if not plan.moves[i].is_fresh or plan.moves[i].target.extent != extent:
            continue
        start = plan.moves[i].target.page
        end = start + plan.moves[i].n_pages
        if start <= page < end:
            return page - end
        if page < start < end_page:
            end_page = start
    return end_page - page


cdef bint is_free_at(
    const plan_t *plan, extent_t *extent, int64_t page, int64_t *n_pages
) noexcept nogil:
    """True if the extent has a hole at `page`; and how many of `n_pages` it has there."""
    cdef int64_t start = page
    cdef int64_t end_page = min(page + n_pages[0], extent_pages(plan.window.store, extent))
    cdef interval_t gap
    if page < 0 or not imap_next_gap(&extent.refs, &start, end_page, &gap):
        return False
    if gap.first_page != page:
        return False
    end_page = unplanned(plan, extent, page, page + gap.n_pages)
    if end_page <= 0:
        return False
    n_pages[0] = end_page
    return True


cdef bint next_in_file(const plan_t *plan, int64_t page, place_t *place) noexcept nogil:
    """What in the file follows the page before `page`: a mapping that would merge."""
    cdef const window_t *window = plan.window
    cdef const move_t *move
    cdef int64_t before = page - 1
    cdef int64_t file_page
    cdef interval_t run
    if plan.n_moves:
        move = &plan.moves[plan.n_moves - 1]
        if move.target.extent != NULL and move.first_page + move.n_pages == page:
            place.extent = move.target.extent
            place.page = move.target.page + move.n_pages
            return True
    if page == 0 or not imap_next(&window.sources, &before, page, &run):
        return False
    file_page = run.value + page
    place.extent = extent_at(window.store, file_page)
    if place.extent == NULL:
        return False
    place.page = file_page - place.extent.first_page
    return True


cdef int find_holes(
    const plan_t *plan, int64_t page, place_t *place, int64_t *n_pages
) noexcept nogil:
    """Holes for up to `n_pages` pages from `page` on, and how many are there.

    What follows the page before, if that is the window's own; else its place in the own extent,
    so that copies go home; else any hole of the window's extents.  A new one costs file offsets
    only.
    """
    cdef window_t *window = plan.window
    cdef extent_t **link = &window.own
    cdef interval_t gap
    cdef int64_t start, n_free
    cdef int error
    if (
        next_in_file(plan, page, place)
        and window_owns(window, place.extent)
        and is_free_at(plan, place.extent, place.page, n_pages)
    ):
        return 0
    place.extent = window.own
    place.page = page
    if is_free_at(plan, place.extent, place.page, n_pages):
        return 0
    while True:
        if link[0] == NULL:
            error = extent_new(window.store, window.n_pages, link)
            if error:
                return error
        place.extent = link[0]
        start = 0
        while imap_next_gap(&link[0].refs, &start, extent_pages(window.store, link[0]), &gap):
            n_free = unplanned(plan, link[0], gap.first_page, gap.first_page + gap.n_pages)
            if n_free > 0:
                place.page = gap.first_page
                n_pages[0] = min(n_pages[0], n_free)
                return 0
            start = gap.first_page - n_free
        link = &link[0].next


cdef int plan_fresh(
    plan_t *plan, int64_t page, int64_t end_page, place_t source, const char *content
) noexcept nogil:
    """Move the pages to holes, filled with `content` (the bytes of its window; NULL: zeros)."""
    cdef move_t *move = &plan.moves[plan.n_moves - 1] if plan.n_moves else NULL
    cdef place_t target
    cdef int64_t n_pages
    cdef int error
    while page < end_page:
        n_pages = end_page - page
        error = find_holes(plan, page, &target, &n_pages)
        if error:
            return error
        if (
            move != NULL and move.first_page + move.n_pages == page
            and move.is_fresh and move.content == content
            and move.target.extent == target.extent
            and move.target.page + move.n_pages == target.page
            and move.source.extent == source.extent
            and (source.extent == NULL or move.source.page + move.n_pages == source.page)
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
        source.page += n_pages
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
        if move.source.extent != NULL and imap_reserve(&move.source.extent.refs, n_runs):
            return ENOMEM
        if move.target.extent != NULL and imap_reserve(&move.target.extent.refs, n_runs):
            return ENOMEM
    return 0


cdef int64_t file_page_of(
    const window_t *window, const move_t *move, place_t place
) noexcept nogil:
    """What page of the file is mapped first where `place` stands; where nothing does, the own."""
    if place.extent == NULL:
        return window.own.first_page + move.first_page
    return place.extent.first_page + place.page


cdef int map_over(window_t *window, const move_t *move, place_t place) noexcept nogil:
    cdef char *address = window.address + move.first_page * window.store.page_bytes
    cdef size_t nbytes = <size_t>(move.n_pages * window.store.page_bytes)
    if place.extent != NULL and place.extent.is_foreign:
        return os_map_file_to_read(
            address, nbytes, place.extent.fd, place.page * window.store.page_bytes
        )
    return os_map_file(
        address, nbytes, window.store.fd,
        file_page_of(window, move, place) * window.store.page_bytes,
    )


cdef inline bint needs_mapping(const window_t *window, const move_t *move) noexcept nogil:
    if window.is_unmapped:
        return False
    return file_page_of(window, move, move.source) != file_page_of(window, move, move.target)


cdef int fill(window_t *window, const move_t *move) noexcept nogil:
    """Commit the target's pages and give them their content; a code may leave a part done."""
    cdef int64_t start_bytes = move.first_page * window.store.page_bytes
    cdef int64_t nbytes = move.n_pages * window.store.page_bytes
    cdef int64_t offset
    cdef int code = EINVAL
    if not move.is_fresh:
        return 0
    offset = extent_offset(window.store, move.target.extent, move.target.page)
    if move.content != NULL and not window.store.is_hugetlb:
        return os_file_write(
            window.store.fd, move.content + start_bytes, <size_t>nbytes, offset
        )
    if (
        file_page_of(window, move, move.target) == window.own.first_page + move.first_page
        and move.content == NULL and not window.store.is_hugetlb
    ):  # it is mapped already: commit and fill page tables at once
        populate_huge_pages(window, move.first_page, move.n_pages)
        code = os_populate_write(window.address + start_bytes, <size_t>nbytes)
    if code == EINVAL:
        code = os_file_commit(window.store.fd, offset, nbytes)
    if code == 0 and move.content != NULL:      # hugetlbfs knows no write()
        code = copy_by_mapping(window, move.content + start_bytes, <size_t>nbytes, offset)
    return code


cdef int copy_by_mapping(
    const window_t *window, const char *content, size_t nbytes, int64_t offset
) noexcept nogil:
    """Copy to committed pages of the file, mapped elsewhere for the while."""
    cdef char *target = <char *>os_reserve(nbytes, <size_t>window.store.page_bytes)
    cdef int code
    if target == NULL:
        return ENOMEM
    code = os_map_file(target, nbytes, window.store.fd, offset)
    if code == 0:
        memcpy(target, content, nbytes)
    os_release(target, nbytes)      # a refusal costs address space only
    return code


cdef int keep_from_dumps(plan_t *plan) noexcept nogil:
    """A new mapping would be part of core dumps, and would not merge with its neighbours.

    One call for all moves; what lies between them is excluded already.
    """
    cdef int64_t first_page = plan.moves[0].first_page, end_page = 0, i
    for i in range(plan.n_moves):
        first_page = min(first_page, plan.moves[i].first_page)
        end_page = max(end_page, plan.moves[i].first_page + plan.moves[i].n_pages)
    return window_advise(plan.window, first_page, end_page - first_page)


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
            code = map_over(window, move, move.target)
            is_remapped = True
        move.is_done = code == 0
    if code == 0 and is_remapped:
        code = keep_from_dumps(plan)
    if code:
        for i in range(n_tried):
            move = &plan.moves[i]
            if not needs_mapping(window, move):
                move.is_done = False
            elif map_over(window, move, move.source) == 0:
                move.is_done = False
        if is_remapped:
            keep_from_dumps(plan)
    return code


cdef void book(window_t *window, const move_t *move) noexcept nogil:
    """Enter a move that is done.  Reserved, so nothing here fails."""
    cdef store_t *store = window.store
    if move.target.extent == NULL:
        imap_erase(&window.sources, move.first_page, move.n_pages)
        window.n_committed_pages -= move.n_pages
    else:
        imap_set(
            &window.sources, move.first_page, move.n_pages,
            file_page_of(window, move, move.target) - move.first_page,
        )
        if move.is_fresh:
            extent_book(store, move.target.extent, move.target.page, move.n_pages)
        else:
            extent_reference(store, move.target.extent, move.target.page, move.n_pages)
    if move.source.extent == NULL:
        window.n_committed_pages += move.n_pages
    else:
        extent_dereference(store, move.source.extent, move.source.page, move.n_pages)


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
                    window.store, plan.moves[i].target.extent, plan.moves[i].target.page,
                    plan.moves[i].n_pages,
                )
        window_count_mappings(window)
    free(plan.moves)
    return code
