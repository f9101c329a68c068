"""A thread's magazines: what happens when one is empty, full, or unused.

Purpose
    Let a thread allocate and free without meeting any other thread; see to it that what it does not
    use finds its way back.
Structure
    thread --> cache of heap 1 --> magazine of class 1: [b0 b1 b2 ... ]   pop and push at the end
           |                       magazine of class 2: [ ]
           --> cache of heap 2 ...
    refill: up to half a magazine from the central list; spill: the same, the coldest, back to it
Invariants
    0 <= n <= capacity <= MAGAZINE_SLOTS; capacity * block_bytes <= MAGAZINE_MAX_BYTES
    a block is in at most one magazine; its state in the page map says that it is free
    a bit of `used` is set iff the magazine's capacity is, or was, above 0
Locking
    The owner enters by `lock` alone.  Refilling, spilling, and everyone else hold its mutex, under
    which the central list's may be taken.
Units
    Blocks.
"""

from libc.stdint cimport int64_t, uint16_t, uint64_t
from libc.string cimport memcpy, memmove

from pagealloc.core.atomics cimport (
    atomic_bump_i64,
    atomic_load_i64,
    atomic_load_u16,
    atomic_store_i64,
    atomic_store_u16,
)
from pagealloc.core.central cimport (
    central_give_back,
    central_put,
    central_t,
    central_take,
    count_trailing_zeros,
)
from pagealloc.core.mutex cimport mutex_destroy, mutex_lock, mutex_unlock
from pagealloc.core.os_memory cimport (
    MADV_NOHUGEPAGE,
    os_abandon,
    os_advise,
    os_page_bytes,
    os_reserve,
)
from pagealloc.core.owner_lock cimport owner_lock_init, owner_lock_release, owner_lock_seize

cdef inline size_t cache_bytes() noexcept nogil:
    return (sizeof(thread_cache_t) + os_page_bytes() - 1) // os_page_bytes() * os_page_bytes()


cdef thread_cache_t *thread_cache_new() noexcept nogil:
    """A cache with no block in it; NULL if the kernel has no memory for it."""
    # Mapped: of some 500 KiB, only the magazines in use are ever touched.
    cdef thread_cache_t *cache = <thread_cache_t *>os_reserve(cache_bytes(), os_page_bytes())
    if cache == NULL:
        return NULL
    os_advise(cache, cache_bytes(), MADV_NOHUGEPAGE)    # refused: no harm but memory
    owner_lock_init(&cache.lock)
    cache.thread = pthread_self()
    cache.countdown = 1
    cache.random = 2463534242
    return cache


cdef void thread_cache_delete(thread_cache_t *cache) noexcept nogil:
    """Unmap an empty cache that nobody can reach any more."""
    mutex_destroy(&cache.lock.mutex)
    os_abandon(cache, cache_bytes())


# ---------------------------------------------------------------------------------------------
# By the owner, when a magazine is empty or full

cdef void open_magazine(
    thread_cache_t *cache, magazine_t *magazine, const central_t *central
) noexcept nogil:
    cdef size_t capacity = MAGAZINE_MAX_BYTES // central.block_bytes
    cdef int64_t *used = &cache.used[central.size_class // 64]
    magazine.capacity = <uint16_t>(capacity if capacity < MAGAZINE_SLOTS else MAGAZINE_SLOTS)
    atomic_store_i64(used, used[0] | <int64_t>(<uint64_t>1 << (central.size_class % 64)))


cdef char *thread_cache_refill(
    thread_cache_t *cache, central_t *central, int64_t key, bint may_grow, bint *fresh, int *error
) noexcept nogil:
    """A block of the class that is `key`, and more for the magazine if they are at hand.

    NULL with a code in `error`, as central_take.
    """
    cdef magazine_t *magazine = &cache.magazines[central.size_class]
    cdef char *blocks[MAGAZINE_SLOTS]
    cdef char *block = NULL
    cdef int64_t n
    fresh[0] = False
    error[0] = 0
    mutex_lock(&cache.lock.mutex)
    if magazine.n == 0:
        n = central_take(
            central, key, blocks, magazine.capacity // 2 + 1, may_grow, fresh, error
        )
        if n:
            if magazine.capacity == 0:
                open_magazine(cache, magazine, central)
            n -= 1
            block = blocks[n]
            memcpy(magazine.blocks, blocks, <size_t>n * sizeof(char *))
            atomic_store_u16(&magazine.n, <uint16_t>n)
    else:       # the owner was only called to attention
        block = magazine.blocks[magazine.n - 1]
        atomic_store_u16(&magazine.n, <uint16_t>(magazine.n - 1))
    if block != NULL:
        atomic_bump_i64(&magazine.n_allocs)
    mutex_unlock(&cache.lock.mutex)
    return block


cdef void thread_cache_spill(
    thread_cache_t *cache, central_t *central, char *block
) noexcept nogil:
    """Put a free block into a magazine that has no room; its coldest half goes to the list."""
    cdef magazine_t *magazine = &cache.magazines[central.size_class]
    cdef char *blocks[MAGAZINE_SLOTS]
    cdef int64_t n = 0
    mutex_lock(&cache.lock.mutex)
    if magazine.capacity == 0:
        open_magazine(cache, magazine, central)
    if magazine.n == magazine.capacity:
        n = magazine.n // 2 + (magazine.n > 0)
        memcpy(blocks, magazine.blocks, <size_t>n * sizeof(char *))
        memmove(magazine.blocks, magazine.blocks + n, <size_t>(magazine.n - n) * sizeof(char *))
        atomic_store_u16(&magazine.n, <uint16_t>(magazine.n - n))
    if magazine.n < magazine.capacity:
        magazine.blocks[magazine.n] = block
        atomic_store_u16(&magazine.n, <uint16_t>(magazine.n + 1))
    else:           # larger than any magazine
        blocks[n] = block
        n += 1
    mutex_unlock(&cache.lock.mutex)
    if n:
        central_put(central, blocks, n)


# ---------------------------------------------------------------------------------------------
# By anybody

cdef inline int next_used(const thread_cache_t *cache, int size_class) noexcept nogil:
    """The first class from `size_class` on whose magazine was ever used; MAX_SIZE_CLASSES: none."""
    cdef uint64_t bits
    while size_class < MAX_SIZE_CLASSES:
        bits = <uint64_t>atomic_load_i64(&cache.used[size_class // 64]) >> (size_class % 64)
        if bits:
            return size_class + count_trailing_zeros(bits)
        size_class = (size_class | 63) + 1
    return MAX_SIZE_CLASSES


cdef int64_t empty_magazine(magazine_t *magazine, char **blocks) noexcept nogil:
    cdef int64_t n = magazine.n
    memcpy(blocks, magazine.blocks, <size_t>n * sizeof(char *))
    atomic_store_u16(&magazine.n, 0)
    return n


cdef bint thread_cache_drain(
    thread_cache_t *cache, central_t *centrals, bint for_good
) noexcept nogil:
    """Empty all magazines: into the central lists, or `for_good`, to the page heap.

    False, and nothing changed, if the kernel refuses to keep the owner out.
    """
    cdef char *blocks[MAGAZINE_SLOTS]
    cdef int64_t n
    cdef int i
    if not owner_lock_seize(&cache.lock):
        return False
    i = next_used(cache, 0)
    while i < MAX_SIZE_CLASSES:
        n = empty_magazine(&cache.magazines[i], blocks)
        if n and for_good:
            central_give_back(&centrals[i], blocks, n)
        elif n:
            central_put(&centrals[i], blocks, n)
        i = next_used(cache, i + 1)
    owner_lock_release(&cache.lock)
    return True


cdef bint is_unused(thread_cache_t *cache, int i) noexcept nogil:
    """True if a magazine holds blocks and has neither given nor taken any since the last look."""
    cdef magazine_t *magazine = &cache.magazines[i]
    cdef int64_t n_allocs = atomic_load_i64(&magazine.n_allocs)
    cdef uint16_t n = atomic_load_u16(&magazine.n)
    cdef bint unused = n and n == magazine.n_victims and n_allocs == cache.n_seen_allocs[i]
    magazine.n_victims = n
    cache.n_seen_allocs[i] = n_allocs
    return unused


cdef void thread_cache_collect(thread_cache_t *cache, central_t *centrals) noexcept nogil:
    """One collection: a magazine unused since the last one is a victim; a victim goes back.

    The caller sees to it that there is one collection at a time.
    """
    cdef char *blocks[MAGAZINE_SLOTS]
    cdef int64_t n
    cdef bint unused
    cdef bint is_seized = False
    cdef int i = next_used(cache, 0)
    while i < MAX_SIZE_CLASSES:
        unused = is_unused(cache, i)
        if unused and cache.magazines[i].is_victim:
            # Only now is the owner disturbed: an idle thread's magazines cost the barrier once.
            if not is_seized and not owner_lock_seize(&cache.lock):
                return      # at the next collection, then
            is_seized = True
            n = empty_magazine(&cache.magazines[i], blocks)
            if n:
                central_give_back(&centrals[i], blocks, n)
            unused = False
        cache.magazines[i].is_victim = unused
        i = next_used(cache, i + 1)
    if is_seized:
        owner_lock_release(&cache.lock)


cdef int64_t thread_cache_idle(const thread_cache_t *cache, int size_class) noexcept nogil:
    """How many blocks its magazine of a class holds, as far as can be told from outside."""
    return atomic_load_u16(&cache.magazines[size_class].n)


cdef bint thread_cache_forget(thread_cache_t *cache, int size_class) noexcept nogil:
    """Close an empty magazine, for its class is about to be that of another size.

    False if the kernel refuses to keep the owner out.
    """
    if not owner_lock_seize(&cache.lock):
        return False
    cache.magazines[size_class].capacity = 0
    owner_lock_release(&cache.lock)
    return True
