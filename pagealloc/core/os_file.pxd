"""The one sparse file of a store; functions return 0 or an errno value, but where they say so."""

from libc.stdint cimport int64_t

cdef int os_file_create(const char *name, bint is_hugetlb, int *fd) noexcept nogil
cdef int os_file_close(int fd) noexcept nogil
cdef int os_file_grow(int fd, int64_t nbytes) noexcept nogil
cdef int os_file_commit(int fd, int64_t offset, int64_t nbytes) noexcept nogil
cdef int os_file_punch(int fd, int64_t offset, int64_t nbytes) noexcept nogil
cdef int os_file_write(int fd, const void *source, size_t nbytes, int64_t offset) noexcept nogil
cdef int64_t os_file_held_bytes(int fd) noexcept nogil
cdef int os_map_file_to_read(
    void *address, size_t nbytes, int fd, int64_t offset
) noexcept nogil
cdef int os_map_file(void *address, size_t nbytes, int fd, int64_t offset) noexcept nogil
cdef int os_map_file_private(
    void *address, size_t nbytes, int fd, int64_t offset
) noexcept nogil
cdef int os_map_zeros(void *address, size_t nbytes) noexcept nogil
