"""How long threads wait for the mutexes that they share: the central lists' and the page heaps'.

Purpose
    Count what contention costs, always; let who profiles it know of whose waits they were.
Structure
    lock_shared(mutex): free -> nothing to count; taken -> lock_waiting: process and thread
Locking
    None of its own: atomic counters, and one pair of numbers a thread.
Units
    Nanoseconds.
"""

from libc.stdint cimport int64_t

from pagealloc.core.atomics cimport atomic_add_i64, atomic_load_i64
from pagealloc.core.mutex cimport mutex_lock, mutex_t
from pagealloc.core.os_memory cimport os_now_ns

cdef extern from * nogil:
    """
    static __thread long long pagealloc_waited_ns;      /* since they were last taken, */
    static __thread long long pagealloc_waited_epoch;   /* ... if it is still the same epoch */
    static inline long long *pagealloc_waited(long long epoch)
    {
        if (pagealloc_waited_epoch != epoch) {
            pagealloc_waited_epoch = epoch;
            pagealloc_waited_ns = 0;
        }
        return &pagealloc_waited_ns;
    }
    """
    long long *waited_of_thread "pagealloc_waited"(long long epoch)

cdef int64_t n_waits = 0        # all three atomic
cdef int64_t waited_ns = 0
cdef int64_t epoch = 0          # what threads waited before it began is nobody's any more


cdef void lock_waiting(mutex_t *mutex) noexcept nogil:
    """Lock what another thread has."""
    cdef int64_t begun_at_ns = os_now_ns()
    cdef int64_t wait_ns
    mutex_lock(mutex)
    wait_ns = os_now_ns() - begun_at_ns
    atomic_add_i64(&n_waits, 1)
    atomic_add_i64(&waited_ns, wait_ns)
    waited_of_thread(atomic_load_i64(&epoch))[0] += wait_ns


cdef int64_t take_waited_ns() noexcept nogil:
    """What this thread has waited since it, or a new epoch, last asked."""
    cdef long long *of_thread = waited_of_thread(atomic_load_i64(&epoch))
    cdef int64_t taken_ns = of_thread[0]
    of_thread[0] = 0
    return taken_ns


def lock_wait_counts() -> tuple:
    """Return how often threads had to wait for a shared mutex so far, and how long, in ns.

    Of the whole process.  Thread-safe; the two are read one after the other.
    """
    return atomic_load_i64(&n_waits), atomic_load_i64(&waited_ns)


def forget_waits() -> None:
    """Begin a new epoch: threads begin to count from nothing."""
    atomic_add_i64(&epoch, 1)
