"""The way of one allocation, and of one free.

Purpose
    Hand out a block, and take one back, in one straight line of instructions.
Structure
    alloc(n) -> class: a shift, a load -> this thread's magazine: pop -> mark it as its own
             -> empty: heap_alloc_slow -> inbox, central list -> slab or page run -> the kernel
    free(p)  -> page map -> chunk -> class; its own, and live -> this thread's magazine: push
             -> else heap_free_slow: full -> central list; another thread's -> outbox
Invariants
    those of block_map about states; a block in a caller's hands is live
    the fast path touches the page map's tables, the magazine and the heap's head, and nothing else
Locking
    None on the fast path.  The slow one holds no lock while it calls another room.
Units
    Bytes; pages where named.
"""

from libc.errno cimport ENOMEM
from libc.stdint cimport int64_t, uint16_t, uint32_t

from pagealloc.core.arena cimport ERROR_BUDGET, ERROR_GROWTH, ERROR_RETRY
from pagealloc.core.atomics cimport (
    atomic_add_i64,
    atomic_load_i64,
    atomic_load_ptr,
    atomic_load_u16,
    atomic_store_u16,
    atomic_swap_u16,
)
from pagealloc.core.block_map cimport (
    FIRST_RUN_CLASS,
    LIKELY,
    STATE_FREE,
    STATE_SHARED,
    block_chunk,
    block_class,
    block_map_knows_near,
    block_state,
    is_live,
    known_block_state,
    mark_returning,
)
from pagealloc.core.central cimport central_give_back, central_put, central_take, run_key
from pagealloc.core.heap_caches cimport (
    heap_add_cache,
    heap_collect_if_due,
    heap_deliver,
    heap_idle_bytes,
    heap_reclaim,
    heap_return_block,
)
from pagealloc.core.heap_latency cimport heap_latency_group
from pagealloc.core.heap_life cimport heap_end_thread
from pagealloc.core.heap_state cimport (
    MAX_HEAPS,
    heap_come_near,
    heap_key_hint,
    heap_run_class,
    heap_t,
)
from pagealloc.core.latency cimport latency_now_ns, latency_record
from pagealloc.core.os_memory cimport os_abandon, os_numa_node, os_page_bytes, os_reserve
from pagealloc.core.page_heap cimport (
    FREED,
    NOT_LIVE,
    NOT_OURS,
    page_heap_alloc,
    page_heap_has_own_arena,
    page_heap_run_bytes,
)
from pagealloc.core.page_map cimport block_t, chunk_t
from pagealloc.core.page_run cimport run_t
from pagealloc.core.size_class cimport NO_CLASS, SLOT_UNIT_BYTES, size_class_aligned, size_class_of
from pagealloc.core.thread_cache cimport (
    OUTBOX_FULL,
    OUTBOX_REFUSED,
    UNCACHED_RUN,
    magazine_pop,
    magazine_push,
    thread_cache_free,
    thread_cache_is_timed,
    thread_cache_new,
    thread_cache_put,
    thread_cache_refill,
    thread_cache_return,
    thread_cache_t,
)

cdef extern from "poison.h" nogil:
    void poison "pagealloc_poison"(void *address, size_t nbytes)
    void unpoison "pagealloc_unpoison"(void *address, size_t nbytes)
    const bint HAS_POISON "PAGEALLOC_HAS_POISON"

cdef extern from * nogil:
    """
    static inline void pagealloc_pw(const void *p) { __asm__ volatile("prefetchw %0" :: "m"(*(const char*)p)); }
    """
    void prefetch "pagealloc_pw"(const void *address)

cdef enum:
    SLOW_PER_LOOK = 16      # slow paths between two looks at the clock

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


cdef size_t block_bytes(heap_t *heap, const char *address, size_t size_class) noexcept nogil:
    if size_class == UNCACHED_RUN:
        return page_heap_run_bytes(&heap.pages, address)
    return heap.centrals[size_class].block_bytes


# ---------------------------------------------------------------------------------------------
# alloc

cdef inline size_t class_of_usual(heap_t *heap, size_t nbytes) noexcept nogil:
    if nbytes <= heap.classes.largest_bytes:
        return size_class_of(&heap.classes, nbytes)
    return atomic_load_u16(
        &heap.class_of_pages[(nbytes + heap.blocks.page_mask) >> heap.blocks.page_shift]
    )


cdef inline char *pop(heap_t *heap, size_t size_class) noexcept nogil:
    """A block from this thread's magazine; NULL if that takes more than a few nanoseconds."""
    cdef cache_entry_t *entry = entry_of(heap)
    cdef char *address
    if not LIKELY(entry.generation == heap.generation):
        return NULL
    address = magazine_pop(entry.cache, size_class)
    if HAS_POISON and address != NULL:
        unpoison(address, block_bytes(heap, address, size_class))
    return address


cdef inline char *alloc_fast(heap_t *heap, size_t nbytes, size_t align_bytes) noexcept nogil:
    if LIKELY(align_bytes <= SLOT_UNIT_BYTES and nbytes <= heap.largest_table_bytes):
        return pop(heap, class_of_usual(heap, nbytes))
    return pop_unusual(heap, nbytes, align_bytes)


cdef char *pop_unusual(heap_t *heap, size_t nbytes, size_t align_bytes) noexcept nogil:
    return pop(heap, class_of_unusual(heap, nbytes, align_bytes))


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


cdef inline int64_t key_of(const heap_t *heap, size_t nbytes, size_t align_bytes) noexcept nogil:
    """The key of the runs that serve a request."""
    return run_key(
        <int64_t>(
            (nbytes >> heap.blocks.page_shift) + ((nbytes & heap.blocks.page_mask) != 0)
        ),
        align_bytes if align_bytes > heap.blocks.page_mask else heap.blocks.page_mask + 1
    )


cdef size_t class_of_unusual(heap_t *heap, size_t nbytes, size_t align_bytes) noexcept nogil:
    """The class of any request, also aligned to more than usual or too large for the table.

    0: not known yet.
    """
    cdef int64_t key
    cdef size_t size_class
    if align_bytes <= heap.blocks.page_mask + 1 and nbytes <= heap.largest_table_bytes:
        size_class = size_class_aligned(
            &heap.classes, nbytes, align_bytes if align_bytes > 0 else 1
        )
        return size_class if size_class != NO_CLASS else class_of_usual(
            heap, nbytes if nbytes > heap.blocks.page_mask else heap.blocks.page_mask + 1
        )
    key = key_of(heap, nbytes, align_bytes)
    size_class = atomic_load_u16(&heap.key_hints[heap_key_hint(key)])
    return size_class if atomic_load_i64(&heap.centrals[size_class].key) == key else 0


cdef char *heap_alloc_class(heap_t *heap, size_t size_class) noexcept nogil:
    """A block of a class of slots; NULL where it takes heap_alloc_slow, with that class."""
    return pop(heap, size_class)


cdef char *heap_alloc_slow(
    heap_t *heap, size_t nbytes, size_t align_bytes, size_t slot_class, bint *fresh, int *error
) noexcept nogil:
    """What alloc does when the magazine is empty, or when this allocation's time is to be taken.

    `slot_class` is a class of slots of exactly `nbytes`, or 0: the request's own.
    """
    cdef thread_cache_t *cache = cache_of(heap)
    cdef size_t size_class = slot_class
    cdef int64_t start_ns
    cdef char *address
    if size_class == 0:
        size_class = class_of_unusual(heap, nbytes, align_bytes)
    if cache == NULL or not thread_cache_is_timed(
        cache, size_class, atomic_load_i64(&heap.time_every)
    ):
        return alloc_untimed(heap, cache, size_class, nbytes, align_bytes, slot_class, fresh, error)
    start_ns = latency_now_ns()
    fresh[0] = False
    address = pop(heap, size_class)
    if address == NULL:
        address = alloc_untimed(
            heap, cache, size_class, nbytes, align_bytes, slot_class, fresh, error
        )
    latency_record(
        &heap.latency, heap_latency_group(heap, size_class), os_numa_node(),
        latency_now_ns() - start_ns
    )
    return address


cdef void note_slow(heap_t *heap, thread_cache_t *cache) noexcept nogil:
    """Every so often, look at the clock: a collection may be due."""
    if cache != NULL:
        cache.n_slow += 1
    if cache == NULL or cache.n_slow % SLOW_PER_LOOK == 0:
        heap_collect_if_due(heap)


cdef char *refill(
    heap_t *heap, thread_cache_t *cache, size_t size_class, int64_t key, bint may_grow, bint *fresh,
    int *error
) noexcept nogil:
    """A block of a class by way of this thread's cache."""
    cdef block_t block
    if not thread_cache_refill(
        cache, heap.centrals, &heap.blocks, size_class, key, may_grow, &block, fresh, error
    ):
        return NULL
    if HAS_POISON:
        unpoison(block.address, block_bytes(heap, block.address, size_class))
    return block.address


cdef char *alloc_untimed(
    heap_t *heap, thread_cache_t *cache, size_t size_class, size_t nbytes, size_t align_bytes,
    size_t slot_class, bint *fresh, int *error
) noexcept nogil:
    """From the inbox, the central list, the page heap, or the kernel.

    More is taken from the kernel only when less than that lies idle; and before a request is
    refused, all that is idle has been given up.
    """
    cdef int64_t key
    cdef char *address = NULL
    note_slow(heap, cache)
    error[0] = ERROR_RETRY
    if cache != NULL and size_class:
        key = 0 if size_class < FIRST_RUN_CLASS else key_of(heap, nbytes, align_bytes)
        address = refill(heap, cache, size_class, key, False, fresh, error)
    if address == NULL and error[0] == ERROR_RETRY:
        address = take(heap, nbytes, align_bytes, slot_class, False, fresh, error)
    if address == NULL and error[0] == ERROR_GROWTH:
        key = key_of(heap, nbytes, align_bytes)
        if heap_idle_bytes(heap) >= <int64_t>(
            nbytes if page_heap_has_own_arena(&heap.pages, key >> 6, <size_t>1 << (key & 63))
            else heap.pages.arena_bytes
        ):
            heap_reclaim(heap)
        address = take(heap, nbytes, align_bytes, slot_class, True, fresh, error)
    if address == NULL and (error[0] == ERROR_BUDGET or error[0] == ENOMEM):
        heap_reclaim(heap)
        address = take(heap, nbytes, align_bytes, slot_class, True, fresh, error)
    if address == NULL and error[0] == ERROR_BUDGET:
        # A run serves a small request as well, at the price of a page; a slab may cost sixteen.
        address = take_run(heap, key_of(heap, nbytes, align_bytes), True, fresh, error)
    if address == NULL:
        atomic_add_i64(&heap.n_failed, 1)
    elif not block_map_knows_near(&heap.blocks):
        heap_come_near(heap, address)
    return address


cdef char *take(
    heap_t *heap, size_t nbytes, size_t align_bytes, size_t slot_class, bint may_grow,
    bint *fresh, int *error
) noexcept nogil:
    if slot_class == 0 and align_bytes <= heap.blocks.page_mask:
        slot_class = size_class_aligned(
            &heap.classes, nbytes, align_bytes if align_bytes > 0 else 1
        )
    if slot_class == NO_CLASS:
        return take_run(heap, key_of(heap, nbytes, align_bytes), may_grow, fresh, error)
    return take_block(heap, slot_class, 0, may_grow, fresh, error)


cdef char *take_run(
    heap_t *heap, int64_t key, bint may_grow, bint *fresh, int *error
) noexcept nogil:
    cdef size_t size_class
    cdef char *address = NULL
    error[0] = ERROR_RETRY
    while address == NULL and error[0] == ERROR_RETRY:
        size_class = heap_run_class(heap, key)
        if size_class == UNCACHED_RUN:
            return take_uncached(heap, key, may_grow, fresh, error)
        address = take_block(heap, size_class, key, may_grow, fresh, error)
    return address


cdef char *take_block(
    heap_t *heap, size_t size_class, int64_t key, bint may_grow, bint *fresh, int *error
) noexcept nogil:
    """A block of a class, through this thread's cache if it can have one."""
    cdef thread_cache_t *cache = cache_of(heap)
    cdef block_t block
    if cache == NULL:
        cache = new_cache(heap)
    if cache != NULL:
        return refill(heap, cache, size_class, key, may_grow, fresh, error)
    if not central_take(&heap.centrals[size_class], key, &block, 1, may_grow, fresh, error):
        return NULL
    atomic_add_i64(&heap.retired_allocs[size_class], 1)
    return hand_out(heap, block, size_class)


cdef char *hand_out(heap_t *heap, block_t block, size_t size_class) noexcept nogil:
    """Mark a free block that nobody else has as live, and nobody's in particular."""
    if HAS_POISON:
        unpoison(block.address, block_bytes(heap, block.address, size_class))
    atomic_store_u16(block.state, STATE_SHARED)
    return block.address


cdef char *take_uncached(
    heap_t *heap, int64_t key, bint may_grow, bint *fresh, int *error
) noexcept nogil:
    """A run straight from the page heap, for a size that found no class."""
    cdef run_t *run = page_heap_alloc(
        &heap.pages, key >> 6, <size_t>1 << (key & 63), UNCACHED_RUN, NULL, may_grow, fresh, error
    )
    cdef block_t block
    if run == NULL:
        return NULL
    atomic_add_i64(&heap.centrals[UNCACHED_RUN].n_out, 1)
    atomic_add_i64(&heap.retired_allocs[UNCACHED_RUN], 1)
    block.address = run.address
    block.state = known_block_state(&heap.blocks, run.address, UNCACHED_RUN)
    return hand_out(heap, block, UNCACHED_RUN)


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
        poison(address, block_bytes(heap, address, size_class))
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
    size_class = block_class(&heap.blocks, chunk, address)
    block.address = address
    block.state = block_state(&heap.blocks, chunk, address, size_class)
    if block.state == NULL or size_class == 0:
        return NOT_OURS
    if cache == NULL:
        cache = new_cache(heap)
    live = atomic_load_u16(block.state)
    if HAS_POISON and is_live(live):
        poison(address, block_bytes(heap, address, size_class))
    while is_live(live):
        if take_back(heap, cache, block, size_class, live):
            note_slow(heap, cache)
            return FREED
        live = atomic_load_u16(block.state)     # another thread was faster
    return NOT_LIVE


cdef bint take_back(
    heap_t *heap, thread_cache_t *cache, block_t block, size_t size_class, uint16_t live
) noexcept nogil:
    """Free a block whose state is `live`; False if it is that no longer.  `cache` may be NULL."""
    cdef int outcome
    if live == STATE_SHARED:
        if not atomic_swap_u16(block.state, live, STATE_FREE):
            return False
        if size_class == UNCACHED_RUN:
            central_give_back(&heap.centrals[UNCACHED_RUN], &block, 1)
        elif cache == NULL:
            central_put(&heap.centrals[size_class], &block, 1)
        else:
            thread_cache_put(cache, &heap.centrals[size_class], block)
        return True
    if cache == NULL:
        mark_returning(block.state)
        heap_return_block(heap, block, live)
        return True
    if live == cache.own_state:
        return thread_cache_free(cache, &heap.centrals[size_class], block)
    outcome = thread_cache_return(cache, &heap.centrals[size_class], block, live)
    if outcome == OUTBOX_FULL:
        heap_deliver(heap, cache)
    return outcome != OUTBOX_REFUSED


# ---------------------------------------------------------------------------------------------
# The same for callers who may pass anything

cdef void *heap_alloc_checked(heap_t *heap, size_t nbytes, size_t align_bytes) noexcept nogil:
    """As heap_alloc; NULL for what is refused, or is no request."""
    cdef char *address = NULL
    if LIKELY(heap != NULL and align_bytes == 0 and nbytes <= heap.largest_table_bytes):
        address = pop(heap, class_of_usual(heap, nbytes))   # of class 0, if nbytes is 0: NULL
    if LIKELY(address != NULL):
        return address
    return alloc_checked_slow(heap, nbytes, align_bytes)


cdef void *alloc_checked_slow(heap_t *heap, size_t nbytes, size_t align_bytes) noexcept nogil:
    cdef bint fresh
    cdef int error
    if (
        heap == NULL or nbytes == 0 or nbytes > MAX_NBYTES
        or align_bytes & (align_bytes - 1) or align_bytes > MAX_ALIGN_BYTES
    ):
        return NULL
    return heap_alloc(heap, nbytes, align_bytes, &fresh, &error)


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
            heap_free_many(heap, addresses, i)
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
    size_class = block_class(&heap.blocks, chunk, address)
    state = block_state(&heap.blocks, chunk, address, size_class)
    if state == NULL or not is_live(atomic_load_u16(state)):
        return 0
    return block_bytes(heap, address, size_class)


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
