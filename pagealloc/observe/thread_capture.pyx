"""What the threads of this process spend CPU time on, as far as native code tells.

Purpose
    Wait without the GIL, then ask each thread that has worked meanwhile where it is: as it happens,
    not when it next lets go of the GIL.
Locking
    One thread captures at a time (CPUProfiler has one).
Units
    Nanoseconds; addresses.
"""

from libc.stdint cimport int64_t, uintptr_t
from libc.stdlib cimport calloc, free

cdef extern from "thread_capture.h" nogil:
    const int CAPTURED_WORDS "PAGEALLOC_CAPTURED_WORDS"
    int capture_install "pagealloc_capture_install"()
    int capture_thread "pagealloc_capture_thread"(int tid, uintptr_t *words)
    int64_t thread_cpu_ns "pagealloc_thread_cpu_ns"(int tid)
    void pause_ns "pagealloc_pause_ns"(int64_t nanoseconds)


def install_capture() -> int:
    """Handle SIGPROF from here on: 0, or an errno value; EBUSY: another profiler has it."""
    return capture_install()


def thread_spent_ns(tid: int) -> int:
    """Return what CPU time a thread has spent; -1: there is none."""
    return thread_cpu_ns(tid)


def capture_threads(tids, spent_ns, period_ns: int) -> list:
    """Wait for `period_ns`, and tell which threads have spent CPU time.

    Parameters
    ----------
    tids : list of int
        Threads, as the kernel numbers them.
    spent_ns : dict of int to int
        What each had spent when it was last reported; of others all is told.  It is updated, and
        loses those not in `tids`.
    period_ns : int
        How long to wait; a thread that has spent less than half of it is left for later.

    Returns
    -------
    list of (tid, nanoseconds spent, addresses)
        The address it is at, and the words from its stack pointer on; empty if it did not answer.
    """
    cdef Py_ssize_t i, n = len(tids)
    cdef int64_t pause = period_ns, least_ns = period_ns // 2
    cdef Py_ssize_t n_words = 1 + CAPTURED_WORDS
    cdef int *threads = <int *>calloc(n + 1, sizeof(int))
    cdef int64_t *before = <int64_t *>calloc(n + 1, sizeof(int64_t))
    cdef int64_t *after = <int64_t *>calloc(n + 1, sizeof(int64_t))
    cdef bint *is_there = <bint *>calloc(n + 1, sizeof(bint))
    cdef uintptr_t *words = <uintptr_t *>calloc((n + 1) * n_words, sizeof(uintptr_t))
    try:
        if threads == NULL or before == NULL or after == NULL or is_there == NULL or words == NULL:
            raise MemoryError("no memory for what the threads answer")
        for i in range(n):
            threads[i] = tids[i]
            before[i] = spent_ns.get(tids[i], 0)
        with nogil:
            pause_ns(pause)
            for i in range(n):
                after[i] = thread_cpu_ns(threads[i])
                if after[i] < before[i]:
                    before[i] = 0       # its number is another thread's by now
                if after[i] - before[i] >= least_ns:
                    is_there[i] = capture_thread(threads[i], words + i * n_words)
        found = []
        for tid in spent_ns.keys() - set(tids):
            del spent_ns[tid]       # it has ended, and its number may come again
        for i in range(n):
            if after[i] < 0:
                spent_ns.pop(threads[i], None)
            elif after[i] - before[i] >= least_ns:
                spent_ns[threads[i]] = after[i]
                addresses = [words[i * n_words + j] for j in range(n_words)] if is_there[i] else []
                found.append((threads[i], after[i] - before[i], addresses))
        return found
    finally:
        free(threads)
        free(before)
        free(after)
        free(is_there)
        free(words)
