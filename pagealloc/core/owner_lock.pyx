"""The collector's side of a lock that costs its owner nothing.

Purpose
    Let another thread look into what is one thread's own, without making the owner pay for it.
Structure
    owner:      busy = 1; attention? -> busy = 0, mutex;  ...  busy = 0
    collector:  mutex; attention = 1; membarrier; wait until busy = 0;  ...  attention = 0; unlock
Invariants
    whoever holds the mutex with attention = 1 and has seen busy = 0 after the barrier is alone
    while busy = 1 the owner waits for nothing but locks that are taken under this one: those who
    have them do not wait for this one
    where the kernel has no membarrier, or the owner is gone, attention is set for good: every entry
    takes the mutex
Locking
    This is it.  Nothing is taken while the collector waits.
Units
    None.
"""

from libc.stdint cimport uint32_t

from pagealloc.core.atomics cimport atomic_load_u32, atomic_store_u32
from pagealloc.core.mutex cimport mutex_init, mutex_lock, mutex_unlock
from pagealloc.core.os_memory cimport os_barrier_all_threads, os_has_barrier, os_wait_briefly

cdef extern from * nogil:
    """
    static inline uint32_t pagealloc_load_busy(const uint32_t *busy)
    { return __atomic_load_n(busy, __ATOMIC_SEQ_CST); }
    static inline void pagealloc_set_attention(uint32_t *attention, uint32_t value)
    { __atomic_store_n(attention, value, __ATOMIC_SEQ_CST); }
    """
    uint32_t load_busy "pagealloc_load_busy"(const uint32_t *busy)
    void set_attention "pagealloc_set_attention"(uint32_t *attention, uint32_t value)


cdef enum:              # attention, if set
    WANTED = 1          # by who has the mutex, until it is released
    FOR_GOOD = 2


cdef void owner_lock_init(owner_lock_t *lock) noexcept nogil:
    """Prepare a lock whose memory is zero."""
    mutex_init(&lock.mutex)
    lock.attention = 0 if os_has_barrier() else FOR_GOOD


cdef bint owner_lock_seize(owner_lock_t *lock) noexcept nogil:
    """Keep the owner out; False, and nothing is held, if the kernel refuses the barrier."""
    cdef int n_waits = 0
    mutex_lock(&lock.mutex)
    if atomic_load_u32(&lock.attention):    # for good: the mutex is all there is
        return True
    set_attention(&lock.attention, WANTED)
    if os_barrier_all_threads() != 0:
        set_attention(&lock.attention, 0)
        mutex_unlock(&lock.mutex)
        return False
    while load_busy(&lock.busy):    # some nanoseconds, or until a preempted owner runs again
        os_wait_briefly(n_waits)
        n_waits += 1
    return True


cdef void owner_lock_release(owner_lock_t *lock) noexcept nogil:
    if atomic_load_u32(&lock.attention) == WANTED:
        set_attention(&lock.attention, 0)
    mutex_unlock(&lock.mutex)


cdef void owner_lock_orphan(owner_lock_t *lock) noexcept nogil:
    """The owner is gone, or this is it and it enters no more: the mutex is all there is.

    In a forked child the owner was a thread of the parent's, and may have been inside.  The caller
    sees to it that nobody is seizing the lock meanwhile.
    """
    atomic_store_u32(&lock.busy, 0)
    set_attention(&lock.attention, FOR_GOOD)
