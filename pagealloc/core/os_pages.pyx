"""What the kernel knows of single pages.

Purpose
    Count the physical memory that is this process's alone, and the part of it that huge pages map;
    see huge pages being split; put other pages in their place, or guards; say on which NUMA node
    pages shall lie, and do lie.
Structure
    /proc/self/pagemap: one word a page        -> os_private_bytes
                        PAGEMAP_SCAN (ioctl)   -> os_huge_bytes
    /proc/vmstat: thp_split_page               -> os_n_huge_pages_split
    mbind, move_pages                          -> os_bind_to_node, os_node_of_page
Locking
    None.  Files are opened for each call: a descriptor kept would be the parent's after a fork.
Units
    Bytes; node numbers.
"""

from libc.errno cimport EINVAL, errno
from libc.stdint cimport int64_t, uint64_t, uintptr_t
from libc.stdlib cimport strtoll
from libc.string cimport strlen, strstr
from posix.fcntl cimport O_RDONLY, open
from posix.mman cimport MAP_FAILED, PROT_NONE, PROT_READ, PROT_WRITE, mprotect
from posix.unistd cimport close, pipe, pread, read, write

from pagealloc.core.atomics cimport atomic_load_i64, atomic_store_i64
from pagealloc.core.os_memory cimport (
    MADV_GUARD_INSTALL,
    MADV_GUARD_REMOVE,
    CALL_MBIND,
    CALL_MOVE_PAGES,
    CALL_MPROTECT,
    CALL_MREMAP,
    CALL_PAGEMAP,
    CALL_PIPE,
    CALL_VMSTAT,
    os_advise,
    os_purge,
    os_real_page_bytes,
    os_refused,
    os_resident_bytes,
)

cdef extern from "os_compat.h" nogil:
    const int O_CLOEXEC
    const int MPOL_PREFERRED "PAGEALLOC_MPOL_PREFERRED"
    const int MPOL_BIND "PAGEALLOC_MPOL_BIND"
    void *move_onto "pagealloc_move_onto"(
        void *source, size_t nbytes, void *to, size_t to_nbytes
    )
    int mbind "pagealloc_mbind"(void *address, size_t nbytes, int mode, uint64_t nodes)
    int pages_nodes "pagealloc_pages_nodes"(unsigned long n, void **pages, int *nodes)
    int64_t scan_huge "pagealloc_scan_huge"(int fd, uint64_t start, uint64_t end)

cdef enum:
    PAGEMAP_EXCLUSIVE = 56      # bits of a word, Documentation/admin-guide/mm/pagemap.rst
    PAGEMAP_PRESENT = 63
    BATCH_PAGES = 1024
    VMSTAT_BYTES = 32768        # it takes 6,000

cdef int64_t guards_are_mappings = False    # MADV_GUARD_INSTALL is not to be had; atomic


cdef int open_pagemap() noexcept nogil:
    if os_refused(CALL_PAGEMAP):
        return -1
    return open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC)


cdef int64_t os_private_bytes(void *address, size_t nbytes) noexcept nogil:
    """Physical bytes behind the range that would go back if it were purged.

    Not counted: pages that a forked process shares, and the page of zeros behind what was only
    read.  Where there is no pagemap, mincore's answer, which counts both; -1 if that is refused.
    """
    cdef uint64_t words[BATCH_PAGES]
    cdef uint64_t wanted = <uint64_t>1 << PAGEMAP_PRESENT | <uint64_t>1 << PAGEMAP_EXCLUSIVE
    cdef size_t page_bytes = os_real_page_bytes()
    cdef uintptr_t page = <uintptr_t>address // page_bytes
    cdef uintptr_t end = page + nbytes // page_bytes
    cdef int64_t n_private = 0
    cdef ssize_t n_read, i
    cdef int fd = open_pagemap()
    if fd < 0:
        return os_resident_bytes(address, nbytes)
    while page < end:
        n_read = pread(
            fd, words, (end - page if end - page < BATCH_PAGES else BATCH_PAGES) * sizeof(uint64_t),
            <int64_t>(page * sizeof(uint64_t))
        ) // <ssize_t>sizeof(uint64_t)
        if n_read <= 0:
            close(fd)
            return os_resident_bytes(address, nbytes)
        for i in range(n_read):
            n_private += words[i] & wanted == wanted
        page += <uintptr_t>n_read
    close(fd)
    return n_private * <int64_t>page_bytes


cdef int64_t os_huge_bytes(const void *address, size_t nbytes) noexcept nogil:
    """Bytes of the range that huge pages map; -1 if the kernel cannot say (before Linux 6.7)."""
    cdef int fd = open_pagemap()
    cdef int64_t huge_bytes
    if fd < 0:
        return -1
    huge_bytes = scan_huge(fd, <uintptr_t>address, <uintptr_t>address + nbytes)
    close(fd)
    return huge_bytes


cdef int64_t os_n_huge_pages_split() noexcept nogil:
    """How many huge pages the kernel has split since it started; -1 if it does not say."""
    cdef char text[VMSTAT_BYTES]
    cdef const char *found
    cdef ssize_t n_read = 0, n
    cdef int fd
    if os_refused(CALL_VMSTAT):
        return -1
    fd = open("/proc/vmstat", O_RDONLY | O_CLOEXEC)
    if fd < 0:
        return -1
    n = 1
    while n > 0 and n_read < VMSTAT_BYTES - 1:
        n = read(fd, text + n_read, <size_t>(VMSTAT_BYTES - 1 - n_read))
        if n > 0:
            n_read += n
    close(fd)
    text[n_read] = 0
    found = strstr(text, "\nthp_split_page ")
    return -1 if found == NULL else strtoll(found + strlen("\nthp_split_page "), NULL, 10)


cdef size_t os_copy(char *to, const char *source, size_t nbytes) noexcept nogil:
    """Copy memory of this process; how much could be read.  No signal comes of what could not.

    Through a pipe, a page at a time, which always has room: write() answers EFAULT where a load
    would be SIGBUS.  (process_vm_readv pins the pages; of those that a fork shares it first takes
    private copies, from the very pool that may be empty.)
    """
    cdef size_t n_copied = 0, page_bytes = os_real_page_bytes()
    cdef ssize_t n
    cdef int[2] ends
    if os_refused(CALL_PIPE) or pipe(ends) != 0:
        return 0
    while n_copied < nbytes:
        n = write(ends[1], source + n_copied, min(nbytes - n_copied, page_bytes))
        if n <= 0 or read(ends[0], to + n_copied, n) != n:
            break
        n_copied += n
    close(ends[0])
    close(ends[1])
    return n_copied


cdef int os_move_onto(
    void *source, size_t nbytes, void *to, size_t to_nbytes
) noexcept nogil:
    """Move a mapping to where another one is, or none, and make it longer or shorter."""
    if os_refused(CALL_MREMAP) or move_onto(source, nbytes, to, to_nbytes) == MAP_FAILED:
        return errno
    return 0


cdef int os_guard(void *address, size_t nbytes) noexcept nogil:
    """Let an access of the range be a fault from now on; what is in it is lost.

    By entries in the page tables where the kernel has those (Linux 6.13); else by a mapping of its
    own that forbids all access, of which there may be a limited number.
    """
    cdef int error
    if not atomic_load_i64(&guards_are_mappings):
        error = os_advise(address, nbytes, MADV_GUARD_INSTALL)
        if error != EINVAL:
            return error
        atomic_store_i64(&guards_are_mappings, True)
    if os_refused(CALL_MPROTECT) or mprotect(address, nbytes, PROT_NONE) != 0:
        return errno
    os_purge(address, nbytes)
    return 0


cdef int os_unguard(void *address, size_t nbytes) noexcept nogil:
    """Let the range be memory again; what was guarded is zero, and what was not is as it was."""
    cdef int error
    if atomic_load_i64(&guards_are_mappings) and (
        os_refused(CALL_MPROTECT) or mprotect(address, nbytes, PROT_READ | PROT_WRITE) != 0
    ):
        return errno
    error = os_advise(address, nbytes, MADV_GUARD_REMOVE)
    return 0 if error == EINVAL else error      # the kernel has no such guards


cdef int os_bind_to_node(void *address, size_t nbytes, int node, bint strict) noexcept nogil:
    """Have the range backed from a node from now on: from no other, or from others if need be."""
    if os_refused(CALL_MBIND) or mbind(
        address, nbytes, MPOL_BIND if strict else MPOL_PREFERRED, <uint64_t>1 << node
    ) != 0:
        return errno
    return 0


cdef int os_node_of_page(void *address) noexcept nogil:
    """The node the page lies on; negative if it is not backed, or the kernel does not say."""
    cdef int node = -1
    if os_refused(CALL_MOVE_PAGES) or pages_nodes(1, &address, &node) != 0:
        return -1
    return node
