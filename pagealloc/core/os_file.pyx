"""The one sparse file of a store.

Purpose
    Create it, grow it, commit and punch its pages, and map them.
Locking
    None: a store's callers hold its lock; the kernel locks the file.
Units
    Bytes.
"""

from libc.errno cimport EINTR, ENOSYS, errno
from libc.stdint cimport int64_t
from posix.mman cimport (
    MAP_ANONYMOUS,
    MAP_FAILED,
    MAP_FIXED,
    MAP_PRIVATE,
    MAP_SHARED,
    PROT_READ,
    PROT_WRITE,
    mmap,
)
from posix.stat cimport fchmod, fstat, struct_stat
from posix.unistd cimport close, ftruncate, pwrite

from pagealloc.core.os_memory cimport (
    CALL_FALLOCATE,
    CALL_FCHMOD,
    CALL_FSTAT,
    CALL_FTRUNCATE,
    CALL_MEMFD_CREATE,
    CALL_MMAP,
    CALL_PWRITE,
    os_huge_page_bytes,
    os_refused,
)

cdef extern from "os_compat.h" nogil:
    const int MAP_NORESERVE
    const unsigned MFD_ALLOW_SEALING
    const unsigned MFD_CLOEXEC
    const unsigned MFD_HUGETLB
    const unsigned MAP_HUGE_SHIFT
    const int FALLOC_FL_KEEP_SIZE
    const int FALLOC_FL_PUNCH_HOLE
    int memfd_create(const char *name, unsigned flags)
    int fallocate(int fd, int mode, int64_t offset, int64_t nbytes)


cdef unsigned log2_of(size_t power_of_two) noexcept nogil:
    cdef unsigned exponent = 0
    while <size_t>1 << exponent < power_of_two:
        exponent += 1
    return exponent


cdef int os_file_create(const char *name, bint is_hugetlb, int *fd) noexcept nogil:
    """Create an empty memfd that only this user may reopen (mode 0600; the default is 0777).

    `is_hugetlb`: of huge pages from the machine's pool, as large as a huge page is here.
    """
    cdef unsigned flags = MFD_CLOEXEC | MFD_ALLOW_SEALING
    cdef int error
    if os_refused(CALL_MEMFD_CREATE):
        return errno
    if is_hugetlb:
        if MFD_HUGETLB == 0:
            return ENOSYS
        flags |= MFD_HUGETLB | (log2_of(os_huge_page_bytes()) << MAP_HUGE_SHIFT)
    fd[0] = memfd_create(name, flags)
    if fd[0] < 0:
        return errno
    if os_refused(CALL_FCHMOD) or fchmod(fd[0], 0o600) != 0:
        error = errno
        close(fd[0])
        fd[0] = -1
        return error
    return 0


cdef int os_file_close(int fd) noexcept nogil:
    return errno if close(fd) != 0 else 0


cdef int os_file_grow(int fd, int64_t nbytes) noexcept nogil:
    """Make the file `nbytes` long, sparse: no page is allocated."""
    if os_refused(CALL_FTRUNCATE) or ftruncate(fd, nbytes) != 0:
        return errno
    return 0


cdef int allocate(int fd, int mode, int64_t offset, int64_t nbytes) noexcept nogil:
    cdef int status = -1
    while status != 0:
        if os_refused(CALL_FALLOCATE):
            return errno
        status = fallocate(fd, mode, offset, nbytes)
        if status != 0 and errno != EINTR:
            return errno
    return 0


cdef int os_file_commit(int fd, int64_t offset, int64_t nbytes) noexcept nogil:
    """Allocate the file's pages in the range; ENOSPC or ENOMEM instead of a later SIGBUS."""
    return allocate(fd, 0, offset, nbytes)


cdef int os_file_punch(int fd, int64_t offset, int64_t nbytes) noexcept nogil:
    """Give the range's pages back and leave a hole."""
    return allocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, nbytes)


cdef int os_file_write(int fd, const void *source, size_t nbytes, int64_t offset) noexcept nogil:
    """Write all of `source` at `offset`; commits the pages it covers, or fails with a code."""
    cdef size_t done = 0
    cdef ssize_t written
    while done < nbytes:
        if os_refused(CALL_PWRITE):
            return errno
        written = pwrite(fd, <const char *>source + done, nbytes - done, offset + <int64_t>done)
        if written < 0 and errno != EINTR:
            return errno
        if written > 0:
            done += <size_t>written
    return 0


cdef int64_t os_file_held_bytes(int fd) noexcept nogil:
    """Physical bytes of the file; -1 if the kernel refused to say."""
    cdef struct_stat status
    if os_refused(CALL_FSTAT) or fstat(fd, &status) != 0:
        return -1
    return <int64_t>status.st_blocks * 512


cdef int os_map_file(void *address, size_t nbytes, int fd, int64_t offset) noexcept nogil:
    """Map the file's range over `address`, shared and writable, replacing what was mapped there."""
    return map_over(address, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, offset)


cdef int os_map_file_to_read(
    void *address, size_t nbytes, int fd, int64_t offset
) noexcept nogil:
    """As os_map_file, of a file that may only be read."""
    return map_over(address, nbytes, PROT_READ, MAP_SHARED, fd, offset)


cdef int os_map_file_private(
    void *address, size_t nbytes, int fd, int64_t offset
) noexcept nogil:
    """As os_map_file, but whoever writes to a page there gets a copy of it."""
    return map_over(address, nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, offset)


cdef int os_map_zeros(void *address, size_t nbytes) noexcept nogil:
    """Replace what was mapped there with memory that nothing stands behind yet."""
    return map_over(address, nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)


cdef int map_over(
    void *address, size_t nbytes, int protection, int flags, int fd, int64_t offset
) noexcept nogil:
    if os_refused(CALL_MMAP) or mmap(
        address, nbytes, protection, flags | MAP_FIXED | MAP_NORESERVE, fd, offset
    ) == MAP_FAILED:
        return errno
    return 0
