"""Heap: the Python owner of one heap."""

from libc.stdint cimport int64_t

from pagealloc.core.heap_state cimport heap_t

cdef class Heap:
    cdef heap_t *heap               # NULL once closed
    cdef Py_ssize_t n_calls         # under way without the GIL
    cdef Py_ssize_t n_pins          # NumPy handlers in use, which call the heap at any time
    cdef int64_t fork_generation    # of the process n_calls counts for
    cdef object __weakref__
    cdef object n_faults_before     # page faults of the process when this was made
    cdef str node_text              # for repr(); empty: no NUMA node was asked for
    cdef list pressure_callbacks
    cdef set threads_in_callbacks
    cdef readonly object backing
    cdef readonly object arena_bytes
    cdef readonly object budget_bytes
    cdef heap_t *open_heap(self) except NULL
    cdef heap_t *enter(self) except NULL
    cdef void begin_call(self) noexcept
    cdef void leave(self) noexcept
    cdef void forget_lost_calls(self) noexcept
    cdef int await_calls(self) except -1
    cdef int relieve(
        self, size_t nbytes, size_t align_bytes, int error, Py_ssize_t n_blocks, int *n_asked
    ) except -1
    cdef object refusal(
        self, size_t nbytes, size_t align_bytes, int error, Py_ssize_t n_blocks=*
    )
