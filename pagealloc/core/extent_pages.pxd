"""The pages of an extent store: which are in use, by how many windows, within which budget.

Purpose: the page source of windows.  Conventions: a function that returns ``int`` returns 0, an
errno value, or one of the negative codes below.  Everything here wants the store's mutex, which
`store_enter` takes; nobody who holds it may call Python.  Pages unless a name says bytes.
"""

from libc.stdint cimport int64_t

from pagealloc.core.interval_map cimport interval_map_t
from pagealloc.core.mutex cimport mutex_t

cdef enum:
    N_ORDERS = 48

    STORE_CLOSED = -1
    STORE_FORKED = -2
    STORE_OVER_BUDGET = -3

ctypedef struct store_t

ctypedef struct extent_t:
    int64_t first_page      # where it starts in the file
    int order               # it covers 2**order huge pages of file offsets
    bint is_attached        # its window is open and may put pages here
    bint is_foreign         # its pages are another process's, in `fd`: read, never punched
    int fd                  # of a foreign extent
    int64_t n_foreign_pages     # how long the file was
    bint is_stale           # in the list of extents with stale pages
    int64_t n_references    # sum of refs over all its pages
    interval_map_t refs     # page of the window -> windows that map it, in a foreign extent one
    #                         more: the other process, so that no page is private.  0: stale
    extent_t *next          # in its window's chain, or in the free list
    extent_t *next_stale

ctypedef struct view_t:     # a live view; part of the object that exports it
    int64_t offset_bytes
    int64_t nbytes
    int64_t mark
    bint is_writable
    bint may_have_holes
    view_t *previous
    view_t *next

ctypedef struct window_t:
    store_t *store
    char *address               # NULL: closed, never mapped, or lost in a fork
    int64_t n_pages
    interval_map_t sources      # page -> file page behind it, less page; committed pages only
    extent_t *own               # mapped wherever nothing is committed; first of the chain; or NULL
    int64_t n_committed_pages   # pages in sources
    int64_t n_mappings
    view_t *views
    int64_t n_views
    bint is_unmapped            # it has no addresses, and no extent of its own
    bint is_closed
    bint is_abandoned           # nobody refers to it, yet the kernel refused to unmap it
    window_t *previous          # in store.windows
    window_t *next

ctypedef struct store_t:
    mutex_t mutex
    int fd
    bint is_closed
    int64_t fork_generation     # of the process that made it
    int64_t page_bytes          # the machine's, or a huge page in a file of huge pages
    int page_shift              # log2 of it
    int64_t pages_per_huge
    bint is_hugetlb             # the file is of huge pages from the machine's pool
    bint wants_huge_pages       # pages are to be collapsed to huge ones
    bint wants_folios           # a page is a folio, which the kernel has to be advised of
    bint keeps_pages            # nothing is punched any more: other processes read on
    int64_t budget_pages
    int64_t max_mappings
    int64_t n_file_pages        # file offsets given to extents so far
    int64_t n_committed_pages   # pages that some extent's refs know
    int64_t n_stale_pages       # those with 0
    int64_t n_references        # sum of refs
    int64_t n_mappings          # what this store's windows cost the process
    int64_t n_windows
    extent_t **extents          # by first_page, n_extents of them
    int64_t n_extents
    int64_t extents_capacity
    extent_t *stale_extents
    extent_t *free_extents[N_ORDERS]
    window_t *windows
    int64_t n_abandoned         # of them, those with is_abandoned
    store_t *previous           # in the registry, under the registry's mutex
    store_t *next

cdef int64_t extent_offset(
    const store_t *store, const extent_t *extent, int64_t page
) noexcept nogil
cdef int64_t extent_pages(const store_t *store, const extent_t *extent) noexcept nogil
cdef extent_t *extent_at(const store_t *store, int64_t file_page) noexcept nogil

# The mutex: to change something; to look; likewise, false if that means waiting.
cdef int store_enter(store_t *store) noexcept nogil
cdef void store_wait(store_t *store) noexcept nogil
cdef bint store_try_enter(store_t *store) noexcept nogil
cdef void store_leave(store_t *store) noexcept nogil

cdef bint store_is_frozen(const store_t *store) noexcept nogil
cdef int store_admit(store_t *store, int64_t n_pages) noexcept nogil
cdef void store_retry_punches(store_t *store) noexcept nogil
cdef void store_close_file(store_t *store) noexcept nogil
cdef const char *store_broken_invariant(store_t *store, int64_t held_bytes) noexcept nogil

cdef void store_add_window(store_t *store, window_t *window) noexcept nogil
cdef void store_remove_window(store_t *store, window_t *window) noexcept nogil
cdef void store_count_mappings(store_t *store, int64_t delta) noexcept nogil
cdef bint store_may_map(const store_t *store, int64_t n_mappings) noexcept nogil

cdef int extent_new(store_t *store, int64_t n_pages, extent_t **extent) noexcept nogil
cdef int extent_foreign(
    store_t *store, int fd, int64_t n_pages, extent_t **extent
) noexcept nogil
cdef void extent_detach(store_t *store, extent_t *extent) noexcept nogil
cdef void extent_book(
    store_t *store, extent_t *extent, int64_t first_page, int64_t n_pages
) noexcept nogil
cdef void extent_discard(
    store_t *store, extent_t *extent, int64_t first_page, int64_t n_pages
) noexcept nogil
cdef void extent_reference(
    store_t *store, extent_t *extent, int64_t first_page, int64_t n_pages
) noexcept nogil
cdef void extent_dereference(
    store_t *store, extent_t *extent, int64_t first_page, int64_t n_pages
) noexcept nogil
