"""The thread that gives idle memory back, in a process that makes no call.

Purpose
    Every half of a heap's `purge_after_s`: one collection, which takes what lay unused in magazines
    and lists for two of them, and one purge of what was free in the page heap for as long.
Structure
    alloc_slow -> purger_watch(heap) -> is_watched = 1, thread started or woken
    thread: each watched heap that is due -> heap_collect -> page_heap_purge_idle
            a heap without an arena -> is_watched = 0
            none watched -> sleep until woken; else until the next is due
Invariants
    a watched heap has a thread to watch it; a heap that has an arena is watched after the slow path
    that made it, unless no thread could be started
    the thread allocates nothing, takes no signal, and is joined by nobody: it keeps no process from
    ending, and in a forked child it is not there until the next purger_watch()
    over time it takes no more than 1 / CPU_SHARE of a core
Locking
    `mutex` for the thread's own state, taken with no other lock held.  While a heap is worked on it
    is held (heap_life), and no lock is between two steps.
Units
    Nanoseconds.
"""

from libc.stdint cimport INT64_MAX, int64_t
from posix.time cimport CLOCK_THREAD_CPUTIME_ID, clock_gettime, timespec

from pagealloc.core.atomics cimport atomic_load_i64, atomic_store_i64
from pagealloc.core.heap_caches cimport heap_collect
from pagealloc.core.heap_life cimport heap_hold_next, heap_release_held
from pagealloc.core.heap_state cimport heap_t
from pagealloc.core.mutex cimport mutex_init, mutex_lock, mutex_t, mutex_unlock
from pagealloc.core.os_memory cimport (
    CALL_PTHREAD_CREATE,
    os_at_fork,
    os_now_ns,
    os_refused,
)
from pagealloc.core.page_purge cimport page_heap_purge_idle

cdef extern from "os_compat.h" nogil:
    ctypedef struct condition_t "pthread_cond_t":
        pass
    void condition_init "pagealloc_condition_init"(condition_t *condition)
    void condition_wait "pagealloc_condition_wait"(
        condition_t *condition, mutex_t *mutex, int64_t ns
    )
    int condition_signal "pthread_cond_signal"(condition_t *condition)
    int thread_start "pagealloc_thread_start"(
        void *(*body)(void *) noexcept nogil, const char *name
    )

cdef enum:
    CPU_SHARE = 20                          # a twentieth of a core
    RETRY_NS = 1000 * 1000 * 1000           # after the system refused a thread
    LONGEST_SLEEP_NS = 3600 * 1000 * 1000 * 1000

cdef mutex_t mutex
cdef condition_t condition
cdef bint is_running = False
cdef bint is_woken = False
cdef int64_t no_start_before_ns = 0         # atomic


cdef void purger_watch(heap_t *heap) noexcept nogil:
    """From now on, see to what is idle in a heap that has grown."""
    global is_running, is_woken
    cdef int64_t now_ns = os_now_ns()
    if now_ns < atomic_load_i64(&no_start_before_ns):
        return
    mutex_lock(&mutex)
    if not is_running:
        is_running = not os_refused(CALL_PTHREAD_CREATE) and thread_start(run, "pagealloc") == 0
    if is_running:
        atomic_store_i64(&heap.next_purge_ns, now_ns + heap.purge_after_ns // 2)
        atomic_store_i64(&heap.is_watched, True)
        is_woken = True
        condition_signal(&condition)
    else:       # collections are the slow paths' own again, and the next one after this tries again
        atomic_store_i64(&no_start_before_ns, now_ns + RETRY_NS)
    mutex_unlock(&mutex)


cdef int64_t cpu_time_ns() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now)
    return <int64_t>now.tv_sec * 1000000000 + now.tv_nsec


cdef bint is_empty(heap_t *heap) noexcept nogil:
    cdef bint empty
    mutex_lock(&heap.pages.mutex)
    empty = heap.pages.arenas == NULL
    mutex_unlock(&heap.pages.mutex)
    return empty


cdef int64_t purge_due(int64_t now_ns) noexcept nogil:
    """See to all watched heaps that are due; when the next one is, INT64_MAX if none is watched."""
    cdef int64_t next_ns = INT64_MAX, due_ns
    cdef heap_t *heap = heap_hold_next(0)
    while heap != NULL:
        if atomic_load_i64(&heap.next_purge_ns) <= now_ns:
            heap_collect(heap)
            page_heap_purge_idle(&heap.pages)
            atomic_store_i64(&heap.next_purge_ns, now_ns + heap.purge_after_ns // 2)
            if is_empty(heap):
                # First let go, then look again: who grows it meanwhile looks after it has grown.
                atomic_store_i64(&heap.is_watched, False)
                if not is_empty(heap):
                    atomic_store_i64(&heap.is_watched, True)
        due_ns = atomic_load_i64(&heap.next_purge_ns)
        if atomic_load_i64(&heap.is_watched) and due_ns < next_ns:
            next_ns = due_ns
        heap = heap_hold_next(heap.generation)
    heap_release_held()
    return next_ns


cdef void *run(void *_unused) noexcept nogil:
    global is_woken
    cdef int64_t now_ns, next_ns, rest_ns, cpu_ns
    while True:
        now_ns = os_now_ns()
        cpu_ns = cpu_time_ns()
        next_ns = purge_due(now_ns)
        rest_ns = (cpu_time_ns() - cpu_ns) * (CPU_SHARE - 1)
        if next_ns == INT64_MAX:
            next_ns = now_ns + LONGEST_SLEEP_NS
        rest_ns = max(next_ns - os_now_ns(), rest_ns)
        mutex_lock(&mutex)
        if rest_ns > 0 and not is_woken:
            condition_wait(&condition, &mutex, rest_ns)
        is_woken = False
        mutex_unlock(&mutex)


cdef void start_anew() noexcept nogil:
    """In a forked child there is no such thread, and who held its mutex is not there either."""
    global is_running, is_woken
    mutex_init(&mutex)
    condition_init(&condition)
    is_running = False
    is_woken = False


mutex_init(&mutex)
condition_init(&condition)
if os_at_fork(NULL, NULL, start_anew) != 0:
    raise MemoryError("pthread_atfork refused to register pagealloc's fork handler")
