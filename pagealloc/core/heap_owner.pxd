"""Heap: the Python owner of one heap."""

from libc.stdint cimport int64_t

from pagealloc.core.heap cimport heap_t

cdef class Heap:
    cdef heap_t *heap               # NULL once closed
    cdef object __weakref__
    cdef readonly object backing
    cdef readonly object arena_bytes
    cdef readonly object budget_bytes
    cdef heap_t *open_heap(self) except NULL
    cdef object refusal(self, size_t nbytes, size_t align_bytes, int error)
    cdef int64_t n_live(self) noexcept
    cdef list _arena_stats(self)
