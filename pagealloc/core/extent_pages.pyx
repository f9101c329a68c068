"""The pages of an extent store: which are in use, by how many windows, within which budget.

Purpose
    The page source of windows.  tmpfs is the page allocator; this room keeps its books.
Structure
    The store's one file is cut into *extents*, each as long as the window it was made for.  Page
    p of a window lies at page p of some extent, unless rows were moved by mapping (`remap`), or
    that place was taken.  Neighbours in a window are neighbours in the file wherever possible, for
    those map as one range.  A page is named by (extent, page).

        file   | extent of window A | extent of B  | spare, in a free list | second one of A ..
        refs     1 1 2 2 - - - -      1 1 - - - -    - - - - - - - -         - - 1 - - - - -

    An extent covers 2**order huge pages of file offsets.  Offsets cost nothing (the file is
    sparse), so rounding up lets windows of similar lengths reuse each other's.
    Life of an extent: attached (its window may put pages here) -> detached, while other windows
    still map pages of it -> free.
    Life of a page: a hole, unknown to refs -> committed, refs >= 1 -> refs = 0 and punched at
    once -> a hole.  What the kernel refuses to punch is *stale*: refs stays 0, it counts as
    committed, and every later commit, release and trim() tries again.
Invariants
    n_committed_pages = pages that the refs of all extents know
    n_stale_pages     = those with refs = 0
    n_references      = sum of refs = sum over the windows of their committed pages
    shared pages      = n_references - (n_committed_pages - n_stale_pages)
    held pages       >= n_committed_pages - n_stale_pages
    n_committed_pages <= budget_pages
Locking
    One mutex a store, for everything in it and in its windows; who holds it calls no Python (a
    garbage collection could close a window, which takes the same mutex).
Units
    Pages, unless a name says bytes.
"""

from libc.errno cimport EFBIG, ENOMEM
from libc.stdint cimport INT64_MAX, int64_t
from libc.stdlib cimport calloc, free, realloc

from pagealloc.core.atomics cimport atomic_add_i64, atomic_load_i64
from pagealloc.core.interval_map cimport (
    imap_add,
    imap_destroy,
    imap_erase,
    imap_is_valid,
    imap_next,
    imap_set,
    interval_t,
)
from pagealloc.core.mutex cimport mutex_lock, mutex_t, mutex_unlock
from pagealloc.core.os_file cimport os_file_close, os_file_grow, os_file_punch
from pagealloc.core.os_memory cimport os_fork_generation

cdef extern from "<pthread.h>" nogil:
    int mutex_trylock "pthread_mutex_trylock"(mutex_t *mutex)

cdef int64_t process_mappings = 0   # what the windows of all stores cost; atomic


cdef int64_t extent_offset(
    const store_t *store, const extent_t *extent, int64_t page
) noexcept nogil:
    """Where the extent's `page` lies in the file, in bytes."""
    return (extent.first_page + page) << store.page_shift


cdef int64_t extent_pages(const store_t *store, const extent_t *extent) noexcept nogil:
    """Its length."""
    return store.pages_per_huge << extent.order


cdef extent_t *extent_at(const store_t *store, int64_t file_page) noexcept nogil:
    """The extent that this page of the file belongs to, NULL behind the last."""
    cdef int64_t low = 0, high = store.n_extents, middle
    if file_page < 0 or file_page >= store.n_file_pages:
        return NULL
    while high - low > 1:
        middle = (low + high) // 2
        if store.extents[middle].first_page <= file_page:
            low = middle
        else:
            high = middle
    return store.extents[low]


# ---------------------------------------------------------------------------------------------
# Entering a store

cdef bint store_is_frozen(const store_t *store) noexcept nogil:
    """True in a process that inherited the store through fork()."""
    return store.fork_generation != os_fork_generation()


cdef int store_enter(store_t *store) noexcept nogil:
    """Take the mutex in order to change something; no mutex is held if a code is returned."""
    cdef int code = 0
    mutex_lock(&store.mutex)
    if store.is_closed:
        code = STORE_CLOSED
    elif store_is_frozen(store):
        code = STORE_FORKED
    if code:
        mutex_unlock(&store.mutex)
    return code


cdef void store_leave(store_t *store) noexcept nogil:
    mutex_unlock(&store.mutex)


cdef bint store_try_enter(store_t *store) noexcept nogil:
    """Take the mutex if that needs no waiting, closed or frozen or not."""
    return mutex_trylock(&store.mutex) == 0


cdef void store_wait(store_t *store) noexcept nogil:
    """Take the mutex, closed or frozen or not."""
    mutex_lock(&store.mutex)


# ---------------------------------------------------------------------------------------------
# Pages

cdef int store_admit(store_t *store, int64_t n_pages) noexcept nogil:
    """0 if `n_pages` more may be committed."""
    if store.n_stale_pages:
        store_retry_punches(store)
    if n_pages > store.budget_pages - store.n_committed_pages:
        return STORE_OVER_BUDGET
    return 0


cdef void extent_book(
    store_t *store, extent_t *extent, int64_t first_page, int64_t n_pages
) noexcept nogil:
    """Enter pages that were just committed, with one reference.  Room in refs is reserved."""
    imap_set(&extent.refs, first_page, n_pages, 1)
    extent.n_references += n_pages
    store.n_references += n_pages
    store.n_committed_pages += n_pages


cdef void extent_reference(
    store_t *store, extent_t *extent, int64_t first_page, int64_t n_pages
) noexcept nogil:
    """One more window maps the pages.  Room in refs is reserved."""
    imap_add(&extent.refs, first_page, n_pages, 1)
    extent.n_references += n_pages
    store.n_references += n_pages


cdef void extent_dereference(
    store_t *store, extent_t *extent, int64_t first_page, int64_t n_pages
) noexcept nogil:
    """One window fewer maps the pages; punch those that none maps.  Room in refs is reserved."""
    imap_add(&extent.refs, first_page, n_pages, -1)
    extent.n_references -= n_pages
    store.n_references -= n_pages
    punch_unused(store, extent, first_page, first_page + n_pages)
    free_if_unused(store, extent)


cdef void extent_discard(
    store_t *store, extent_t *extent, int64_t first_page, int64_t n_pages
) noexcept nogil:
    """Punch pages that were committed, wholly or in part, and not booked.  Room is reserved."""
    imap_set(&extent.refs, first_page, n_pages, 0)
    store.n_committed_pages += n_pages
    punch_unused(store, extent, first_page, first_page + n_pages)


cdef void punch_unused(
    store_t *store, extent_t *extent, int64_t page, int64_t end_page
) noexcept nogil:
    """Punch the pages with refs = 0; what the kernel refuses to punch becomes stale."""
    cdef interval_t run
    cdef int error
    while imap_next(&extent.refs, &page, end_page, &run):
        if run.value or store.keeps_pages:
            continue
        error = os_file_punch(
            store.fd, extent_offset(store, extent, run.first_page), run.n_pages * store.page_bytes
        )
        if error == 0:
            error = imap_erase(&extent.refs, run.first_page, run.n_pages)
        if error == 0:
            store.n_committed_pages -= run.n_pages
            continue
        store.n_stale_pages += run.n_pages
        if not extent.is_stale:
            extent.is_stale = True
            extent.next_stale = store.stale_extents
            store.stale_extents = extent


cdef void store_retry_punches(store_t *store) noexcept nogil:
    """Try again to punch stale pages."""
    cdef extent_t *extent = store.stale_extents
    cdef extent_t *next_extent
    store.stale_extents = NULL
    store.n_stale_pages = 0
    while extent != NULL:
        next_extent = extent.next_stale
        extent.is_stale = False
        punch_unused(store, extent, 0, INT64_MAX)
        extent = next_extent


# ---------------------------------------------------------------------------------------------
# Extents

cdef int extent_new(store_t *store, int64_t n_pages, extent_t **found) noexcept nogil:
    """An attached extent without references for a window of `n_pages`: a free one, or new."""
    cdef int order = 0
    cdef int64_t length_pages
    cdef extent_t *extent
    cdef int error
    while order < N_ORDERS and store.pages_per_huge << order < n_pages:
        order += 1
    if order == N_ORDERS:
        return ENOMEM
    extent = store.free_extents[order]
    if extent != NULL:
        store.free_extents[order] = extent.next
    else:
        length_pages = store.pages_per_huge << order
        if length_pages > INT64_MAX // store.page_bytes - store.n_file_pages:
            return EFBIG
        if reserve_extent(store):
            return ENOMEM
        extent = <extent_t *>calloc(1, sizeof(extent_t))
        if extent == NULL:
            return ENOMEM
        error = os_file_grow(store.fd, (store.n_file_pages + length_pages) * store.page_bytes)
        if error:
            free(extent)
            return error
        enter_extent(store, extent, order)
    extent.next = NULL
    extent.is_attached = True
    found[0] = extent
    return 0


cdef int extent_foreign(
    store_t *store, int fd, int64_t n_pages, extent_t **found
) noexcept nogil:
    """An extent for the first pages of another process's file, which `fd` is open for reading.

    It takes offsets of the own file, where nothing will ever be.  From here on the fd is its.
    """
    cdef int order = 0
    cdef extent_t *extent
    while order < N_ORDERS and store.pages_per_huge << order < n_pages:
        order += 1
    if (
        order == N_ORDERS
        or store.pages_per_huge << order > INT64_MAX // store.page_bytes - store.n_file_pages
    ):
        return EFBIG
    if reserve_extent(store):
        return ENOMEM
    extent = <extent_t *>calloc(1, sizeof(extent_t))
    if extent == NULL:
        return ENOMEM
    if imap_set(&extent.refs, 0, n_pages, 1):
        free(extent)
        return ENOMEM
    extent.is_foreign = extent.is_attached = True
    extent.fd = fd
    extent.n_foreign_pages = n_pages
    enter_extent(store, extent, order)
    found[0] = extent
    return 0


cdef void enter_extent(store_t *store, extent_t *extent, int order) noexcept nogil:
    """Give it the next offsets of the file.  Room is reserved."""
    extent.first_page = store.n_file_pages
    extent.order = order
    store.extents[store.n_extents] = extent
    store.n_extents += 1
    store.n_file_pages += extent_pages(store, extent)


cdef int reserve_extent(store_t *store) noexcept nogil:
    """Make room for one more in `extents`."""
    cdef int64_t capacity = 2 * store.extents_capacity if store.extents_capacity else 8
    cdef extent_t **extents
    if store.n_extents < store.extents_capacity:
        return 0
    extents = <extent_t **>realloc(store.extents, <size_t>capacity * sizeof(extent_t *))
    if extents == NULL:
        return ENOMEM
    store.extents = extents
    store.extents_capacity = capacity
    return 0


cdef void extent_detach(store_t *store, extent_t *extent) noexcept nogil:
    """Its window is gone: the extent is free as soon as nobody maps a page of it."""
    extent.is_attached = False
    free_if_unused(store, extent)


cdef void free_if_unused(store_t *store, extent_t *extent) noexcept nogil:
    if extent.is_attached or extent.n_references:
        return
    if extent.refs.n_runs == 0:
        imap_destroy(&extent.refs)
    # Reading a hole allocates its page, and nobody books that: leave none behind.  If the kernel
    # refuses, the next window here meets a page of zeros that held bytes show and the books don't.
    os_file_punch(
        store.fd, extent_offset(store, extent, 0), extent_pages(store, extent) * store.page_bytes
    )
    extent.next = store.free_extents[extent.order]
    store.free_extents[extent.order] = extent


# ---------------------------------------------------------------------------------------------
# Windows, as far as a store knows them

cdef void store_add_window(store_t *store, window_t *window) noexcept nogil:
    window.previous = NULL
    window.next = store.windows
    if store.windows != NULL:
        store.windows.previous = window
    store.windows = window
    store.n_windows += 1


cdef void store_remove_window(store_t *store, window_t *window) noexcept nogil:
    if window.previous != NULL:
        window.previous.next = window.next
    else:
        store.windows = window.next
    if window.next != NULL:
        window.next.previous = window.previous
    store.n_windows -= 1


cdef void store_count_mappings(store_t *store, int64_t delta) noexcept nogil:
    store.n_mappings += delta
    atomic_add_i64(&process_mappings, delta)


cdef bint store_may_map(const store_t *store, int64_t n_mappings) noexcept nogil:
    """True if `n_mappings` more leave the process far from vm.max_map_count."""
    return atomic_load_i64(&process_mappings) + n_mappings <= store.max_mappings


# ---------------------------------------------------------------------------------------------
# The whole store

cdef void store_close_file(store_t *store) noexcept nogil:
    """The kernel frees every page with the file."""
    cdef int64_t i
    store.is_closed = True
    for i in range(store.n_extents):
        if store.extents[i].is_foreign:
            os_file_close(store.extents[i].fd)
        imap_destroy(&store.extents[i].refs)
        free(store.extents[i])
    free(store.extents)
    store.extents = NULL
    store.n_extents = store.extents_capacity = 0
    store.stale_extents = NULL
    store.n_committed_pages = store.n_stale_pages = store.n_references = 0
    os_file_close(store.fd)
    store.fd = -1


cdef const char *store_broken_invariant(store_t *store, int64_t held_bytes) noexcept nogil:
    """What is wrong with the store, or NULL."""
    cdef int64_t n_committed = 0, n_stale = 0, n_references = 0, n_mapped = 0, n_mappings = 0
    cdef int64_t extent_references, i, j, end_page = 0
    cdef extent_t *extent
    cdef window_t *window = store.windows
    for j in range(store.n_extents):
        extent = store.extents[j]
        if extent.first_page != end_page:
            return "extents do not lie one behind the other in the file"
        end_page += extent_pages(store, extent)
        if not imap_is_valid(&extent.refs):
            return "an extent's refs are no interval map"
        extent_references = 0
        for i in range(extent.refs.n_runs):
            if extent.is_foreign:
                extent_references -= extent.refs.runs[i].n_pages
            else:
                n_committed += extent.refs.runs[i].n_pages
            extent_references += extent.refs.runs[i].n_pages * extent.refs.runs[i].value
            if extent.refs.runs[i].value < 0:
                return "a page has fewer than no references"
            if extent.refs.runs[i].value == 0:
                n_stale += extent.refs.runs[i].n_pages
        if extent_references != extent.n_references:
            return "an extent's n_references is not the sum of its refs"
        n_references += extent_references
    while window != NULL:
        n_mapped += window.n_committed_pages
        n_mappings += window.n_mappings
        window = window.next
    if n_committed != store.n_committed_pages:
        return "committed pages are not those that refs know"
    if n_committed > store.budget_pages:
        return "more is committed than the budget allows"
    if n_stale != store.n_stale_pages:
        return "stale pages are not those with refs = 0"
    if n_references != store.n_references:
        return "references are not the sum of the extents'"
    if n_mappings != store.n_mappings:
        return "mappings are not the sum of the windows'"
    if store_is_frozen(store):
        return NULL     # windows closed here keep their references: the pages are the parent's
    if n_references != n_mapped:
        return "references are not the sum of the windows' committed pages"
    if held_bytes < 0:
        return NULL     # the kernel does not say
    if held_bytes < (n_committed - n_stale) * store.page_bytes:
        return "the file holds less than is committed"
    return NULL
