"""Which blocks, and which waits, are noted with the Python stack that they come from."""

from libc.stdint cimport int64_t

cdef extern from * nogil:
    """
    /* A build to compare with has no such questions (setup.py). */
    #ifdef PAGEALLOC_UNOBSERVED
    #define PAGEALLOC_OBSERVED(flag) 0
    #else
    #define PAGEALLOC_OBSERVED(flag) __builtin_expect(flag, 0)
    #endif
    """
    bint observed "PAGEALLOC_OBSERVED"(bint flag)

cdef bint blocks_are_noted
cdef bint waits_are_noted
cdef bint memory_is_followed

cdef int note_block(object block, int64_t nbytes, Py_ssize_t n_parts) except -1
cdef int note_growth(object block, int64_t nbytes, Py_ssize_t n_parts) except -1
cdef void note_memory(const void *memory, int64_t nbytes) noexcept with gil
cdef void forget_memory(const void *memory) noexcept with gil
cdef int note_wait() except -1
cdef void forget_wait() noexcept
