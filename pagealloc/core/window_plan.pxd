"""A change of what stands behind the pages of a window: planned, then applied, all or nothing.

Conventions: a function that returns ``int`` returns 0, an errno value, or a code of `extent_pages`
or `window_pages`.  All want the store's mutex held.  Pages throughout.
"""

from libc.stdint cimport int64_t

from pagealloc.core.extent_pages cimport extent_t, window_t

ctypedef struct place_t:    # a page of an extent; NULL: nothing
    extent_t *extent
    int64_t page

ctypedef struct move_t:
    int64_t first_page      # of the window
    int64_t n_pages
    place_t source          # stands behind the pages now; nothing: they are uncommitted
    place_t target          # shall stand behind them; nothing: they shall be uncommitted
    bint is_fresh           # the target's pages are holes, to be committed and filled
    const char *content     # address of the window whose bytes fill them; NULL: zeros
    bint is_done

ctypedef struct plan_t:
    window_t *window
    move_t *moves
    int64_t n_moves
    int64_t capacity
    int64_t n_fresh_pages

cdef int plan_move(
    plan_t *plan, int64_t first_page, int64_t n_pages, place_t source, place_t target
) noexcept nogil
cdef int plan_fresh(
    plan_t *plan, int64_t page, int64_t end_page, place_t source, const char *content
) noexcept nogil
cdef int plan_apply(plan_t *plan, int code) noexcept nogil
