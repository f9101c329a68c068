"""A heap: alloc, free, trim, check, nogil; and the process-wide state of the core.

Purpose
    Send each request to the room that serves it, and each address back to where it came from.
Structure
    heap_alloc(n) -> n <= half a page -> size class -> central list -> (slab from the page heap)
                  -> else             -> page heap: a run of exactly ceil(n / page) pages
    heap_free(p)  -> page map -> arena -> run -> slab's slot, or the run itself
Invariants
    n_allocs - n_frees = slots and runs that are live
    every open heap is in the registry, so that a fork finds all mutexes
Locking
    Order: registry, central lists by class, page heap, page map.  Fork takes them all in this
    order before and releases them after, in the parent and in the child.
Units
    Bytes.
"""

import errno as _errno
import os

from libc.stdint cimport int64_t, uintptr_t
from libc.stdlib cimport calloc, free

from pagealloc.core.atomics cimport atomic_add_i64, atomic_load_i64
from pagealloc.core.central cimport (
    central_alloc,
    central_check,
    central_destroy,
    central_free,
    central_init,
    central_trim,
    slab_t,
)
from pagealloc.core.arena cimport BACKING_AUTO, BACKING_BASE, BACKING_HUGETLB, BACKING_THP
from pagealloc.core.mutex cimport mutex_init, mutex_lock, mutex_t, mutex_unlock
from pagealloc.core.os_memory cimport os_at_fork, os_huge_page_bytes, os_page_bytes
from pagealloc.core.page_heap cimport (
    ERROR_BUDGET,
    FREED,
    IN_SLAB,
    NOT_LIVE,
    NOT_OURS,
    arena_report_t,
    page_heap_alloc,
    page_heap_check,
    page_heap_destroy,
    page_heap_free_at,
    page_heap_init,
    page_heap_report,
    page_heap_trim,
)
from pagealloc.core.page_map cimport page_map_init, page_map_t
from pagealloc.core.page_run cimport RUN_LIVE, run_t
from pagealloc.core.size_class cimport (
    NO_CLASS,
    SLOT_UNIT_BYTES,
    size_class_aligned,
    size_class_of,
    size_classes_init,
)

from pagealloc.core.counters import AllocatorStats, ArenaStats, ClassStats
from pagealloc.errors import (
    BackingUnavailableError,
    ClosedError,
    InvariantError,
    OutOfMemoryError,
)
from pagealloc.units import format_bytes, parse_bytes

# The process-wide state: one page map, one list of heaps.
cdef page_map_t process_map
cdef mutex_t registry_mutex
cdef heap_t *registry = NULL

BACKINGS = {
    "auto": BACKING_AUTO, "hugetlb": BACKING_HUGETLB, "thp": BACKING_THP, "base": BACKING_BASE,
}
cdef dict BACKING_NAMES = {value: name for name, value in BACKINGS.items()}


# ---------------------------------------------------------------------------------------------
# Life and death

cdef heap_t *heap_new(size_t arena_bytes, int backing, int64_t budget_bytes) noexcept nogil:
    cdef heap_t *heap = <heap_t *>calloc(1, sizeof(heap_t))
    cdef int i
    if heap == NULL:
        return NULL
    size_classes_init(&heap.classes, os_page_bytes())
    page_heap_init(
        &heap.pages, &process_map, heap, os_page_bytes(), arena_bytes, backing, budget_bytes
    )
    for i in range(heap.classes.n_classes):
        central_init(&heap.centrals[i], &heap.pages, heap.classes.slot_bytes[i])
    enter_registry(heap)
    return heap


cdef int heap_delete(heap_t *heap) noexcept nogil:
    """Unmap everything; nothing may be live.  An errno value, the heap still usable, on refusal."""
    cdef int i, error
    heap_trim(heap)
    leave_registry(heap)    # before its mutexes go: a fork takes those of every registered heap
    error = page_heap_destroy(&heap.pages)
    if error:
        enter_registry(heap)
        return error
    for i in range(heap.classes.n_classes):
        central_destroy(&heap.centrals[i])
    free(heap)
    return 0


cdef void enter_registry(heap_t *heap) noexcept nogil:
    global registry
    mutex_lock(&registry_mutex)
    heap.previous = NULL
    heap.next = registry
    if heap.next != NULL:
        heap.next.previous = heap
    registry = heap
    mutex_unlock(&registry_mutex)


cdef void leave_registry(heap_t *heap) noexcept nogil:
    global registry
    mutex_lock(&registry_mutex)
    if heap.next != NULL:
        heap.next.previous = heap.previous
    if heap.previous != NULL:
        heap.previous.next = heap.next
    else:
        registry = heap.next
    mutex_unlock(&registry_mutex)


cdef void lock_all() noexcept nogil:
    cdef heap_t *heap
    cdef int i
    mutex_lock(&registry_mutex)
    heap = registry
    while heap != NULL:
        for i in range(heap.classes.n_classes):
            mutex_lock(&heap.centrals[i].mutex)
        mutex_lock(&heap.pages.mutex)
        heap = heap.next
    mutex_lock(&process_map.mutex)


cdef void unlock_all() noexcept nogil:
    cdef heap_t *heap = registry
    cdef int i
    mutex_unlock(&process_map.mutex)
    while heap != NULL:
        mutex_unlock(&heap.pages.mutex)
        for i in range(heap.classes.n_classes):
            mutex_unlock(&heap.centrals[i].mutex)
        heap = heap.next
    mutex_unlock(&registry_mutex)


# ---------------------------------------------------------------------------------------------
# alloc and free

cdef char *heap_alloc(
    heap_t *heap, size_t nbytes, size_t align_bytes, bint *fresh, int *error
) noexcept nogil:
    """Memory of `nbytes`, at least 1, that starts on `align_bytes` (a power of two; 0: the default).

    `fresh` tells that it is zero.  NULL with ERROR_BUDGET or an errno value in `error` if refused.
    """
    cdef char *address = heap_try(heap, nbytes, align_bytes, fresh, error)
    if address == NULL and error[0] == ERROR_BUDGET:
        heap_trim(heap)     # slabs kept empty count against the budget: give them up first
        address = heap_try(heap, nbytes, align_bytes, fresh, error)
    atomic_add_i64(&heap.n_failed if address == NULL else &heap.n_allocs, 1)
    return address


cdef inline char *heap_try(
    heap_t *heap, size_t nbytes, size_t align_bytes, bint *fresh, int *error
) noexcept nogil:
    cdef size_t page_bytes = heap.pages.page_bytes
    cdef run_t *run
    cdef int i
    if align_bytes <= SLOT_UNIT_BYTES:
        i = size_class_of(&heap.classes, nbytes)
    else:
        i = size_class_aligned(&heap.classes, nbytes, align_bytes)
    if i != NO_CLASS:
        fresh[0] = False
        return central_alloc(&heap.centrals[i], error)
    run = page_heap_alloc(
        &heap.pages, <int64_t>((nbytes + page_bytes - 1) // page_bytes),
        align_bytes if align_bytes > page_bytes else page_bytes, RUN_LIVE, NULL, fresh, error
    )
    return NULL if run == NULL else run.address


cdef int heap_free(heap_t *heap, char *address) noexcept nogil:
    """Take back what heap_alloc gave: FREED, or NOT_OURS / NOT_LIVE and nothing changed."""
    cdef void *slab = NULL
    cdef int outcome = page_heap_free_at(&heap.pages, address, &slab)
    if outcome == IN_SLAB:
        outcome = central_free(<slab_t *>slab, address)
    if outcome == FREED:
        atomic_add_i64(&heap.n_frees, 1)
    return outcome


cdef int64_t heap_trim(heap_t *heap) noexcept nogil:
    """Give back what is free; returns the physical bytes that went back."""
    cdef int i
    for i in range(heap.classes.n_classes):
        central_trim(&heap.centrals[i])
    return page_heap_trim(&heap.pages)


# ---------------------------------------------------------------------------------------------
# The Python owner of a heap

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
        if self.heap != NULL and self.heap.n_allocs == self.heap.n_frees:
            with nogil:
                heap_delete(self.heap)

    cdef heap_t *open_heap(self) except NULL:
        if self.heap == NULL:
            raise ClosedError(f"this {type(self).__name__} is closed: make a new one")
        return self.heap

    cdef object refusal(self, size_t nbytes, size_t align_bytes, int error):
        """The exception for a refused request; says what was asked, is held, and would help."""
        cdef heap_t *heap = self.heap
        asked = f"asked for {nbytes} bytes ({format_bytes(nbytes)})"
        if align_bytes > heap.pages.page_bytes:
            asked += f" aligned to {format_bytes(align_bytes)}"
        committed_bytes = heap.pages.committed_bytes
        in_use_bytes = heap.pages.used_pages * <int64_t>heap.pages.page_bytes
        if error == ERROR_BUDGET:
            return OutOfMemoryError(
                f"{asked}: the budget of {format_bytes(self.budget_bytes)} has "
                f"{format_bytes(max(self.budget_bytes - committed_bytes, 0))} left "
                f"({format_bytes(in_use_bytes)} in use by "
                f"{heap.n_allocs - heap.n_frees} live buffers); "
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
            f"{format_bytes(heap.pages.reserved_bytes)} are reserved and "
            f"{format_bytes(committed_bytes)} committed already; close Buffers, call trim(), or "
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
        arenas = self._arena_stats()
        classes = tuple(
            ClassStats(
                slot_bytes=heap.centrals[i].slot_bytes,
                n_live=heap.centrals[i].n_live,
                n_free=heap.centrals[i].n_slabs * heap.centrals[i].n_slots
                - heap.centrals[i].n_live,
                n_slabs=heap.centrals[i].n_slabs,
            )
            for i in range(heap.classes.n_classes)
        )
        slab_bytes = sum(
            heap.centrals[i].n_slabs * heap.centrals[i].slab_pages
            for i in range(heap.classes.n_classes)
        ) * heap.pages.page_bytes
        used_bytes = heap.pages.used_pages * <int64_t>heap.pages.page_bytes
        n_allocs = atomic_load_i64(&heap.n_allocs)
        n_frees = atomic_load_i64(&heap.n_frees)
        return AllocatorStats(
            budget_bytes=self.budget_bytes,
            reserved_bytes=heap.pages.reserved_bytes,
            committed_bytes=heap.pages.committed_bytes,
            held_bytes=sum(arena.held_bytes for arena in arenas),
            live_bytes=used_bytes - slab_bytes + sum(c.n_live * c.slot_bytes for c in classes),
            n_live=n_allocs - n_frees,
            n_allocs=n_allocs,
            n_frees=n_frees,
            n_failed=atomic_load_i64(&heap.n_failed),
            arenas=arenas,
            classes=classes,
        )

    def _arena_stats(self) -> tuple:
        cdef heap_t *heap = self.open_heap()
        cdef int64_t n_reports = heap.pages.n_arenas + 16   # some may come meanwhile
        cdef int64_t n_arenas
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
            return tuple(stats)
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
        n_live = atomic_load_i64(&self.heap.n_allocs) - atomic_load_i64(&self.heap.n_frees)
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
        if self.heap == NULL:
            return f"<{type(self).__name__} closed>"
        budget = "no budget" if self.budget_bytes is None else (
            f"budget {format_bytes(self.budget_bytes)}"
        )
        return (
            f"<{type(self).__name__} backing={self.backing!r}, {budget}: "
            f"{self.heap.n_allocs - self.heap.n_frees} live, "
            f"{format_bytes(self.heap.pages.committed_bytes)} committed of "
            f"{format_bytes(self.heap.pages.reserved_bytes)} reserved>"
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


page_map_init(&process_map)
mutex_init(&registry_mutex, NULL)
if os_at_fork(lock_all, unlock_all, unlock_all) != 0:
    raise MemoryError("pthread_atfork refused to register pagealloc's fork handlers")
