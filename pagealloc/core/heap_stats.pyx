"""What a heap holds, as Python sees it.

Purpose
    Read a heap's counts, its arenas and its classes, and make `AllocatorStats` of them.
Locking
    None of its own; the caller sees to it that the heap stays.
Units
    As in `counters`, which says how each figure is measured.
"""

import resource

from libc.stdint cimport int64_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from pagealloc.core.block_map cimport FIRST_RUN_CLASS
from pagealloc.core.heap_counts cimport (
    class_counts_t,
    heap_count_classes,
    heap_counts,
    heap_counts_t,
)
from pagealloc.core.heap_state cimport MAX_SIZE_CLASSES, heap_t, next_class
from pagealloc.core.page_heap cimport arena_report_t, page_heap_report

from pagealloc.core.counters import AllocatorStats, ArenaStats, ClassStats
from pagealloc.core.heap_options import BACKINGS as _BACKINGS
from pagealloc.core.os_memory import abandoned_bytes
from pagealloc.errors import OutOfMemoryError

cdef dict BACKING_NAMES = {ladder: name for name, ladder in _BACKINGS.items()}


def process_faults() -> int:
    """Return how many page faults this process has taken, minor and major."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_minflt + usage.ru_majflt


cdef list arena_stats(heap_t *heap, object backing):
    cdef arena_report_t *reports = NULL
    cdef int64_t capacity = 0, n_arenas = 16, i
    try:
        while n_arenas > capacity:      # more than there was room for: some came meanwhile
            capacity = 2 * n_arenas
            free(reports)
            reports = <arena_report_t *>calloc(capacity, sizeof(arena_report_t))
            if reports == NULL:
                raise OutOfMemoryError(f"no memory for a report of {capacity} arenas")
            with nogil:
                n_arenas = page_heap_report(&heap.pages, reports, capacity)
        stats = []
        for i in range(n_arenas):
            if reports[i].held_bytes < 0:
                raise OSError("the kernel refused to say (mincore) what an arena holds")
            stats.append(ArenaStats(
                address=<uintptr_t>reports[i].address,
                requested_backing=backing,
                achieved_backing=BACKING_NAMES[reports[i].achieved_backing],
                reserved_bytes=reports[i].reserved_bytes,
                committed_bytes=reports[i].committed_bytes,
                held_bytes=reports[i].held_bytes,
                huge_bytes=reports[i].huge_bytes if reports[i].huge_bytes >= 0 else None,
                numa_node=reports[i].node if reports[i].node >= 0 else None,
                dedicated=reports[i].dedicated,
            ))
        return stats
    finally:
        free(reports)


cdef list class_stats(heap_t *heap):
    """All classes of slots, and those of runs that have blocks."""
    cdef class_counts_t counts[MAX_SIZE_CLASSES]
    cdef int i
    memset(counts, 0, sizeof(counts))
    heap_count_classes(heap, counts)
    stats = []
    i = next_class(heap, 0)
    while i < MAX_SIZE_CLASSES:
        if i < FIRST_RUN_CLASS or counts[i].n_live or counts[i].n_idle:
            stats.append(ClassStats(
                block_bytes=counts[i].block_bytes,
                n_live=counts[i].n_live,
                n_idle=counts[i].n_idle,
                n_slabs=counts[i].n_slabs,
                n_unused=counts[i].n_unused_slots,
            ))
        i = next_class(heap, i)
    return stats


cdef object read_stats(heap_t *heap, object backing, object budget_bytes, object n_faults):
    """`n_faults` is what process_faults() said when the allocator was made."""
    cdef heap_counts_t counts = heap_counts(heap)
    arenas = arena_stats(heap, backing)
    huge_bytes = [arena.huge_bytes for arena in arenas]
    return AllocatorStats(
        budget_bytes=budget_bytes,
        reserved_bytes=counts.reserved_bytes,
        committed_bytes=counts.committed_bytes,
        active_bytes=counts.active_bytes,
        held_bytes=sum(arena.held_bytes for arena in arenas),
        huge_bytes=None if None in huge_bytes else sum(huge_bytes),
        live_bytes=counts.live_bytes,
        idle_bytes=counts.idle_bytes,
        purged_bytes=counts.purged_bytes,
        n_live=counts.n_live,
        n_allocs=counts.n_allocs,
        n_frees=counts.n_frees,
        n_failed=counts.n_failed,
        n_faults=process_faults() - n_faults,
        n_collections=counts.n_collections,
        n_conflicts=counts.n_conflicts,
        abandoned_bytes=abandoned_bytes(),
        arenas=tuple(arenas),
        classes=tuple(class_stats(heap)),
    )
