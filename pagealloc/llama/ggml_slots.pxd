"""Which slots of ggml's tables of functions are meant; -1: none was found."""

from libc.stdint cimport uint8_t

ctypedef void *(*type_function)() noexcept nogil
ctypedef void *(*alloc_function)(void *buffer_type, size_t nbytes) noexcept nogil
ctypedef void *(*from_ptr_function)(void *memory, size_t nbytes) noexcept nogil
ctypedef void (*clear_function)(void *buffer, uint8_t value) noexcept nogil
ctypedef void (*free_function)(void *buffer) noexcept nogil

cdef struct slots_t:
    int alloc
    int clear
    int free

cdef slots_t find_slots(
    void **table, alloc_function alloc, from_ptr_function from_ptr, clear_function clear,
    free_function free_buffer,
) noexcept nogil
