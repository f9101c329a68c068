"""The way of one allocation, and of one free.

Purpose
    Hand out a block, and take one back, in one straight line of instructions.
Structure
    alloc(n) -> class: a shift, a load -> this thread's magazine: pop -> mark it as its own
             -> empty: heap_alloc_slow -> heap_slow
    free(p)  -> page map -> chunk -> class; its own, and live -> this thread's magazine: push
             -> another thread's: outbox; full, nobody's: heap_free_slow -> heap_slow
Invariants
    those of block_map about states; a block in a caller's hands is live
    the fast path touches the page map's tables, the magazine and the heap's head, and nothing else
Locking
    None on the fast path.  The slow one holds no lock while it calls another room.
Units
    Bytes; pages where named.
"""

from libc.stdint cimport int64_t, uint16_t, uint32_t
from libc.string cimport memset

from pagealloc.core.atomics cimport atomic_load_i64, atomic_load_ptr, atomic_load_u16
from pagealloc.core.block_map cimport LIKELY, block_chunk, block_class, block_state, is_live
from pagealloc.core.guard cimport guarded_bytes, guarded_free
from pagealloc.core.heap_caches cimport heap_add_cache, heap_trim
from pagealloc.core.heap_latency cimport heap_latency_group
from pagealloc.core.heap_life cimport heap_end_thread
from pagealloc.core.heap_slow cimport heap_note_slow, heap_supply, heap_take_back
from pagealloc.core.heap_state cimport (
    MAX_HEAPS,
    heap_block_bytes,
    heap_class_of,
    heap_class_of_unusual,
    heap_t,
)
from pagealloc.core.latency cimport latency_now_ns, latency_record
from pagealloc.core.os_memory cimport os_abandon, os_numa_node, os_page_bytes, os_reserve
from pagealloc.core.page_heap cimport FREED, NOT_LIVE, NOT_OURS
from pagealloc.core.page_map cimport block_t, chunk_t
from pagealloc.core.purger cimport purger_watch
from pagealloc.core.size_class cimport SLOT_UNIT_BYTES
from pagealloc.core.thread_cache cimport (
    magazine_pop,
    magazine_push,
    thread_cache_is_timed,
    thread_cache_new,
    thread_cache_t,
)

cdef extern from "poison.h" nogil:
    void poison "pagealloc_poison"(void *address, size_t nbytes)
    void unpoison "pagealloc_unpoison"(void *address, size_t nbytes)
    const bint HAS_POISON "PAGEALLOC_HAS_POISON"

cdef struct cache_entry_t:
    int64_t generation      # of the heap the cache is for; 0: none
    thread_cache_t *cache

cdef struct thread_t:                       # page-aligned: as in thread_cache_t, a cold line first
    void *unused[8]
    cache_entry_t entries[MAX_HEAPS + 1]    # by heap id; the last one stays empty

cdef extern from * nogil:
    """
    #define PAGEALLOC_MAX_NBYTES ((size_t)1 << 47)      /* as pagealloc.units has it */
    #define PAGEALLOC_MAX_ALIGN_BYTES ((size_t)1 << 30)
    """
    const size_t MAX_NBYTES "PAGEALLOC_MAX_NBYTES"
    const size_t MAX_ALIGN_BYTES "PAGEALLOC_MAX_ALIGN_BYTES"

cdef extern from "<pthread.h>" nogil:
    ctypedef unsigned int pthread_key_t
    int pthread_key_create(pthread_key_t *key, void (*destructor)(void *) noexcept nogil)
    int pthread_setspecific(pthread_key_t key, const void *value)

cdef extern from * nogil:
    """
    /* One pointer a thread, in this module and no other.  It is never NULL: a thread that has no
     * caches yet has the empty table, so that the fast path need not ask. */
    #if defined(__GLIBC__)
    #define PAGEALLOC_TLS __attribute__((tls_model("initial-exec")))
    #else
    #define PAGEALLOC_TLS
    #endif
    static char pagealloc_no_thread[64 + (1024 + 1) * 16] __attribute__((aligned(16)));
    static __thread void *pagealloc_thread PAGEALLOC_TLS = pagealloc_no_thread;
    static inline void pagealloc_set_thread(void *thread) { pagealloc_thread = thread; }
    """
    void *this_thread "pagealloc_thread"
    void set_this_thread "pagealloc_set_thread"(void *thread)
    char *NO_THREAD "pagealloc_no_thread"

cdef pthread_key_t thread_key


cdef inline cache_entry_t *entry_of(const heap_t *heap) noexcept nogil:
    """This thread's place for its cache of the heap."""
    return &(<thread_t *>this_thread).entries[heap.id]


cdef inline thread_cache_t *cache_of(const heap_t *heap) noexcept nogil:
    """This thread's cache for the heap; NULL if it has none yet."""
    cdef cache_entry_t *entry = entry_of(heap)
    return entry.cache if entry.generation == heap.generation else NULL


# ---------------------------------------------------------------------------------------------
# alloc

cdef inline char *pop(heap_t *heap, size_t size_class) noexcept nogil:
    """A block from this thread's magazine; NULL if that takes more than a few nanoseconds."""
    cdef cache_entry_t *entry = entry_of(heap)
    cdef char *address
    if not LIKELY(entry.generation == heap.generation):
        return NULL
    address = magazine_pop(entry.cache, size_class)
    if HAS_POISON and address != NULL:
        unpoison(address, heap_block_bytes(heap, address, size_class))
    return address


cdef inline char *alloc_fast(heap_t *heap, size_t nbytes, size_t align_bytes) noexcept nogil:
    if LIKELY(align_bytes <= SLOT_UNIT_BYTES and nbytes <= heap.largest_fast_bytes):
        return pop(heap, heap_class_of(heap, nbytes))
    return pop_unusual(heap, nbytes, align_bytes)


cdef char *pop_unusual(heap_t *heap, size_t nbytes, size_t align_bytes) noexcept nogil:
    return zeroed(heap, pop(heap, heap_class_of_unusual(heap, nbytes, align_bytes)), nbytes)


cdef inline char *zeroed(heap_t *heap, char *address, size_t nbytes) noexcept nogil:
    """The block, zeroed if that is what the heap does with memory that was in use before."""
    if heap.zero_on_reuse and address != NULL:
        memset(address, 0, nbytes)
    return address


cdef char *heap_alloc_fast(heap_t *heap, size_t nbytes, size_t align_bytes) noexcept nogil:
    """Memory of `nbytes`, aligned to `align_bytes` (a power of two; 0: the default).

    NULL where it takes heap_alloc_slow, also for what no allocation can serve.  It is never fresh.
    """
    return alloc_fast(heap, nbytes, align_bytes)


cdef char *heap_alloc(
    heap_t *heap, size_t nbytes, size_t align_bytes, bint *fresh, int *error
) noexcept nogil:
    """Memory of `nbytes`, at least 1, aligned to `align_bytes` (a power of two; 0: the default).

    `fresh` tells that it is zero.  NULL with an errno value or a code in `error` if refused.
    """
    cdef char *address = alloc_fast(heap, nbytes, align_bytes)
    fresh[0] = False
    if LIKELY(address != NULL):
        return address
    return heap_alloc_slow(heap, nbytes, align_bytes, 0, fresh, error)


cdef char *heap_alloc_class(heap_t *heap, size_t size_class) noexcept nogil:
    """A block of a class of slots; NULL where it takes heap_alloc_slow, with that class."""
    return zeroed(heap, pop(heap, size_class), heap.blocks.slots[size_class].nbytes)


cdef char *heap_alloc_slow(
    heap_t *heap, size_t nbytes, size_t align_bytes, size_t slot_class, bint *fresh, int *error
) noexcept nogil:
    """What alloc does when the magazine is empty, or when this allocation's time is to be taken.

    `slot_class` is a class of slots of exactly `nbytes`, or 0: the request's own.
    """
    cdef thread_cache_t *cache = cache_of(heap)
    cdef size_t size_class = slot_class
    cdef char *address
    if size_class == 0:
        size_class = heap_class_of_unusual(heap, nbytes, align_bytes)
    if cache == NULL:
        cache = new_cache(heap)
    if cache == NULL or not thread_cache_is_timed(cache, size_class, &heap.time_every):
        address = heap_supply(
            heap, cache, size_class, nbytes, align_bytes, slot_class, fresh, error
        )
        if heap.purge_after_ns and not atomic_load_i64(&heap.is_watched):
            purger_watch(heap)      # after it has grown: the purger lets go of what is empty
    else:
        address = alloc_timed(
            heap, cache, size_class, nbytes, align_bytes, slot_class, fresh, error
        )
    return address if fresh[0] else zeroed(heap, address, nbytes)


cdef char *alloc_timed(
    heap_t *heap, thread_cache_t *cache, size_t size_class, size_t nbytes, size_t align_bytes,
    size_t slot_class, bint *fresh, int *error
) noexcept nogil:
    cdef int64_t start_ns = latency_now_ns()
    cdef char *address = pop(heap, size_class)
    fresh[0] = False
    if address == NULL:
        address = heap_supply(
            heap, cache, size_class, nbytes, align_bytes, slot_class, fresh, error
        )
    latency_record(
        &heap.latency, heap_latency_group(heap, size_class), os_numa_node(),
        latency_now_ns() - start_ns
    )
    return address


# ---------------------------------------------------------------------------------------------
# free

cdef inline bint free_fast(heap_t *heap, char *address) noexcept nogil:
    cdef cache_entry_t *entry = entry_of(heap)
    cdef chunk_t *chunk = block_chunk(&heap.blocks, address)
    cdef size_t size_class
    cdef uint16_t *state
    if not LIKELY(
        chunk != NULL and atomic_load_ptr(&chunk.owner) == heap
        and entry.generation == heap.generation
    ):
        return False
    size_class = block_class(&heap.blocks, chunk, address)
    state = block_state(&heap.blocks, chunk, address, size_class)
    if not LIKELY(state != NULL):
        return False
    if HAS_POISON and is_live(atomic_load_u16(state)):
        poison(address, heap_block_bytes(heap, address, size_class))
    return magazine_push(entry.cache, size_class, state, address)


cdef bint heap_free_fast(heap_t *heap, char *address) noexcept nogil:
    """Free a block, if that takes a few nanoseconds; False where it takes heap_free_slow."""
    return free_fast(heap, address)


cdef int heap_free(heap_t *heap, char *address) noexcept nogil:
    """Take back what heap_alloc gave: FREED, or NOT_OURS / NOT_LIVE and nothing changed."""
    if LIKELY(free_fast(heap, address)):
        return FREED
    return heap_free_slow(heap, address)


cdef int heap_free_slow(heap_t *heap, char *address) noexcept nogil:
    """As heap_free, for a full magazine, another thread's block, and what is none."""
    cdef thread_cache_t *cache = cache_of(heap)
    cdef chunk_t *chunk = block_chunk(&heap.blocks, address)
    cdef size_t size_class
    cdef block_t block
    cdef uint16_t live
    if chunk == NULL or atomic_load_ptr(&chunk.owner) != heap:
        return NOT_OURS
    if heap.guard:
        return guarded_free(heap, address)
    size_class = block_class(&heap.blocks, chunk, address)
    block.address = address
    block.state = block_state(&heap.blocks, chunk, address, size_class)
    if block.state == NULL or size_class == 0:
        return NOT_OURS
    if cache == NULL:
        cache = new_cache(heap)
    live = atomic_load_u16(block.state)
    if HAS_POISON and is_live(live):
        poison(address, heap_block_bytes(heap, address, size_class))
    while is_live(live):
        if heap_take_back(heap, cache, block, size_class, live):
            heap_note_slow(heap, cache)
            return FREED
        live = atomic_load_u16(block.state)     # another thread was faster
    return NOT_LIVE


# ---------------------------------------------------------------------------------------------
# The same for callers who may pass anything

cdef extern from * nogil:
    """
    /* Compiled into its caller, it would burden that one with a stack protector for its variables,
     * where compilers add one by themselves, as Debian's Python has them do. */
    static void *pagealloc_alloc_checked_slow(void *heap, size_t nbytes, size_t align_bytes)
        __attribute__((noinline));
    """

cdef void *heap_alloc_checked(heap_t *heap, size_t nbytes, size_t align_bytes) noexcept nogil:
    """As heap_alloc; NULL for what is refused, or is no request."""
    cdef char *address = NULL
    if LIKELY(heap != NULL and align_bytes == 0 and nbytes <= heap.largest_fast_bytes):
        address = pop(heap, heap_class_of(heap, nbytes))   # of class 0, if nbytes is 0: NULL
    if LIKELY(address != NULL):
        return address
    return alloc_checked_slow(heap, nbytes, align_bytes)


cdef void *alloc_checked_slow "pagealloc_alloc_checked_slow"(
    void *heap, size_t nbytes, size_t align_bytes
) noexcept nogil:
    cdef bint fresh
    cdef int error
    if (
        heap == NULL or nbytes == 0 or nbytes > MAX_NBYTES
        or align_bytes & (align_bytes - 1) or align_bytes > MAX_ALIGN_BYTES
    ):
        return NULL
    return heap_alloc(<heap_t *>heap, nbytes, align_bytes, &fresh, &error)


cdef int heap_free_checked(heap_t *heap, void *address) noexcept nogil:
    if LIKELY(heap != NULL and free_fast(heap, <char *>address)):
        return FREED
    return NOT_OURS if heap == NULL else heap_free_slow(heap, <char *>address)


# ---------------------------------------------------------------------------------------------
# Many at a time, and what one holds

cdef int heap_alloc_many(
    heap_t *heap, size_t nbytes, size_t align_bytes, size_t n, char **addresses, int *error
) noexcept nogil:
    """Fill `addresses` with `n` blocks: 0, or -1 with a code in `error` and none allocated."""
    cdef bint fresh
    cdef size_t i
    for i in range(n):
        addresses[i] = heap_alloc(heap, nbytes, align_bytes, &fresh, error)
        if not LIKELY(addresses[i] != NULL):
            if i:
                heap_free_many(heap, addresses, i)
                heap_trim(heap)     # it has all that the heap may have: back to the kernel
            return -1
    return 0


cdef size_t heap_free_many(heap_t *heap, char *const *addresses, size_t n) noexcept nogil:
    """Take back `n` blocks: how many were live and are freed now; the others are left alone."""
    cdef size_t i, n_freed = 0
    for i in range(n):
        n_freed += heap_free(heap, addresses[i]) == FREED
    return n_freed


cdef size_t heap_usable_bytes(heap_t *heap, const char *address) noexcept nogil:
    """The length of the live block that starts at `address`; 0: there is none."""
    cdef chunk_t *chunk = block_chunk(&heap.blocks, address)
    cdef uint16_t *state
    cdef size_t size_class
    if chunk == NULL or atomic_load_ptr(&chunk.owner) != heap:
        return 0
    if heap.guard:
        return guarded_bytes(heap, address)
    size_class = block_class(&heap.blocks, chunk, address)
    state = block_state(&heap.blocks, chunk, address, size_class)
    if state == NULL or not is_live(atomic_load_u16(state)):
        return 0
    return heap_block_bytes(heap, address, size_class)


# ---------------------------------------------------------------------------------------------
# This thread's table of caches

cdef thread_cache_t *new_cache(heap_t *heap) noexcept nogil:
    """This thread's first cache for the heap; NULL if there is no memory or no place for it."""
    cdef size_t table_bytes = whole_pages(sizeof(thread_t))
    cdef thread_t *thread = <thread_t *>this_thread
    cdef thread_cache_t *cache
    if heap.id == MAX_HEAPS:
        return NULL
    if <char *>thread == NO_THREAD:
        thread = <thread_t *>os_reserve(table_bytes, os_page_bytes())
        if thread == NULL:
            return NULL
        if pthread_setspecific(thread_key, thread) != 0:
            os_abandon(thread, table_bytes)
            return NULL
        set_this_thread(thread)
    cache = thread_cache_new()
    if cache == NULL:
        return NULL
    heap_add_cache(heap, cache)
    thread.entries[heap.id].cache = cache
    thread.entries[heap.id].generation = heap.generation
    return cache


cdef inline size_t whole_pages(size_t nbytes) noexcept nogil:
    return (nbytes + os_page_bytes() - 1) // os_page_bytes() * os_page_bytes()


cdef void end_thread(void *value) noexcept nogil:
    """At a thread's end: retire its caches.  What it allocates after that gets new ones."""
    cdef thread_t *thread = <thread_t *>value
    cdef uint32_t i
    set_this_thread(NO_THREAD)
    for i in range(MAX_HEAPS):
        if thread.entries[i].generation:
            heap_end_thread(i, thread.entries[i].generation, thread.entries[i].cache)
    os_abandon(thread, whole_pages(sizeof(thread_t)))


if pthread_key_create(&thread_key, end_thread) != 0:
    raise MemoryError("pthread_key_create refused to register the end of pagealloc's threads")
