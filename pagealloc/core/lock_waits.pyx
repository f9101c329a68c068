"""How long threads wait for the mutexes that they share: the central lists' and the page heaps'.

Purpose
    Count what contention costs, always; let who profiles it know of whose waits they were.
Structure
    lock_shared(mutex): free -> nothing to count; taken -> lock_waiting: process and thread
Locking
    None of its own: atomic counters, and two numbers a thread.
Units
    Nanoseconds.
"""

from libc.stdint cimport int64_t

from pagealloc.core.atomics cimport atomic_add_i64, atomic_load_i64
from pagealloc.core.mutex cimport mutex_lock, mutex_t
from pagealloc.core.os_memory cimport os_now_ns

cdef extern from * nogil:
    """
    typedef struct {
        long long n, ns;    /* since they were last taken, */
        long long epoch;    /* ... if it is still the same epoch */
    } pagealloc_waits_t;
    static __thread pagealloc_waits_t pagealloc_waits;
    static inline pagealloc_waits_t *pagealloc_waits_of_thread(long long epoch)
    {
        if (pagealloc_waits.epoch != epoch)
            pagealloc_waits = (pagealloc_waits_t){0, 0, epoch};
        return &pagealloc_waits;
    }
    """
    ctypedef struct waits_t "pagealloc_waits_t":
        long long n, ns
    waits_t *waits_of_thread "pagealloc_waits_of_thread"(long long epoch)

cdef int64_t n_waits = 0        # all three atomic
cdef int64_t waited_ns = 0
cdef int64_t epoch = 0          # what threads waited before it began is nobody's any more


cdef void lock_waiting(mutex_t *mutex) noexcept nogil:
    """Lock what another thread has."""
    cdef int64_t begun_at_ns = os_now_ns()
    cdef int64_t wait_ns
    cdef waits_t *of_thread
    mutex_lock(mutex)
    wait_ns = os_now_ns() - begun_at_ns
    atomic_add_i64(&n_waits, 1)
    atomic_add_i64(&waited_ns, wait_ns)
    of_thread = waits_of_thread(atomic_load_i64(&epoch))
    of_thread.n += 1
    of_thread.ns += wait_ns


cdef int64_t take_waits(int64_t *waited_ns) noexcept nogil:
    """How often, and how long, this thread has waited since it, or a new epoch, last asked."""
    cdef waits_t *of_thread = waits_of_thread(atomic_load_i64(&epoch))
    cdef int64_t n_taken = of_thread.n
    waited_ns[0] = of_thread.ns
    of_thread.n = of_thread.ns = 0
    return n_taken


def lock_wait_counts() -> tuple:
    """Return how often threads had to wait for a shared mutex so far, and how long, in ns.

    Of the whole process.  Thread-safe; the two are read one after the other.
    """
    return atomic_load_i64(&n_waits), atomic_load_i64(&waited_ns)


def forget_waits() -> None:
    """Begin a new epoch: threads begin to count from nothing."""
    atomic_add_i64(&epoch, 1)
