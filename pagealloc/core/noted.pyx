"""Which blocks, and which waits, are noted with the Python stack that they come from.

Purpose
    Two flags for all who want to know: the report of leaks and a profiler of the heap; a profiler
    of contention.
Invariants
    blocks_are_noted <=> leaks are reported, or there is a heap profiler
    memory_is_followed <=> some block that has no Python object was noted and is live
    waits_are_noted <=> there is a wait profiler
Locking
    The GIL.
Units
    Bytes; nanoseconds.
Source
    Of how gaps are drawn: https://pkg.go.dev/runtime#MemProfileRate and tcmalloc's sampler.
"""

from cpython.exc cimport (
    PyErr_Fetch,
    PyErr_Restore,
    PyErr_SetInterrupt,
    PyErr_SetObject,
    PyErr_WriteUnraisable,
)
from cpython.object cimport PyObject
from libc.math cimport log
from libc.stdint cimport int64_t, uint64_t, uintptr_t

from pagealloc.core.lock_waits cimport take_waits

from pagealloc.core import leaks
from pagealloc.core.lock_waits import forget_waits

blocks_are_noted = leaks.LEAK_EVERY > 0
waits_are_noted = False
memory_is_followed = False

cdef object heap_profiler = None
cdef dict followed = {}             # address -> NotedMemory
cdef object wait_profiler = None
cdef int64_t period_bytes = 0
cdef int64_t left_bytes = 0
cdef uint64_t random_state = 0x9E3779B97F4A7C15


cdef int64_t next_gap() noexcept:
    """Bytes to the next one that is picked: exponential, so that no rhythm hides from it."""
    global random_state
    random_state ^= random_state << 13      # Marsaglia's xorshift64
    random_state ^= random_state >> 7
    random_state ^= random_state << 17
    cdef double uniform = <double>((random_state >> 11) + 1) * 2.0 ** -53
    return <int64_t>(-log(uniform) * <double>period_bytes)


cdef int note_block(object block, int64_t nbytes, Py_ssize_t n_parts) except -1:
    """Tell who wants to know of a Buffer, or of a Batch of `n_parts`, of so many bytes in all."""
    if leaks.LEAK_EVERY:
        leaks.note_allocation(block, n_parts)
    return sample(block, nbytes, n_parts)


cdef int note_growth(object block, int64_t nbytes, Py_ssize_t n_parts) except -1:
    """Tell who wants to know that a Buffer or Window has so many bytes more."""
    return sample(block, nbytes, n_parts) if nbytes > 0 else 0


cdef int sample(object block, int64_t nbytes, Py_ssize_t n_parts) except -1:
    """Count down, and note what is picked: 1 if it was."""
    global left_bytes
    if heap_profiler is not None:
        left_bytes -= nbytes
        if left_bytes < 0 or period_bytes == 1:
            left_bytes = next_gap()
            heap_profiler(block, nbytes, n_parts)
            return 1
    return 0


class NotedMemory:
    """Stands for a block that has no Python object of its own, and ends with it."""

    __slots__ = ("__weakref__",)
    closed = False


cdef void note_memory(const void *memory, int64_t nbytes) noexcept with gil:
    """Tell who wants to know of a block that has no Python object.

    Its stack is that of the Python code which this thread runs.  The caller holds the GIL, or
    nothing that another thread may hold while it waits for the GIL.
    """
    global memory_is_followed
    cdef PyObject *kind
    cdef PyObject *error
    cdef PyObject *traceback
    if heap_profiler is None:
        return
    PyErr_Fetch(&kind, &error, &traceback)
    try:
        block = NotedMemory()
        if sample(block, nbytes, 1):
            followed[<uintptr_t>memory] = block
            memory_is_followed = True
    except KeyboardInterrupt:
        PyErr_SetInterrupt()    # who called cannot pass it on: again, once Python code runs
    except BaseException as failure:
        PyErr_SetObject(type(failure), failure)
        PyErr_WriteUnraisable(heap_profiler)
    PyErr_Restore(kind, error, traceback)


cdef void forget_memory(const void *memory) noexcept with gil:
    """Before a block is freed that note_memory() may have noted; the same holds for the caller."""
    global memory_is_followed
    cdef PyObject *kind
    cdef PyObject *error
    cdef PyObject *traceback
    PyErr_Fetch(&kind, &error, &traceback)      # blocks end while an exception is on its way, too
    followed.pop(<uintptr_t>memory, None)
    memory_is_followed = len(followed) > 0
    PyErr_Restore(kind, error, traceback)


cdef int note_wait() except -1:
    """Tell who wants to know of what this thread has just waited."""
    cdef int64_t waited_ns
    cdef int64_t n_waits = take_waits(&waited_ns)
    if n_waits and wait_profiler is not None:
        wait_profiler(n_waits, waited_ns)
    return 0


cdef void forget_wait() noexcept:
    """What this thread has waited before a call is not that call's: others' calls are not noted."""
    cdef int64_t waited_ns
    take_waits(&waited_ns)


def start_heap_profile(profiler, int64_t every_bytes) -> None:
    """Have ``profiler(block, nbytes, n_parts)`` called for one byte in so many; 1: every block.

    Raises
    ------
    RuntimeError
        There is one already.
    """
    global heap_profiler, period_bytes, left_bytes, blocks_are_noted
    if heap_profiler is not None:
        raise RuntimeError("the heap is profiled already: stop that profile first")
    period_bytes = every_bytes
    left_bytes = next_gap()
    heap_profiler = profiler
    blocks_are_noted = True


def stop_heap_profile(profiler) -> None:
    """Call `profiler` no more; if another one was started, that goes on."""
    global heap_profiler, blocks_are_noted
    if heap_profiler == profiler:
        heap_profiler = None
        blocks_are_noted = leaks.LEAK_EVERY > 0


def start_wait_profile(profiler) -> None:
    """Have ``profiler(n_waits, waited_ns)`` called in each thread that waited for a shared mutex.

    Raises
    ------
    RuntimeError
        There is one already.
    """
    global wait_profiler, waits_are_noted
    if wait_profiler is not None:
        raise RuntimeError("contention is profiled already: stop that profile first")
    forget_waits()
    wait_profiler = profiler
    waits_are_noted = True


def stop_wait_profile(profiler) -> bool:
    """Call `profiler` no more: whether it was called until now; another one goes on."""
    global wait_profiler, waits_are_noted
    if wait_profiler != profiler:
        return False
    wait_profiler = None
    waits_are_noted = False
    return True
