"""Windows: contiguous address ranges over the extents of a store.

Conventions: a function that returns ``int`` returns 0, an errno value, a code of `extent_pages`
or one of the codes below.  Pages unless a name says bytes.
"""

from libc.stdint cimport int64_t

from pagealloc.core.extent_pages cimport extent_t, store_t, view_t, window_t

cdef enum:
    WINDOW_CLOSED = -11
    WINDOW_HOLE = -12       # a page that must be committed is not
    WINDOW_TAKEN = -13      # a page that must be uncommitted is committed
    WINDOW_SHARED = -14     # a page that must be private is shared
    WINDOW_VIEWED = -15     # a live view forbids it
    WINDOW_UNMAPPED = -16   # it has no addresses

ctypedef struct page_use_t:     # one entry of window_uses
    int64_t first_page
    int64_t n_pages
    int64_t file_offset
    int64_t n_references
    bint is_own

ctypedef struct piece_t:        # a run of a window's committed pages, all of one extent
    int64_t first_page
    int64_t n_pages
    extent_t *extent
    int64_t extent_page         # where first_page lies in it

cdef bint window_next_piece(
    const window_t *window, int64_t *page, int64_t end_page, piece_t *piece
) noexcept nogil

# These take the mutex.
cdef int window_open(
    store_t *store, int64_t n_pages, bint is_mapped, window_t **window
) noexcept nogil
cdef void window_abandon(window_t *window) noexcept nogil

# This one returns with the mutex held, unless it returns a code.
cdef int window_enter(window_t *window) noexcept nogil

# These want it held.
cdef int window_advise(
    const window_t *window, int64_t first_page, int64_t n_pages
) noexcept nogil
cdef int window_close(window_t *window) noexcept nogil
cdef void windows_close_abandoned(store_t *store) noexcept nogil
cdef void windows_forget_abandoned(store_t *store) noexcept nogil
cdef bint window_is_private(
    const window_t *window, int64_t first_page, int64_t n_pages
) noexcept nogil
cdef bint window_owns(const window_t *window, const extent_t *extent) noexcept nogil
cdef bint window_has_writable_view(
    const window_t *window, int64_t first_page, int64_t n_pages
) noexcept nogil
cdef bint window_has_strict_view(
    const window_t *window, int64_t first_page, int64_t n_pages
) noexcept nogil
cdef int window_add_view(
    window_t *window, view_t *view, int64_t first_page, int64_t n_pages
) noexcept nogil
cdef void window_remove_view(window_t *window, view_t *view) noexcept nogil
cdef int64_t window_uses(
    const window_t *window, page_use_t *uses, int64_t capacity
) noexcept nogil
cdef void window_count_mappings(window_t *window) noexcept nogil
cdef const char *window_broken_invariant(const window_t *window) noexcept nogil
