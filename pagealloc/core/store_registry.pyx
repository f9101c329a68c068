"""The list of all extent stores of the process, and what fork() does with them.

Purpose
    MAP_SHARED memory has no copy-on-write: a forked child would write into its parent's caches.
    So every window is made read-only in the child, and `store_is_frozen` is true there.
Structure
    stores -> store_t <-> store_t <-> ...
Invariants
    a store is listed from before its first window until after its last
    in a forked child every window of the parent's is read-only, or unmapped
Locking
    One mutex for the list, one for each store.  Order: list, then store; only the fork handlers
    take both, and all stores' at once, so that the child finds whole books and free mutexes.
    Nobody who holds one of them waits for the GIL: waiting for them with the GIL held, as
    os.fork() does, cannot deadlock.
Units
    Bytes.
"""

from pagealloc.core.extent_pages cimport store_t, window_t
from pagealloc.core.mutex cimport mutex_init, mutex_lock, mutex_t, mutex_unlock
from pagealloc.core.os_memory cimport os_at_fork, os_protect_read_only, os_release

cdef mutex_t registry_mutex
cdef store_t *stores = NULL


cdef void before_fork() noexcept nogil:
    cdef store_t *store
    mutex_lock(&registry_mutex)
    store = stores
    while store != NULL:
        mutex_lock(&store.mutex)
        store = store.next


cdef void after_fork() noexcept nogil:
    cdef store_t *store = stores
    while store != NULL:
        mutex_unlock(&store.mutex)
        store = store.next
    mutex_unlock(&registry_mutex)


cdef void after_fork_in_child() noexcept nogil:
    """Keep the child from writing into its parent's memory.

    A window that the kernel refuses to protect is unmapped: a crash here is better than a
    silent change there.  Its address is forgotten, lest closing it unmaps what came to lie there.
    """
    cdef store_t *store = stores
    cdef window_t *window
    cdef size_t nbytes
    while store != NULL:
        window = store.windows
        while window != NULL:
            nbytes = <size_t>window.n_pages * store.page_bytes
            if not window.is_unmapped and os_protect_read_only(window.address, nbytes) != 0:
                os_release(window.address, nbytes)
                window.address = NULL
            window = window.next
        store = store.next
    after_fork()


cdef void registry_add(store_t *store) noexcept nogil:
    global stores
    mutex_lock(&registry_mutex)
    store.next = stores
    if stores != NULL:
        stores.previous = store
    stores = store
    mutex_unlock(&registry_mutex)


cdef void registry_remove(store_t *store) noexcept nogil:
    global stores
    mutex_lock(&registry_mutex)
    if store.previous != NULL:
        store.previous.next = store.next
    else:
        stores = store.next
    if store.next != NULL:
        store.next.previous = store.previous
    mutex_unlock(&registry_mutex)


mutex_init(&registry_mutex)
if os_at_fork(before_fork, after_fork, after_fork_in_child) != 0:
    raise MemoryError("pthread_atfork refused to register the fork handlers of extent stores")
