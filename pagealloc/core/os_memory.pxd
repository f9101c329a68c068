"""The OS, as the rest of the core may see it.

Purpose: the rooms that call the kernel are this one, os_file and os_pages.  Every call goes through
one table that tests can make refuse (``os_memory.refusing``).

Conventions: a function that returns ``int`` returns 0 or an errno value; one that returns a
pointer returns NULL and leaves ``errno`` set.  All addresses and lengths are in bytes and
multiples of a page.  Locking: none; the kernel locks.
"""

from libc.stdint cimport int64_t

cdef extern from "os_compat.h" nogil:
    const int MADV_HUGEPAGE
    const int MADV_NOHUGEPAGE
    const int MADV_DONTDUMP
    const int MADV_COLLAPSE
    const int MADV_COLD
    const int MADV_GUARD_INSTALL
    const int MADV_GUARD_REMOVE
    const int MADV_WIPEONFORK

cdef enum:                  # what tests may have refused, in the order of CALL_NAMES
    CALL_MMAP
    CALL_MUNMAP
    CALL_MADVISE
    CALL_MINCORE
    CALL_MPROTECT
    CALL_MEMFD_CREATE
    CALL_FCHMOD
    CALL_FTRUNCATE
    CALL_FALLOCATE
    CALL_PWRITE
    CALL_FSTAT
    CALL_MEMBARRIER
    CALL_GETCPU
    CALL_MREMAP
    CALL_MBIND
    CALL_MOVE_PAGES
    CALL_PAGEMAP
    CALL_VMSTAT
    CALL_PTHREAD_CREATE
    CALL_PIPE
    N_CALLS

cdef enum:
    OS_MAX_NUMA_NODES = 64    # nodes from here on are counted as the last one

cdef bint os_refused(int call) noexcept nogil

# Asked of the machine once, at import.
cdef size_t os_page_bytes() noexcept nogil
cdef size_t os_real_page_bytes() noexcept nogil
cdef size_t os_huge_page_bytes() noexcept nogil
cdef int64_t os_max_mappings() noexcept nogil
cdef int os_numa_node_count() noexcept nogil

# --- now, here ---
cdef int64_t os_now_ns() noexcept nogil
cdef int64_t os_coarse_now_ns() noexcept nogil
cdef int os_numa_node() noexcept nogil

# --- private anonymous memory: arenas and metadata ---
cdef void *os_reserve(size_t nbytes, size_t align_bytes) noexcept nogil
cdef void *os_reserve_hugetlb(size_t nbytes, size_t huge_page_bytes) noexcept nogil
cdef int os_release(void *address, size_t nbytes) noexcept nogil
cdef void os_abandon(void *address, size_t nbytes) noexcept nogil
cdef int os_advise(void *address, size_t nbytes, int advice) noexcept nogil
cdef int os_purge(void *address, size_t nbytes) noexcept nogil
cdef int64_t os_resident_bytes(void *address, size_t nbytes) noexcept nogil
cdef int os_populate_write(void *address, size_t nbytes) noexcept nogil
cdef int os_protect_read_only(void *address, size_t nbytes) noexcept nogil

# --- threads ---
cdef bint os_has_barrier() noexcept nogil
cdef int os_barrier_all_threads() noexcept nogil
cdef void os_wait_briefly(int n_waits) noexcept nogil

# --- fork ---
ctypedef void (*fork_hook)() noexcept nogil
cdef int os_at_fork(fork_hook prepare, fork_hook parent, fork_hook child) noexcept nogil
cdef int64_t os_fork_generation() noexcept nogil
