"""How long threads wait for the mutexes that they share."""

from libc.stdint cimport int64_t

from pagealloc.core.mutex cimport mutex_t

cdef extern from * nogil:
    """
    #ifdef PAGEALLOC_UNOBSERVED     /* as in noted.pxd */
    #define PAGEALLOC_LOCK_SHARED(mutex, lock_waiting) pthread_mutex_lock(mutex)
    #else
    #define PAGEALLOC_LOCK_SHARED(mutex, lock_waiting) \\
        do { if (pthread_mutex_trylock(mutex) != 0) lock_waiting(mutex); } while (0)
    #endif
    """
    void lock_or_wait "PAGEALLOC_LOCK_SHARED"(
        mutex_t *mutex, void (*lock_waiting)(mutex_t *mutex) noexcept nogil
    ) noexcept

cdef void lock_waiting(mutex_t *mutex) noexcept nogil
cdef int64_t take_waits(int64_t *waited_ns) noexcept nogil


cdef inline void lock_shared(mutex_t *mutex) noexcept nogil:
    """Lock; the time is taken only where another thread has it."""
    lock_or_wait(mutex, lock_waiting)
