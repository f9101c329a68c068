"""A thread's magazines and boxes: what happens when they are empty or full.

Purpose
    Let a thread allocate and free without meeting any other thread.
Structure
    magazines   [b0 b1 b2 ... ]  one a size class; pop and push at the end
                refilled with up to half a magazine from the central list, or from the inbox;
                when full, the coldest half goes to the central list
    outbox      blocks that this thread freed and others allocated, on their way to them
    inbox       blocks that others freed and this thread allocated
Invariants
    blocks <= top <= limit <= blocks + MAGAZINE_SLOTS, or both NULL: no room yet
    (limit - blocks) * block_bytes <= MAGAZINE_MAX_BYTES
    a block is in at most one magazine, in state FREE; in a box it is marked as returning, unless
    two threads freed it in the same instant: then its box entry is dropped when it is looked at
    a bit of `used` is set iff the magazine has, or had, a limit
Locking
    The owner enters by `lock`; others seize it.  Under it the inbox's mutex may be taken, or that
    of a central list; no two caches' locks at a time.  A block moves from one place to another
    under some lock that fork() takes.
Units
    Blocks.
"""

from libc.stdint cimport INT64_MAX, int64_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memmove

from pagealloc.core.atomics cimport (
    atomic_add_i64,
    atomic_bump_i64,
    atomic_load_i64,
    atomic_load_u16,
    atomic_load_u32,
    atomic_store_i64,
    atomic_store_ptr,
    atomic_store_u16,
    atomic_store_u32,
    atomic_swap_u16,
)
from pagealloc.core.block_map cimport (
    LIKELY,
    STATE_FREE,
    STATE_MARK,
    STATE_SHARED,
    block_chunk,
    block_class,
    block_map_t,
)
from pagealloc.core.central cimport central_put, central_t, central_take
from pagealloc.core.mutex cimport mutex_destroy, mutex_init, mutex_lock, mutex_unlock
from pagealloc.core.os_memory cimport (
    MADV_NOHUGEPAGE,
    os_abandon,
    os_advise,
    os_page_bytes,
    os_reserve,
)
from pagealloc.core.page_map cimport block_t
from pagealloc.core.owner_lock cimport owner_enter_surely, owner_leave_surely, owner_lock_init

cdef extern from * nogil:
    void prefetch "__builtin_prefetch"(const void *address, int for_writing)

cdef int64_t n_conflicts = 0    # blocks found to have been freed twice in one instant; atomic


cdef inline size_t cache_bytes() noexcept nogil:
    return (sizeof(thread_cache_t) + os_page_bytes() - 1) // os_page_bytes() * os_page_bytes()


cdef thread_cache_t *thread_cache_new() noexcept nogil:
    """A cache with no block in it; NULL if the kernel has no memory for it."""
    # Mapped: of a MiB and more, only the magazines in use are ever touched.
    cdef thread_cache_t *cache = <thread_cache_t *>os_reserve(cache_bytes(), os_page_bytes())
    if cache == NULL:
        return NULL
    os_advise(cache, cache_bytes(), MADV_NOHUGEPAGE)    # refused: no harm but memory
    owner_lock_init(&cache.lock)
    mutex_init(&cache.inbox.mutex)
    cache.thread = pthread_self()
    cache.random = 2463534242
    return cache


cdef void thread_cache_delete(thread_cache_t *cache) noexcept nogil:
    """Unmap an empty cache that nobody can reach any more."""
    mutex_destroy(&cache.inbox.mutex)
    mutex_destroy(&cache.lock.mutex)
    os_abandon(cache, cache_bytes())


# ---------------------------------------------------------------------------------------------
# Magazines, by whoever holds the mutex

cdef void open_magazine(
    thread_cache_t *cache, magazine_t *magazine, const central_t *central
) noexcept nogil:
    """Give an empty magazine room for blocks of a class; none if they are too large for any."""
    cdef size_t capacity = MAGAZINE_MAX_BYTES // central.block_bytes
    cdef int64_t *used = &cache.used[central.size_class // 64]
    magazine.limit = magazine.blocks + (capacity if capacity < MAGAZINE_SLOTS else MAGAZINE_SLOTS)
    magazine_set_n(magazine, 0)
    atomic_store_i64(used, used[0] | <int64_t>(<uint64_t>1 << (central.size_class % 64)))


cdef inline void put(
    thread_cache_t *cache, central_t *central, size_t size_class, block_t block
) noexcept nogil:
    """Put a free block into its magazine; if that is full, its coldest half goes to the list."""
    cdef magazine_t *magazine = &cache.magazines[size_class]
    cdef block_t *top = magazine.top
    if LIKELY(top < magazine.limit):
        top[0] = block
        atomic_store_ptr(<void **>&magazine.top, top + 1)
    else:
        put_slow(cache, central, magazine, block)


cdef void put_slow(
    thread_cache_t *cache, central_t *central, magazine_t *magazine, block_t block
) noexcept nogil:
    cdef int64_t n, n_spilled
    if magazine.limit == NULL:
        open_magazine(cache, magazine, central)
    n = magazine_n(magazine)
    if n and magazine.top == magazine.limit:
        n_spilled = n // 2 + 1
        central_put(central, magazine.blocks, n_spilled)
        n -= n_spilled
        memmove(magazine.blocks, magazine.blocks + n_spilled, <size_t>n * sizeof(block_t))
        magazine_set_n(magazine, n)
    if magazine.top < magazine.limit:
        magazine.top[0] = block
        magazine_set_n(magazine, n + 1)
    else:                               # larger than any magazine
        central_put(central, &block, 1)


cdef uint32_t take_from_inbox(
    inbox_t *inbox, block_t *blocks, uint32_t n
) noexcept nogil:
    """Take up to `n` of the newest, and have their states fetched; how many."""
    cdef uint32_t i, n_left
    mutex_lock(&inbox.mutex)
    if n > inbox.n:
        n = inbox.n
    n_left = inbox.n - n
    memcpy(blocks, inbox.blocks + n_left, n * sizeof(block_t))
    atomic_store_u32(&inbox.n, n_left)
    mutex_unlock(&inbox.mutex)
    for i in range(n):
        prefetch(blocks[i].state, 1)    # written by another core last
    return n


cdef bint thread_cache_settle(
    thread_cache_t *cache, central_t *centrals, block_map_t *map, int64_t n, bint into_magazines
) noexcept nogil:
    """Make up to `n` blocks free that others freed: into the magazines, or to the central lists.

    True if there were any.  Inside the owner's lock, by itself or seized: what is returned must not
    be freed by the owner at the same time.
    """
    cdef block_t blocks[MAGAZINE_SLOTS]
    cdef uint32_t i, n_taken = take_from_inbox(&cache.inbox, blocks, <uint32_t>n)
    cdef size_t size_class
    for i in range(n_taken):
        if atomic_load_u16(blocks[i].state) != (cache.tag | STATE_MARK):
            thread_cache_note_conflict()    # freed twice, and the other free had it
            continue
        atomic_store_u16(blocks[i].state, STATE_FREE)
        size_class = block_class(map, block_chunk(map, blocks[i].address), blocks[i].address)
        if into_magazines:
            put(cache, &centrals[size_class], size_class, blocks[i])
        else:
            central_put(&centrals[size_class], &blocks[i], 1)
    return n_taken > 0


# ---------------------------------------------------------------------------------------------
# By the owner, when the few instructions of a pop or push do not do

cdef bint thread_cache_refill(
    thread_cache_t *cache, central_t *centrals, block_map_t *map, size_t size_class, int64_t key,
    bint may_grow, block_t *block, bint *fresh, int *error
) noexcept nogil:
    """A live block of the class that is `key`, and more for the magazine if they are at hand.

    False with a code in `error`, as central_take.
    """
    cdef central_t *central = &centrals[size_class]
    cdef magazine_t *magazine = &cache.magazines[size_class]
    cdef int64_t n, capacity
    cdef bint by_flag
    fresh[0] = False
    error[0] = 0
    by_flag = owner_enter_surely(&cache.lock)
    capacity = magazine.limit - magazine.blocks if magazine.limit != NULL else 0
    n = magazine_n(magazine)
    if n == 0 and atomic_load_u32(&cache.inbox.n):
        thread_cache_settle(
            cache, centrals, map, capacity if capacity > 0 else MAGAZINE_SLOTS, True
        )
        n = magazine_n(magazine)
    if n == 0:
        n = central_take(
            central, key, magazine.blocks, capacity // 2 + 1, may_grow, fresh, error
        )
        if n and magazine.limit == NULL:
            open_magazine(cache, magazine, central)
    if n:
        block[0] = magazine.blocks[n - 1]
        atomic_store_u16(block.state, cache.tag)
        magazine_set_n(magazine, n - 1)
        atomic_bump_i64(&magazine.n_allocs)
    owner_leave_surely(&cache.lock, by_flag)
    return n > 0


cdef int64_t thread_cache_next_timed(
    thread_cache_t *cache, int64_t n_allocs, int64_t every
) noexcept nogil:
    """When to take the time next: after `every` allocations on average, at no regular distance."""
    if every == 0:
        return INT64_MAX
    cache.random ^= cache.random << 13
    cache.random ^= cache.random >> 17
    cache.random ^= cache.random << 5
    return n_allocs + 1 + cache.random % (2 * every)


cdef bint thread_cache_is_timed(
    thread_cache_t *cache, size_t size_class, const int64_t *every
) noexcept nogil:
    """True if the time of the allocation that comes now is to be taken; sets when the next is.

    `every` as for collector_time_every, which finds no magazine that was never used.
    """
    cdef magazine_t *magazine = &cache.magazines[size_class]
    cdef int64_t due = magazine.next_timed
    if magazine.n_allocs + 1 < due or magazine.limit == NULL:
        return False
    mutex_lock(&cache.lock.mutex)       # read under it: who changes it comes here next
    magazine.next_timed = thread_cache_next_timed(cache, magazine.n_allocs, atomic_load_i64(every))
    mutex_unlock(&cache.lock.mutex)
    return due > 0      # 0: the first one ever, which is like no other


cdef bint thread_cache_free(
    thread_cache_t *cache, central_t *central, block_t block
) noexcept nogil:
    """Free a block the owner had allocated; False if it is not live, or not the owner's."""
    cdef bint by_flag = owner_enter_surely(&cache.lock)
    cdef bint is_own = atomic_load_u16(block.state) == cache.own_state
    if is_own:
        atomic_store_u16(block.state, STATE_FREE)
        put(cache, central, central.size_class, block)
    owner_leave_surely(&cache.lock, by_flag)
    return is_own


cdef bint thread_cache_free_shared(
    thread_cache_t *cache, central_t *central, block_t block
) noexcept nogil:
    """Free a block that is no thread's in particular; False if another thread was faster."""
    cdef bint by_flag = owner_enter_surely(&cache.lock)     # before: for a fork it is live or here
    cdef bint is_freed = atomic_swap_u16(block.state, STATE_SHARED, STATE_FREE)
    if is_freed:
        put(cache, central, central.size_class, block)
    owner_leave_surely(&cache.lock, by_flag)
    return is_freed


cdef int thread_cache_return(
    thread_cache_t *cache, central_t *central, block_t block, uint16_t tag
) noexcept nogil:
    """Free another cache's block into the outbox.

    OUTBOX_REFUSED if it is not live with that tag any more; OUTBOX_FULL if it wants delivery now.
    """
    cdef magazine_t *magazine = &cache.magazines[central.size_class]
    cdef int outcome = OUTBOX_REFUSED
    cdef bint by_flag = owner_enter_surely(&cache.lock)
    if magazine.limit == NULL:
        open_magazine(cache, magazine, central)
    if atomic_load_u16(block.state) == tag:
        outbox_add(cache, block.address, block.state, <uint8_t>tag)
        # Boxes are bounded in bytes as magazines are: large blocks are wanted back soon.
        outcome = (
            OUTBOX_FULL if magazine.blocks + cache.outbox.n >= magazine.limit else OUTBOX_TAKEN
        )
    owner_leave_surely(&cache.lock, by_flag)
    return outcome


cdef void thread_cache_note_conflict() noexcept nogil:
    """A block that somebody freed, and was told so, turns out to have been freed already."""
    atomic_add_i64(&n_conflicts, 1)


cdef int64_t thread_cache_n_conflicts() noexcept nogil:
    """Blocks of any heap that two threads freed in one instant: a defect of the program's."""
    return atomic_load_i64(&n_conflicts)
