"""The newest slow events of the core, kept for the one who takes them now and then.

Purpose
    Nobody below the Buffer calls Python.  So what grows or purges a heap leaves a note here, and a
    thread of Python's tells of it.
Structure
    keep_event -> kept[number % N_KEPT] -> take_events, in order; what was overwritten is counted
Invariants
    n_taken <= n_events; kept holds the newest N_KEPT of these
Locking
    A mutex of its own, held for a copy.  Callers may hold any other; none is taken under it.  In a
    forked child it is free, and nobody watches: who took the events is not there.
Units
    Bytes; nanoseconds of CLOCK_MONOTONIC.
"""

from libc.stdint cimport int64_t

from pagealloc.core.atomics cimport atomic_load_i64, atomic_store_i64
from pagealloc.core.mutex cimport mutex_init, mutex_lock, mutex_t, mutex_unlock
from pagealloc.core.os_memory cimport os_at_fork, os_now_ns

cdef enum:
    N_KEPT = 256

cdef struct event_t:
    int64_t heap_number
    int64_t begun_at_ns
    int64_t ended_at_ns
    int64_t nbytes
    int kind

KINDS = ("arena_growth", "purge", "trim")   # by EVENT_xxx
CAPACITY = N_KEPT

cdef int64_t is_watched = 0                 # atomic
cdef mutex_t mutex
cdef event_t[N_KEPT] kept
cdef int64_t n_events = 0
cdef int64_t n_taken = 0                    # those that were lost among them


cdef bint events_are_watched() noexcept nogil:
    return atomic_load_i64(&is_watched) != 0


cdef void keep_event(
    int kind, int64_t heap_number, int64_t begun_at_ns, int64_t nbytes
) noexcept nogil:
    """Keep what ends now; not if nobody watched when it began, which is then said to be at 0."""
    global n_events
    cdef event_t *event
    if begun_at_ns == 0 or not events_are_watched():
        return
    mutex_lock(&mutex)
    event = &kept[n_events % N_KEPT]
    event.heap_number = heap_number
    event.begun_at_ns = begun_at_ns
    event.ended_at_ns = os_now_ns()
    event.nbytes = nbytes
    event.kind = kind
    n_events += 1
    mutex_unlock(&mutex)


cdef int copy_new(event_t *events, int64_t *n_lost) noexcept nogil:
    """Copy up to N_KEPT events that were not taken yet; how many these are."""
    global n_taken
    cdef int n = 0
    mutex_lock(&mutex)
    n_lost[0] = max(n_events - N_KEPT - n_taken, <int64_t>0)
    n_taken += n_lost[0]
    while n_taken < n_events:
        events[n] = kept[n_taken % N_KEPT]
        n_taken += 1
        n += 1
    mutex_unlock(&mutex)
    return n


def watch_events() -> None:
    """Keep events from now on.

    Raises
    ------
    RuntimeError
        Somebody takes them already; there would not be all for either.
    """
    global n_taken
    if events_are_watched():
        raise RuntimeError("the core's events are watched already: end that watch first")
    mutex_lock(&mutex)
    n_taken = n_events
    mutex_unlock(&mutex)
    atomic_store_i64(&is_watched, 1)


def unwatch_events() -> None:
    """Keep no more events."""
    atomic_store_i64(&is_watched, 0)


def take_events() -> tuple:
    """Take what was kept since the last call: the events, oldest first, and how many were lost.

    Each is (kind, heap number, when it began, when it ended, bytes), the times in nanoseconds of
    time.monotonic_ns().  `CAPACITY` are kept; of more, the oldest are lost.  Thread-safe.
    """
    cdef event_t[N_KEPT] events
    cdef int64_t n_lost = 0
    cdef int n = copy_new(events, &n_lost)
    return [
        (
            KINDS[events[i].kind], events[i].heap_number, events[i].begun_at_ns,
            events[i].ended_at_ns, events[i].nbytes
        )
        for i in range(n)
    ], n_lost


cdef void start_anew() noexcept nogil:
    mutex_init(&mutex)
    atomic_store_i64(&is_watched, 0)


mutex_init(&mutex)
if os_at_fork(NULL, NULL, start_anew) != 0:
    raise MemoryError("pthread_atfork refused to register pagealloc's fork handler")
