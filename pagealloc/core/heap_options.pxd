"""The settings of a heap, read and checked."""

from pagealloc.core.heap_state cimport heap_options_t

cdef str describe_node(dict settings)
cdef int read_options(heap_options_t *options, dict settings) except -1
