"""How long threads wait for the mutexes that they share."""

from libc.stdint cimport int64_t

from pagealloc.core.mutex cimport mutex_t, mutex_trylock

cdef void lock_waiting(mutex_t *mutex) noexcept nogil
cdef int64_t take_waited_ns() noexcept nogil


cdef inline void lock_shared(mutex_t *mutex) noexcept nogil:
    """Lock; the time is taken only where another thread has it."""
    if mutex_trylock(mutex) != 0:
        lock_waiting(mutex)
