"""Buffer: the Python handle that owns one slot or run."""

from libc.stdint cimport uint32_t

from pagealloc.core.heap_owner cimport Heap

cdef class Buffer:
    cdef char *memory               # NULL once closed
    cdef readonly size_t nbytes     # as asked for, not rounded
    cdef readonly bint fresh        # nobody has used the memory since the kernel zeroed it
    cdef bint is_foreign            # its memory is `keeper`'s
    cdef uint32_t align_bytes       # as asked for; 0: the default
    cdef Py_ssize_t n_exports       # views that are alive; guarded by the GIL
    cdef Heap owner                 # keeps the heap mapped; None of a foreign one
    cdef object keeper              # of a foreign one: what keeps the memory
    cdef object __weakref__
    cdef char *open_memory(self) except NULL
    cdef int free_memory(self) noexcept
    cdef int check_no_views(self) except -1

cdef Buffer new_buffer_of_class(Heap heap, size_t nbytes, size_t slot_class)
cdef Buffer new_buffer(Heap heap, size_t nbytes, size_t align_bytes)
