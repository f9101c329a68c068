"""Batch: many blocks under one handle."""

from pagealloc.core.heap_owner cimport Heap

cdef class Batch:
    cdef char **blocks              # NULL once closed
    cdef Py_ssize_t n_blocks
    cdef readonly size_t nbytes     # of each block, as asked for
    cdef Py_ssize_t n_exports       # views that are alive; guarded by the GIL
    cdef Heap owner
    cdef object __weakref__
    cdef int open_blocks(self) except -1
    cdef void free_blocks(self) noexcept

cdef Batch new_batch(Heap heap, size_t nbytes, size_t align_bytes, Py_ssize_t n_blocks)
