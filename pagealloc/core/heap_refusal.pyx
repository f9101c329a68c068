"""What a refused request is told.

Purpose
    Turn a heap's error codes into exceptions that say what was asked, what is held, and what would
    help.
Locking
    The GIL; the heap's mutexes one after another, for the counts.
Units
    Bytes.
"""

import errno as _errno
import os

from pagealloc.core.backing cimport (
    ERROR_ALIGNMENT,
    ERROR_BUDGET,
    ERROR_NO_HUGE_PAGES,
    ERROR_PLACEMENT,
)
from pagealloc.core.heap_counts cimport heap_counts, heap_counts_t
from pagealloc.core.heap_state cimport heap_t
from pagealloc.core.os_memory cimport os_huge_page_bytes, os_page_bytes

from pagealloc.errors import BackingUnavailableError, OutOfMemoryError
from pagealloc.units import format_bytes


cdef object refusal_of(
    heap_t *heap, str backing, size_t nbytes, size_t align_bytes, int error, Py_ssize_t n_blocks
):
    """The exception for `n_blocks` blocks that were refused with `error`."""
    cdef heap_counts_t counts = heap_counts(heap)
    all_bytes = <object>nbytes * n_blocks
    blocks = f"{n_blocks} blocks of " if n_blocks > 1 else ""
    asked = f"asked for {blocks}{nbytes} bytes ({format_bytes(all_bytes)})"
    if align_bytes > os_page_bytes():
        asked += f" aligned to {format_bytes(align_bytes)}"
    if error == ERROR_BUDGET:
        return OutOfMemoryError(
            f"{asked}: the budget of {format_bytes(heap.pages.budget_bytes)} has "
            f"{format_bytes(max(heap.pages.budget_bytes - counts.committed_bytes, 0))} left "
            f"({format_bytes(counts.live_bytes)} in use by {counts.n_live} live buffers); "
            f"close Buffers, or make the allocator with a larger budget_bytes"
        )
    huge_bytes = heap.pages.placement.hugetlb_bytes
    if error == ERROR_ALIGNMENT:
        return ValueError(
            f"{asked} with backing='hugetlb', whose memory is aligned to "
            f"{format_bytes(huge_bytes)} at most: ask for less, or use backing='auto'"
        )
    if error == ERROR_NO_HUGE_PAGES:
        return BackingUnavailableError(
            _errno.ENOMEM,
            f"{asked} with backing={backing!r}, and no touch of it was backed by a huge "
            f"page: allow them with 'echo madvise | sudo tee "
            f"/sys/kernel/mm/transparent_hugepage/enabled', or use backing='auto'",
        )
    if error == ERROR_PLACEMENT:
        return BackingUnavailableError(
            _errno.EPERM,
            f"{asked} with numa_node= or preferred=, and the kernel refused to bind memory to "
            f"a node (mbind): it has no NUMA support, or a sandbox forbids it; leave them out",
        )
    reason = os.strerror(error)
    if backing == "hugetlb":
        n_huge = -(-max(heap.pages.arena_bytes, all_bytes) // huge_bytes)
        command = f"sysctl vm.nr_hugepages={n_huge}"
        if huge_bytes != os_huge_page_bytes():
            command = (
                f"sh -c 'echo {n_huge} > "
                f"/sys/kernel/mm/hugepages/hugepages-{huge_bytes >> 10}kB/nr_hugepages'"
            )
        return BackingUnavailableError(
            error,
            f"{asked} with backing='hugetlb', and the kernel refused ({reason}): "
            f"its pool has too few free huge pages for an arena; reserve them with "
            f"'sudo {command}', or use backing='auto'",
        )
    return OutOfMemoryError(
        f"{asked}: the kernel refused ({reason}); {format_bytes(counts.reserved_bytes)} are "
        f"reserved and {format_bytes(counts.committed_bytes)} committed already; close "
        f"Buffers, call trim(), or raise the limit (ulimit -v, the cgroup's memory limit, "
        f"vm.max_map_count)"
    )
