"""What the kernel knows of single pages of this process, and what may be asked of them.

Conventions and refusals as in os_memory.
"""

from libc.stdint cimport int64_t

cdef int64_t os_private_bytes(void *address, size_t nbytes) noexcept nogil
cdef int64_t os_huge_bytes(const void *address, size_t nbytes) noexcept nogil
cdef int64_t os_n_huge_pages_split() noexcept nogil
cdef size_t os_copy(char *to, const char *source, size_t nbytes) noexcept nogil
cdef int os_move_onto(
    void *source, size_t nbytes, void *to, size_t to_nbytes
) noexcept nogil
cdef int os_guard(void *address, size_t nbytes) noexcept nogil
cdef int os_unguard(void *address, size_t nbytes) noexcept nogil
cdef int os_bind_to_node(void *address, size_t nbytes, int node, bint strict) noexcept nogil
cdef int os_node_of_page(void *address) noexcept nogil
