"""A lock that its owner takes without an atomic read-modify-write, and others only at a price.

One thread owns the lock and enters it millions of times a second; a collector enters it now and
then.  The owner sets a plain `busy` flag, and looks whether it is wanted elsewhere (`attention`);
the collector sets `attention`, makes every running thread pass a memory barrier (membarrier), and
waits until `busy` is 0.  Either the owner's flag was visible to the collector by then, or the owner
looks after the barrier and sees `attention`: both cannot miss each other (Dekker's algorithm with
one side's fence paid for by the other).  An owner that sees `attention` takes the mutex instead.
"""

from libc.stdint cimport uint32_t

from pagealloc.core.mutex cimport mutex_lock, mutex_t, mutex_unlock

cdef extern from * nogil:
    """
    #include <stdint.h>
    static inline int pagealloc_owner_enter(uint32_t *busy, const uint32_t *attention)
    {
    #ifdef __SANITIZE_THREAD__      /* which knows atomics, not membarrier */
        __atomic_exchange_n(busy, 1, __ATOMIC_SEQ_CST);
        return !__atomic_load_n(attention, __ATOMIC_SEQ_CST);
    #else
        __atomic_store_n(busy, 1, __ATOMIC_RELAXED);
        __atomic_signal_fence(__ATOMIC_SEQ_CST);
        return !__atomic_load_n(attention, __ATOMIC_ACQUIRE);
    #endif
    }
    static inline void pagealloc_owner_leave(uint32_t *busy)
    { __atomic_store_n(busy, 0, __ATOMIC_RELEASE); }
    """
    bint _enter "pagealloc_owner_enter"(uint32_t *busy, const uint32_t *attention)
    void _leave "pagealloc_owner_leave"(uint32_t *busy)

cdef struct owner_lock_t:
    uint32_t busy           # the owner is inside; written by the owner alone
    uint32_t attention      # a collector wants in: the owner must take the mutex
    mutex_t mutex           # collectors, and the owner when it is called to attention

cdef void owner_lock_init(owner_lock_t *lock) noexcept nogil
cdef bint owner_lock_seize(owner_lock_t *lock) noexcept nogil
cdef void owner_lock_release(owner_lock_t *lock) noexcept nogil
cdef void owner_lock_orphan(owner_lock_t *lock) noexcept nogil


cdef inline bint owner_enter(owner_lock_t *lock) noexcept nogil:
    """The owner's way in; False: not entered, take the mutex.  Either way owner_leave() follows."""
    return _enter(&lock.busy, &lock.attention)


cdef inline void owner_leave(owner_lock_t *lock) noexcept nogil:
    _leave(&lock.busy)


cdef inline bint owner_enter_surely(owner_lock_t *lock) noexcept nogil:
    """The owner's way in, waiting if need be; what it returns is for owner_leave_surely()."""
    if _enter(&lock.busy, &lock.attention):
        return True
    _leave(&lock.busy)
    mutex_lock(&lock.mutex)
    return False


cdef inline void owner_leave_surely(owner_lock_t *lock, bint by_flag) noexcept nogil:
    if by_flag:
        _leave(&lock.busy)
    else:
        mutex_unlock(&lock.mutex)
