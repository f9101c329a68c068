"""Heap: the Python owner of one heap.

Purpose
    Read the settings, turn the heap's codes into exceptions that say what would help, show what it
    holds, and close it.
Structure
    PageAllocator --is a--> Heap --owns--> heap_t (heap.pyx)
    Buffer --keeps alive--> Heap
Invariants
    heap != NULL <=> not closed; a heap with something live is never unmapped
Locking
    None of its own: the GIL for the object's fields, the heap's own mutexes below.
Units
    Bytes.
"""

import errno as _errno
import os

from libc.stdint cimport int64_t, uintptr_t
from libc.stdlib cimport calloc, free

from pagealloc.core.arena cimport BACKING_AUTO, BACKING_BASE, BACKING_HUGETLB, BACKING_THP
from pagealloc.core.central cimport central_check
from pagealloc.core.heap cimport (
    class_counts_t,
    heap_alloc,
    heap_class_counts,
    heap_counts,
    heap_counts_t,
    heap_delete,
    heap_free,
    heap_new,
    heap_t,
    heap_trim,
)
from pagealloc.core.os_memory cimport os_huge_page_bytes, os_page_bytes
from pagealloc.core.page_heap cimport (
    ERROR_BUDGET,
    NOT_LIVE,
    NOT_OURS,
    arena_report_t,
    page_heap_check,
    page_heap_report,
)

from pagealloc.core.counters import AllocatorStats, ArenaStats, ClassStats
from pagealloc.errors import (
    BackingUnavailableError,
    ClosedError,
    InvariantError,
    OutOfMemoryError,
)
from pagealloc.units import format_bytes, parse_bytes

BACKINGS = {
    "auto": BACKING_AUTO, "hugetlb": BACKING_HUGETLB, "thp": BACKING_THP, "base": BACKING_BASE,
}
cdef dict BACKING_NAMES = {value: name for name, value in BACKINGS.items()}


cdef class Heap:
    """Owner of one heap; the base of `pagealloc.PageAllocator`, which adds the ways to allocate."""

    def __cinit__(self, *, backing="auto", arena_bytes="64MiB", budget_bytes=None):
        cdef size_t arena_nbytes
        cdef int64_t budget_nbytes = -1
        if not isinstance(backing, str) or backing not in BACKINGS:
            raise ValueError(f"backing={backing!r}: possible are {', '.join(map(repr, BACKINGS))}")
        arena_nbytes = parse_bytes(arena_bytes, name="arena_bytes", minimum=os_page_bytes())
        # Whole chunks, and at least 2 MiB: the unit of the page map and of huge pages.
        arena_nbytes = (arena_nbytes + (2 << 20) - 1) // (2 << 20) * (2 << 20)
        if budget_bytes is not None:
            budget_nbytes = parse_bytes(budget_bytes, name="budget_bytes")
        self.backing = backing
        self.arena_bytes = arena_nbytes
        self.budget_bytes = None if budget_bytes is None else budget_nbytes
        # A touch of a huge page commits all of it: a budget of a few would be spent on rounding.
        if backing == "auto" and 0 <= budget_nbytes < <int64_t>arena_nbytes:
            backing = "base"
        self.heap = heap_new(arena_nbytes, BACKINGS[backing], budget_nbytes)
        if self.heap == NULL:
            raise OutOfMemoryError("no memory for the tables of an allocator")

    def __dealloc__(self):
        # Every Buffer holds a reference to its heap, so what is still live belongs to callers by
        # address.  Unmapping would pull it away from under them: the heap is left to the process.
        if self.heap != NULL and self.n_live() == 0:
            with nogil:
                heap_delete(self.heap)

    cdef heap_t *open_heap(self) except NULL:
        if self.heap == NULL:
            raise ClosedError(f"this {type(self).__name__} is closed: make a new one")
        return self.heap

    cdef int64_t n_live(self) noexcept:
        cdef heap_counts_t counts = heap_counts(self.heap)
        return counts.n_allocs - counts.n_frees

    cdef object refusal(self, size_t nbytes, size_t align_bytes, int error):
        """The exception for a refused request; says what was asked, is held, and would help."""
        cdef heap_counts_t counts = heap_counts(self.heap)
        asked = f"asked for {nbytes} bytes ({format_bytes(nbytes)})"
        if align_bytes > os_page_bytes():
            asked += f" aligned to {format_bytes(align_bytes)}"
        if error == ERROR_BUDGET:
            return OutOfMemoryError(
                f"{asked}: the budget of {format_bytes(self.budget_bytes)} has "
                f"{format_bytes(max(self.budget_bytes - counts.committed_bytes, 0))} left "
                f"({format_bytes(counts.used_bytes)} in use by "
                f"{counts.n_allocs - counts.n_frees} live buffers); "
                f"close Buffers, or make the allocator with a larger budget_bytes"
            )
        reason = os.strerror(error)
        if self.backing == "hugetlb":
            n_huge = -(-max(self.arena_bytes, nbytes) // os_huge_page_bytes())
            return BackingUnavailableError(
                error,
                f"{asked} with backing='hugetlb', and the kernel refused ({reason}): "
                f"its pool has too few free huge pages for an arena; reserve them with "
                f"'sudo sysctl vm.nr_hugepages={n_huge}', or use backing='auto'",
            )
        if self.backing == "thp" and error in (_errno.EINVAL, _errno.ENOMEM):
            return BackingUnavailableError(
                error,
                f"{asked} with backing='thp', and no touch of it was backed by a huge page "
                f"({reason}): allow them with 'echo madvise | sudo tee "
                f"/sys/kernel/mm/transparent_hugepage/enabled', or use backing='auto'",
            )
        return OutOfMemoryError(
            f"{asked}: the kernel refused ({reason}); "
            f"{format_bytes(counts.reserved_bytes)} are reserved and "
            f"{format_bytes(counts.committed_bytes)} committed already; close Buffers, call trim(), or "
            f"raise the limit (ulimit -v, the cgroup's memory limit, vm.max_map_count)"
        )

    @property
    def closed(self) -> bool:
        """True after `close()`."""
        return self.heap == NULL

    def trim(self) -> int:
        """Give all free memory back to the kernel.

        Returns
        -------
        int
            Physical bytes that went back, counted page by page before they did.

        Notes
        -----
        Thread-safe.  Under THP only whole huge pages go back; hugetlb memory goes back with its
        arena.
        """
        cdef heap_t *heap = self.open_heap()
        cdef int64_t purged_bytes
        with nogil:
            purged_bytes = heap_trim(heap)
        return purged_bytes

    def check(self) -> None:
        """Verify every invariant of the heap's structures.

        Raises
        ------
        InvariantError
            One is broken, which is a defect of pagealloc.

        Notes
        -----
        Takes each lock in turn: exact only while no other thread allocates or frees.
        """
        cdef heap_t *heap = self.open_heap()
        cdef const char *broken = NULL
        cdef int i
        with nogil:
            for i in range(heap.classes.n_classes):
                broken = central_check(&heap.centrals[i])
                if broken != NULL:
                    break
            if broken == NULL:
                broken = page_heap_check(&heap.pages)
        if broken != NULL:
            raise InvariantError(broken.decode())

    def stats(self):
        """Return what the heap holds now, as `AllocatorStats`.

        Held bytes are counted by mincore, which takes some 10 ns a committed page.  Thread-safe;
        the fields are read one after another, not in one instant.
        """
        cdef heap_t *heap = self.open_heap()
        cdef heap_counts_t counts = heap_counts(heap)
        cdef class_counts_t class_counts
        cdef int64_t live_bytes = counts.used_bytes
        cdef int i
        arenas = self._arena_stats()
        classes = []
        for i in range(heap.classes.n_classes):
            class_counts = heap_class_counts(heap, i)
            live_bytes += class_counts.n_live * class_counts.slot_bytes - class_counts.slab_bytes
            classes.append(ClassStats(
                slot_bytes=class_counts.slot_bytes,
                n_live=class_counts.n_live,
                n_free=class_counts.n_slots - class_counts.n_live,
                n_slabs=class_counts.n_slabs,
            ))
        return AllocatorStats(
            budget_bytes=self.budget_bytes,
            reserved_bytes=counts.reserved_bytes,
            committed_bytes=counts.committed_bytes,
            held_bytes=sum(arena.held_bytes for arena in arenas),
            live_bytes=live_bytes,
            n_live=counts.n_allocs - counts.n_frees,
            n_allocs=counts.n_allocs,
            n_frees=counts.n_frees,
            n_failed=counts.n_failed,
            arenas=tuple(arenas),
            classes=tuple(classes),
        )

    cdef list _arena_stats(self):
        cdef heap_t *heap = self.open_heap()
        cdef int64_t n_reports = page_heap_report(&heap.pages, NULL, 0) + 16    # more may come
        cdef int64_t n_arenas, i
        cdef arena_report_t *reports = <arena_report_t *>calloc(n_reports, sizeof(arena_report_t))
        if reports == NULL:
            raise OutOfMemoryError(f"no memory for a report of {n_reports} arenas")
        try:
            with nogil:
                n_arenas = page_heap_report(&heap.pages, reports, n_reports)
            stats = []
            for i in range(min(n_arenas, n_reports)):
                if reports[i].held_bytes < 0:
                    raise OSError("the kernel refused to say (mincore) what an arena holds")
                stats.append(ArenaStats(
                    address=<uintptr_t>reports[i].address,
                    requested_backing=self.backing,
                    achieved_backing=BACKING_NAMES[reports[i].achieved_backing],
                    reserved_bytes=reports[i].reserved_bytes,
                    committed_bytes=reports[i].committed_bytes,
                    held_bytes=reports[i].held_bytes,
                    dedicated=reports[i].dedicated,
                ))
            return stats
        finally:
            free(reports)

    def close(self) -> None:
        """Give everything back to the kernel; closing twice is fine.

        Raises
        ------
        BufferError
            Buffers of this allocator are still open; nothing was closed.
        OSError
            The kernel refused to unmap; the allocator is still open.
        """
        cdef int error
        cdef int64_t n_live
        if self.heap == NULL:
            return
        n_live = self.n_live()
        if n_live:
            raise BufferError(
                f"{n_live} live buffer{'s' if n_live > 1 else ''} of this allocator: "
                f"close them (and drop arrays over them) first"
            )
        with nogil:
            error = heap_delete(self.heap)
        if error:
            raise OSError(error, f"the kernel refused to unmap an arena: {os.strerror(error)}")
        self.heap = NULL

    def __enter__(self):
        self.open_heap()
        return self

    def __exit__(self, *exc_info):
        self.close()

    def __reduce_ex__(self, protocol):
        raise TypeError(f"a {type(self).__name__} owns memory of this process: no copy, no pickle")

    def __repr__(self):
        cdef heap_counts_t counts
        if self.heap == NULL:
            return f"<{type(self).__name__} closed>"
        counts = heap_counts(self.heap)
        budget = "no budget" if self.budget_bytes is None else (
            f"budget {format_bytes(self.budget_bytes)}"
        )
        return (
            f"<{type(self).__name__} backing={self.backing!r}, {budget}: "
            f"{counts.n_allocs - counts.n_frees} live, "
            f"{format_bytes(counts.committed_bytes)} committed of "
            f"{format_bytes(counts.reserved_bytes)} reserved>"
        )


# ---------------------------------------------------------------------------------------------
# The nogil calls by address, as C callers use them; misuse is an error there as well

def alloc_address(Heap heap, nbytes: int, align_bytes: int = 0) -> int:
    """Allocate without a Buffer and return the address; `free_address` must take it back."""
    cdef heap_t *c_heap = heap.open_heap()
    cdef size_t length = parse_bytes(nbytes)
    cdef size_t align = align_bytes
    cdef bint fresh
    cdef int error
    cdef char *address
    with nogil:
        address = heap_alloc(c_heap, length, align, &fresh, &error)
    if address == NULL:
        raise heap.refusal(length, align, error)
    return <uintptr_t>address


def free_address(Heap heap, address: int) -> None:
    """Give back what `alloc_address` gave.

    Raises
    ------
    ValueError
        No slot or run of this heap starts at `address`, or it is free already; nothing was
        changed.
    """
    cdef heap_t *c_heap = heap.open_heap()
    cdef char *c_address = <char *><uintptr_t>address
    cdef int outcome
    with nogil:
        outcome = heap_free(c_heap, c_address)
    if outcome == NOT_LIVE:
        raise ValueError(f"double free: the slot at {address:#x} is free already")
    if outcome == NOT_OURS:
        raise ValueError(
            f"foreign pointer: no live slot or run of this allocator starts at {address:#x} "
            f"(freed already, inside a slot, or another allocator's)"
        )
