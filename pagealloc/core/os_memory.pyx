"""Memory from the OS; every call of the kernel goes through the table of this room.

Purpose
    Reserve, back, purge and release memory; ask the machine what its pages are, what time it is
    and which NUMA node the caller runs on.  os_file and os_pages call the kernel as well, through
    the same table.
Structure
    caller -> os_xxx() -> refused(CALL)? -> the kernel
    `calls[CALL]` holds, for each kernel call, how often it was made and whether a test wants it
    refused.
Invariants
    os_page_bytes() is a power of two; os_huge_page_bytes() is a power of two and a multiple of it.
    0 <= os_numa_node() < os_numa_node_count() <= OS_MAX_NUMA_NODES
Locking
    None.  All of `calls` is atomic; one test at a time sets refusals.
Units
    Bytes throughout; nanoseconds for the clock.
"""

import errno as _errno
import os
from contextlib import contextmanager

from libc.errno cimport ENOMEM, ENOSYS, errno
from libc.stdint cimport int64_t, uintptr_t
from posix.mman cimport (
    MADV_DONTNEED,
    MAP_ANONYMOUS,
    MAP_FAILED,
    MAP_PRIVATE,
    PROT_READ,
    PROT_WRITE,
    madvise,
    mmap,
    mprotect,
    munmap,
)
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, clockid_t, timespec

from pagealloc.core.atomics cimport atomic_add_i64, atomic_load_i64, atomic_store_i64

from pagealloc.options import OPTIONS as _OPTIONS
from pagealloc.options import option_value
from pagealloc.units import parse_bytes

cdef extern from "os_compat.h" nogil:
    ctypedef unsigned char mincore_vec "PAGEALLOC_MINCORE_VEC"
    const int MADV_POPULATE_WRITE
    const int MAP_HUGETLB
    const int MAP_HUGE_SHIFT
    const int MAP_NORESERVE
    int mincore(void *address, size_t nbytes, mincore_vec *vec)
    int getcpu "pagealloc_getcpu"(unsigned *cpu, unsigned *node)
    void set_errno "pagealloc_set_errno"(int error)
    const int MEMBARRIER_PRIVATE_EXPEDITED "PAGEALLOC_MEMBARRIER_PRIVATE_EXPEDITED"
    const int MEMBARRIER_REGISTER "PAGEALLOC_MEMBARRIER_REGISTER_PRIVATE_EXPEDITED"
    int membarrier "pagealloc_membarrier"(int command)
    const clockid_t CLOCK_COARSE "PAGEALLOC_CLOCK_COARSE"
    void wait_briefly "pagealloc_wait_briefly"(int n_waits)

cdef extern from "<pthread.h>" nogil:
    int pthread_atfork(fork_hook prepare, fork_hook parent, fork_hook child)

CALL_NAMES = (
    "mmap", "munmap", "madvise", "mincore", "mprotect", "memfd_create", "fchmod",
    "ftruncate", "fallocate", "pwrite", "fstat", "membarrier", "getcpu", "mremap", "mbind",
    "move_pages", "pagemap", "vmstat", "pthread_create", "pipe",
)

cdef struct os_call:
    int64_t n_calls
    int64_t n_let_through   # calls that still succeed before the refusals begin
    int64_t n_refusals      # calls still to refuse; 0 = none, negative = every one
    int64_t refusal_errno

cdef os_call calls[N_CALLS]
cdef size_t page_bytes
cdef size_t real_page_bytes   # what the kernel counts in; equals page_bytes outside tests
cdef size_t huge_page_bytes
cdef int64_t max_mappings
cdef int numa_node_count = 1
cdef int64_t fork_generation = 0
cdef int64_t abandoned_nbytes = 0     # atomic
cdef bint has_barrier


cdef inline bint refused(int call) noexcept nogil:
    """Count one kernel call; true if a test wants it refused (errno is then set)."""
    cdef os_call *entry = &calls[call]
    atomic_add_i64(&entry.n_calls, 1)
    if atomic_load_i64(&entry.n_refusals) == 0:
        return False
    if atomic_load_i64(&entry.n_let_through) > 0:
        atomic_add_i64(&entry.n_let_through, -1)
        return False
    if atomic_load_i64(&entry.n_refusals) > 0:
        atomic_add_i64(&entry.n_refusals, -1)
    set_errno(<int>atomic_load_i64(&entry.refusal_errno))
    return True


cdef bint os_refused(int call) noexcept nogil:
    """As `refused`, for the other rooms that call the kernel."""
    return refused(call)


cdef size_t os_page_bytes() noexcept nogil:
    return page_bytes


cdef size_t os_real_page_bytes() noexcept nogil:
    """What the kernel counts in: os_page_bytes(), but in tests of larger pages."""
    return real_page_bytes


cdef size_t os_huge_page_bytes() noexcept nogil:
    return huge_page_bytes


cdef int64_t os_max_mappings() noexcept nogil:
    """How many mappings the kernel lets one process have (vm.max_map_count)."""
    return max_mappings


cdef int os_numa_node_count() noexcept nogil:
    """One more than the highest node that was online at import, OS_MAX_NUMA_NODES at most."""
    return numa_node_count


# ---------------------------------------------------------------------------------------------
# Now, here

cdef int64_t os_coarse_now_ns() noexcept nogil:
    """Time that only grows, right to a few milliseconds."""
    cdef timespec now
    clock_gettime(CLOCK_COARSE, &now)
    return <int64_t>now.tv_sec * 1000000000 + now.tv_nsec


cdef int64_t os_now_ns() noexcept nogil:
    """CLOCK_MONOTONIC.  Not in the table: it is read in user space and cannot be refused."""
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <int64_t>now.tv_sec * 1000000000 + now.tv_nsec


cdef int os_numa_node() noexcept nogil:
    """NUMA node of the CPU the caller runs on; 0 where the kernel does not say.

    The last node stands for those that came online since the import.
    """
    cdef unsigned cpu = 0, node = 0
    if refused(CALL_GETCPU) or getcpu(&cpu, &node) != 0:
        return 0
    return <int>node if node < <unsigned>numa_node_count else numa_node_count - 1


# ---------------------------------------------------------------------------------------------
# Private anonymous memory

cdef void *map_anonymous(size_t nbytes, int flags) noexcept nogil:
    cdef void *address
    if refused(CALL_MMAP):
        return NULL
    address = mmap(NULL, nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0)
    return NULL if address == MAP_FAILED else address


cdef void *os_reserve(size_t nbytes, size_t align_bytes) noexcept nogil:
    """Reserve `nbytes` of untouched, zero, private memory that starts on `align_bytes`.

    mmap promises page alignment only, so more is reserved and both ends are given back.
    """
    cdef size_t slack_bytes, head_bytes, tail_bytes
    cdef char *address
    if align_bytes < page_bytes:
        align_bytes = page_bytes
    slack_bytes = align_bytes - real_page_bytes
    if nbytes + slack_bytes < nbytes:
        set_errno(ENOMEM)
        return NULL
    address = <char *>map_anonymous(nbytes + slack_bytes, MAP_NORESERVE)
    if address == NULL or slack_bytes == 0:
        return address
    head_bytes = (align_bytes - <uintptr_t>address % align_bytes) % align_bytes
    tail_bytes = slack_bytes - head_bytes
    if head_bytes:
        os_abandon(address, head_bytes)
    if tail_bytes:
        os_abandon(address + head_bytes + nbytes, tail_bytes)
    return address + head_bytes


cdef void *os_reserve_hugetlb(size_t nbytes, size_t huge_page_bytes) noexcept nogil:
    """Reserve `nbytes` from the hugetlb pool, or fail with ENOMEM (ENOSYS where there is none).

    Without MAP_NORESERVE: the kernel sets the huge pages aside now, so that a later touch
    cannot meet an empty pool (which would be SIGBUS).
    """
    cdef int log2_bytes = 0
    if MAP_HUGETLB == 0:
        set_errno(ENOSYS)
        return NULL
    while (<size_t>1 << log2_bytes) < huge_page_bytes:
        log2_bytes += 1
    return map_anonymous(nbytes, MAP_HUGETLB | (log2_bytes << MAP_HUGE_SHIFT))


cdef int os_release(void *address, size_t nbytes) noexcept nogil:
    """Give the address range back to the kernel."""
    if refused(CALL_MUNMAP) or munmap(address, nbytes) != 0:
        return errno
    return 0


cdef void os_abandon(void *address, size_t nbytes) noexcept nogil:
    """Give up a range that nobody will ask for again; what the kernel refuses is counted."""
    if os_release(address, nbytes) != 0:
        atomic_add_i64(&abandoned_nbytes, <int64_t>nbytes)


cdef int os_advise(void *address, size_t nbytes, int advice) noexcept nogil:
    if refused(CALL_MADVISE) or madvise(address, nbytes, advice) != 0:
        return errno
    return 0


cdef int os_purge(void *address, size_t nbytes) noexcept nogil:
    """Give the backing back and keep the address: the next read finds zeros."""
    return os_advise(address, nbytes, MADV_DONTNEED)


cdef int64_t os_resident_bytes(void *address, size_t nbytes) noexcept nogil:
    """Physical bytes behind the range, by mincore; -1 if the kernel refused to say."""
    cdef size_t n_pages = nbytes // real_page_bytes
    cdef size_t done = 0, batch, i
    cdef int64_t n_resident = 0
    cdef mincore_vec vec[4096]
    while done < n_pages:
        batch = n_pages - done if n_pages - done < 4096 else 4096
        if refused(CALL_MINCORE) or mincore(
            <char *>address + done * real_page_bytes, batch * real_page_bytes, vec
        ) != 0:
            return -1
        for i in range(batch):
            n_resident += vec[i] & 1
        done += batch
    return n_resident * <int64_t>real_page_bytes


cdef int os_populate_write(void *address, size_t nbytes) noexcept nogil:
    """Allocate and map the range's pages at once (Linux 5.14); EINVAL on older kernels."""
    return os_advise(address, nbytes, MADV_POPULATE_WRITE)


cdef int os_protect_read_only(void *address, size_t nbytes) noexcept nogil:
    if refused(CALL_MPROTECT) or mprotect(address, nbytes, PROT_READ) != 0:
        return errno
    return 0


# ---------------------------------------------------------------------------------------------
# Threads

cdef bint os_has_barrier() noexcept nogil:
    """True if `os_barrier_all_threads` works in this kernel (Linux 4.14)."""
    return has_barrier


cdef int os_barrier_all_threads() noexcept nogil:
    """Make every running thread of this process pass a full memory barrier (membarrier)."""
    if refused(CALL_MEMBARRIER) or membarrier(MEMBARRIER_PRIVATE_EXPEDITED) != 0:
        return errno
    return 0


cdef void os_wait_briefly(int n_waits) noexcept nogil:
    """Let another thread run; `n_waits` says how often that was done in this wait already."""
    wait_briefly(n_waits)


# ---------------------------------------------------------------------------------------------
# Fork

cdef void count_fork() noexcept nogil:
    global fork_generation
    fork_generation += 1
    if has_barrier:
        membarrier(MEMBARRIER_REGISTER)     # in case the kernel registers a process, not its copy


cdef int os_at_fork(fork_hook prepare, fork_hook parent, fork_hook child) noexcept nogil:
    """Run the hooks around every fork() of this process (also those Python does not know of)."""
    return pthread_atfork(prepare, parent, child)


cdef int64_t os_fork_generation() noexcept nogil:
    """How many forks lie between this process and the one that imported the package."""
    return fork_generation


# ---------------------------------------------------------------------------------------------
# The Python face: what the machine has, and refusals for tests

def page_size_bytes() -> int:
    """Return the size of an OS page in bytes."""
    return page_bytes


def huge_page_size_bytes() -> int:
    """Return the size of a huge page in bytes, the kernel's PMD size (2 MiB with 4 KiB pages)."""
    return huge_page_bytes


def node_count() -> int:
    """Return how many NUMA nodes are told apart: 1 on most machines, at most 64."""
    return numa_node_count


def current_node() -> int:
    """Return the NUMA node the caller runs on, from 0; 0 where the kernel does not say."""
    return os_numa_node()


def abandoned_bytes() -> int:
    """Return how much address space the kernel refused to take back, in the whole process."""
    return atomic_load_i64(&abandoned_nbytes)


def call_counts() -> dict[str, int]:
    """Return how often each kernel call was made since import, refused ones included."""
    return {name: atomic_load_i64(&calls[i].n_calls) for i, name in enumerate(CALL_NAMES)}


def refuse(call: str, error: int = _errno.ENOMEM, *, skip: int = 0, times: int = -1) -> None:
    """Make a kernel call fail, for tests.

    Parameters
    ----------
    call : str
        One of `CALL_NAMES`.
    error : int
        The errno value it fails with.
    skip : int
        How many calls succeed first.
    times : int
        How many calls are refused after those; negative: every one; 0: none (the normal state).
    """
    cdef os_call *entry
    if call not in CALL_NAMES:
        raise ValueError(f"call={call!r} is none of {', '.join(CALL_NAMES)}")
    entry = &calls[<int>CALL_NAMES.index(call)]
    atomic_store_i64(&entry.n_let_through, skip)
    atomic_store_i64(&entry.refusal_errno, error)
    atomic_store_i64(&entry.n_refusals, times)


@contextmanager
def refusing(call: str, error: int = _errno.ENOMEM, *, skip: int = 0, times: int = -1):
    """Make a kernel call fail inside a ``with`` block; see `refuse`."""
    refuse(call, error, skip=skip, times=times)
    try:
        yield
    finally:
        refuse(call, times=0)


def _ask_machine() -> None:
    """Set the page sizes.

    Tests simulate larger ones: PAGEALLOC_PAGE_BYTES, of 16 or 64 KiB, and the huge pages that go
    with them on arm64, of 32 or 512 MiB, PAGEALLOC_HUGE_PAGE_BYTES.
    """
    global page_bytes, real_page_bytes, huge_page_bytes, max_mappings, has_barrier, numa_node_count
    real_bytes = os.sysconf("SC_PAGESIZE")
    wanted_bytes = parse_bytes(
        option_value("page_bytes") or real_bytes, name=_OPTIONS["page_bytes"].env
    )
    if not real_bytes <= wanted_bytes <= 65536 or wanted_bytes & (wanted_bytes - 1):
        raise ValueError(
            f"{_OPTIONS['page_bytes'].env}={wanted_bytes}: must be a power of two between "
            f"this machine's page of {real_bytes} bytes and 65536"
        )
    real_page_bytes = real_bytes
    page_bytes = wanted_bytes
    # PAGEALLOC_BARRIER=0: for tests of what happens in a kernel, or a sandbox, without it.
    has_barrier = option_value("barrier") != "0" and membarrier(MEMBARRIER_REGISTER) == 0
    huge_page_bytes = max(2 << 20, wanted_bytes)
    try:
        with open("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size", encoding="ascii") as file:
            huge_page_bytes = max(int(file.read()), wanted_bytes)
    except (OSError, ValueError):
        pass  # no THP in this kernel, or not Linux: 2 MiB stays the unit of a chunk
    wanted_bytes = parse_bytes(
        option_value("huge_page_bytes") or huge_page_bytes, name=_OPTIONS["huge_page_bytes"].env
    )
    if wanted_bytes < huge_page_bytes or wanted_bytes & (wanted_bytes - 1):
        raise ValueError(
            f"{_OPTIONS['huge_page_bytes'].env}={wanted_bytes}: must be a power of two, and at "
            f"least the {huge_page_bytes} bytes of a huge page here"
        )
    huge_page_bytes = wanted_bytes
    max_mappings = 65530
    try:
        with open("/proc/sys/vm/max_map_count", encoding="ascii") as file:
            max_mappings = int(file.read())
    except (OSError, ValueError):
        pass  # not Linux: its default is as good a guess as any
    try:
        with open("/sys/devices/system/node/online", encoding="ascii") as file:
            last_node = int(file.read().replace("-", ",").rpartition(",")[2])  # such as 0-1,8
            numa_node_count = min(last_node + 1, OS_MAX_NUMA_NODES)
    except (OSError, ValueError):
        pass  # no NUMA in this kernel, or not Linux: one node


_ask_machine()
if os_at_fork(NULL, NULL, count_fork) != 0:
    raise MemoryError("pthread_atfork refused to register pagealloc's fork handler")
