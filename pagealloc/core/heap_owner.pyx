"""Heap: the Python owner of one heap.

Purpose
    Read the settings, ask callbacks before a request is refused, show what the heap holds, and
    close it.
Structure
    PageAllocator --is a--> Heap --owns--> heap_t (heap.pyx)
    Buffer --keeps alive--> Heap
Invariants
    heap != NULL <=> open; a heap with something live, or pinned, or with a call under way, is
    never unmapped
Locking
    The GIL for the object's fields; every call that lets go of it stands between enter(), or
    begin_call(), and leave(), so that close() knows of it.  The heap's own mutexes below.
Units
    Bytes.
"""

import gc
import operator
import os
from contextlib import suppress
from threading import get_ident
from time import monotonic, sleep
from weakref import ref

from libc.errno cimport ENOMEM
from libc.stdint cimport int64_t, uintptr_t

from pagealloc.core.atomics cimport atomic_load_i64
from pagealloc.core.backing cimport ERROR_BUDGET
from pagealloc.core.heap cimport heap_alloc, heap_free
from pagealloc.core.heap_caches cimport heap_collect, heap_reclaim, heap_trim
from pagealloc.core.heap_counts cimport heap_check, heap_counts, heap_counts_t
from pagealloc.core.heap_latency cimport heap_time_every
from pagealloc.core.heap_life cimport heap_delete, heap_new
from pagealloc.core.heap_options cimport describe_node, read_options
from pagealloc.core.heap_refusal cimport refusal_of
from pagealloc.core.heap_state cimport heap_options_t, heap_t
from pagealloc.core.heap_stats cimport read_stats
from pagealloc.core.noted cimport forget_wait, note_wait, observed, waits_are_noted
from pagealloc.core.os_memory cimport os_fork_generation
from pagealloc.core.page_heap cimport NOT_LIVE, NOT_OURS

from pagealloc.core.heap_stats import process_faults
from pagealloc.errors import ClosedError, InvariantError, OutOfMemoryError
from pagealloc.units import format_bytes, parse_bytes

cdef int64_t MAX_TIME_EVERY = 1 << 30
cdef double CLOSE_WAIT_S = 0.2

_open_heaps = {}    # weak references: numbers; dict.copy() is one step, a WeakSet's many


def open_heaps() -> list:
    """Return all heaps that are not closed, each behind its number.  Thread-safe.

    They are numbered in the order they were made, with those of native code; PAGEALLOC_TRACE
    and slow events name them so, too.
    """
    numbered = [(number, heap_ref()) for heap_ref, number in _open_heaps.copy().items()]
    return [(number, heap) for number, heap in numbered if heap is not None and not heap.closed]


def _collect_after_gc(phase, info):
    """A process whose oldest generation was just gone through has let go of what it will."""
    if phase == "stop" and info["generation"] == 2:
        for _, heap in open_heaps():
            with suppress(ClosedError):     # by another thread, meanwhile
                heap.collect()


gc.callbacks.append(_collect_after_gc)


cdef int64_t n_surely_live(heap_t *heap) noexcept:
    """How many blocks are live, also if others were freed twice in one instant."""
    cdef int64_t n_live = heap_counts(heap).n_live
    if n_live == 0:
        heap_reclaim(heap)      # which empties the boxes, and frees each block in them once
        n_live = heap_counts(heap).n_live
    return n_live


cdef int64_t checked_time_every(object every) except -1:
    if not 0 <= operator.index(every) <= MAX_TIME_EVERY:
        raise ValueError(f"time_every={every}: from 0 to {MAX_TIME_EVERY} are possible")
    return operator.index(every)


cdef class Heap:
    """Owner of one heap; the base of `pagealloc.PageAllocator`, which adds the ways to allocate."""

    def __init__(
        self, *, backing="auto", arena_bytes="64MiB", budget_bytes=None, purge_after_s=0.5,
        huge_page_bytes=None, numa_node=None, preferred=None, on_fork="inherit",
        zero_on_reuse=False, guard=None, time_every=2048
    ):
        cdef heap_options_t options
        cdef int64_t timed = checked_time_every(time_every)
        if self.backing is not None:    # also once closed: an ExactClass knows the classes it had
            raise TypeError(f"this {type(self).__name__} is made already: make a new one")
        settings = {
            "backing": backing, "arena_bytes": arena_bytes, "budget_bytes": budget_bytes,
            "purge_after_s": purge_after_s, "huge_page_bytes": huge_page_bytes,
            "numa_node": numa_node, "preferred": preferred, "on_fork": on_fork,
            "zero_on_reuse": zero_on_reuse, "guard": guard,
        }
        read_options(&options, settings)
        self.node_text = describe_node(settings)
        self.backing = backing
        self.arena_bytes = options.arena_bytes
        self.budget_bytes = None if options.budget_bytes < 0 else options.budget_bytes
        self.n_faults_before = process_faults()
        self.pressure_callbacks = []
        self.threads_in_callbacks = set()
        self.heap = heap_new(&options)
        if self.heap == NULL:
            raise OutOfMemoryError("no memory for the tables of an allocator")
        self.heap.time_every = timed
        _open_heaps[ref(self, _open_heaps.pop)] = self.heap.pages.number

    def __dealloc__(self):
        # Every Buffer holds a reference to its heap, so what is still live belongs to callers by
        # address.  Unmapping would pull it away from under them: the heap is left to the process.
        if self.heap != NULL and n_surely_live(self.heap) == 0:
            with nogil:
                heap_delete(self.heap)

    cdef heap_t *open_heap(self) except NULL:
        if self.heap == NULL:
            raise ClosedError(f"this {type(self).__name__} is closed: make a new one")
        return self.heap

    cdef heap_t *enter(self) except NULL:
        """The heap, for a call that lets go of the GIL; leave() must follow."""
        cdef heap_t *heap = self.open_heap()
        self.begin_call()
        return heap

    cdef void begin_call(self) noexcept:
        """What enter() does, for who has something live in the heap, so that it is open."""
        self.forget_lost_calls()
        self.n_calls += 1
        if observed(waits_are_noted):
            forget_wait()

    cdef void leave(self) noexcept:
        self.n_calls -= 1
        if observed(waits_are_noted):
            note_wait()

    cdef int await_calls(self) except -1:
        """Give other threads' calls a moment to end, such as those of who shows the figures."""
        self.forget_lost_calls()
        deadline = monotonic() + CLOSE_WAIT_S
        while self.n_calls and monotonic() < deadline:
            sleep(0.001)
        return 0

    cdef void forget_lost_calls(self) noexcept:
        """In a forked child, the calls of the parent's other threads will never end."""
        if self.fork_generation != os_fork_generation():
            self.fork_generation = os_fork_generation()
            self.n_calls = 0

    cdef int relieve(
        self, size_t nbytes, size_t align_bytes, int error, Py_ssize_t n_blocks, int *n_asked
    ) except -1:
        """Let the next callback free something, and return; raise if there is none left to ask.

        `n_asked` counts those asked for this request.
        """
        cdef object thread = get_ident()
        if (
            (error != ERROR_BUDGET and error != ENOMEM) or thread in self.threads_in_callbacks
            or n_asked[0] >= len(self.pressure_callbacks)
        ):
            raise self.refusal(nbytes, align_bytes, error, n_blocks)
        callback = self.pressure_callbacks[n_asked[0]]
        n_asked[0] += 1
        if observed(waits_are_noted):
            note_wait()     # before the callback's own calls begin
        self.threads_in_callbacks.add(thread)
        try:
            callback(nbytes * <object>n_blocks)
        except Exception as problem:
            raise self.refusal(nbytes, align_bytes, error, n_blocks) from problem
        finally:
            self.threads_in_callbacks.discard(thread)
        return 0

    cdef object refusal(
        self, size_t nbytes, size_t align_bytes, int error, Py_ssize_t n_blocks=1
    ):
        """The exception for a refused request."""
        return refusal_of(self.heap, self.backing, nbytes, align_bytes, error, n_blocks)

    @property
    def time_every(self) -> int:
        """One allocation in about so many has its time taken; 0: none.  It can be set."""
        return atomic_load_i64(&self.open_heap().time_every)

    @time_every.setter
    def time_every(self, every):
        cdef int64_t timed = checked_time_every(every)
        cdef heap_t *heap = self.enter()
        with nogil:
            heap_time_every(heap, timed)
        self.leave()

    @property
    def closed(self) -> bool:
        """True after `close()`."""
        return self.heap == NULL

    def on_pressure(self, callback):
        """Have `callback` called before memory is refused, so that it can free some.

        Parameters
        ----------
        callback : callable
            Called with the number of bytes asked for, in the thread that asks, when the budget or
            the kernel has refused them: it may close Buffers, or drop what keeps them.  Then the
            request is tried again; callbacks are asked in turn, each once a request.

        Returns
        -------
        callable
            Takes the callback back when it is called, without arguments.

        Raises
        ------
        TypeError
            `callback` cannot be called.

        Notes
        -----
        Thread-safe.  A request of the callback's own that is refused raises at once.  What the
        callback raises becomes the cause of the `OutOfMemoryError`.  Native code's requests (the C
        API, NumPy's handler) ask no callback.
        """
        if not callable(callback):
            raise TypeError(f"callback={callback!r} cannot be called")
        callbacks = self.pressure_callbacks

        def remove():
            if callback in callbacks:
                callbacks.remove(callback)

        self.open_heap()
        callbacks.append(callback)
        return remove

    def trim(self) -> int:
        """Give all free memory back to the kernel.

        Returns
        -------
        int
            Physical bytes that went back.  Counted are pages that nobody else shares, such as a
            forked child (/proc/self/pagemap), and parts of huge pages only as far as the kernel has
            counted that it split them (/proc/vmstat).

        Notes
        -----
        Thread-safe; other threads can allocate meanwhile.  Huge pages of which at least a 32nd is
        free are split for that, and become huge again once they are free as a whole.  Hugetlb
        memory goes back with its arena.
        """
        cdef heap_t *heap = self.enter()
        cdef int64_t purged_bytes
        with nogil:
            purged_bytes = heap_trim(heap)
        self.leave()
        return purged_bytes

    def collect(self) -> None:
        """Let go of free memory that has not been used for a while.

        Freed blocks stay at hand, in each thread's magazines and in lists that the threads share.
        What sat there unused since the last collection is a victim; what was a victim at the last
        one already and is still unused returns to the page heap, where it merges with its
        neighbours, serves requests of any size, and goes back to the kernel a moment later unless
        ``purge_after_s=None``.

        Notes
        -----
        Called by the purger, and whenever Python's garbage collector has gone through its oldest
        generation.  Thread-safe; does nothing if another thread is at it.
        """
        cdef heap_t *heap = self.enter()
        with nogil:
            heap_collect(heap)
        self.leave()

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
        cdef heap_t *heap = self.enter()
        cdef const char *broken
        with nogil:
            broken = heap_check(heap)
        self.leave()
        if broken != NULL:
            raise InvariantError(broken.decode())

    def stats(self):
        """Return what the heap holds now, as `AllocatorStats`.

        Held bytes are counted by mincore, which takes some 10 ns a committed page.  Thread-safe;
        the fields are read one after another, not in one instant.
        """
        cdef heap_t *heap = self.enter()
        try:
            return read_stats(heap, self.backing, self.budget_bytes, self.n_faults_before)
        finally:
            self.leave()

    def close(self) -> None:
        """Give everything back to the kernel; closing twice is fine.

        Raises
        ------
        BufferError
            Buffers of this allocator are still open, its NumPy handler is in use, or another
            thread is allocating at this moment; nothing was closed.
        OSError
            The kernel refused to unmap; the allocator is still open.
        """
        cdef heap_t *heap
        cdef int64_t n_live
        cdef int error
        if self.heap == NULL:
            return
        self.await_calls()
        heap = self.heap
        if heap == NULL:    # closed by another thread meanwhile
            return
        n_live = n_surely_live(heap)
        if n_live:
            raise BufferError(
                f"{n_live} live buffer{'s' if n_live > 1 else ''} of this allocator: "
                f"close them (and drop arrays over them) first"
            )
        if self.n_pins:
            raise BufferError(
                "NumPy's handler over this allocator is in use: leave its with blocks, or "
                "uninstall() it, in every thread and task that has it"
            )
        if self.n_calls:
            raise BufferError("another thread is using this allocator at this moment")
        self.heap = NULL    # from here on nobody enters
        with nogil:
            error = heap_delete(heap)
        if error:
            self.heap = heap
            raise OSError(error, f"the kernel refused to unmap an arena: {os.strerror(error)}")

    def __enter__(self):
        self.open_heap()
        return self

    def __exit__(self, exc_type, *exc_info):
        try:
            self.close()
        except BufferError:
            if exc_type is None:    # else what the block raised matters more, and holds the Buffers
                raise

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
            f"<{type(self).__name__} backing={self.backing!r}, "
            f"{self.node_text and self.node_text + ', '}{budget}: "
            f"{counts.n_live} live, "
            f"{format_bytes(counts.committed_bytes)} committed of "
            f"{format_bytes(counts.reserved_bytes)} reserved>"
        )


# ---------------------------------------------------------------------------------------------
# The nogil calls by address, as C callers use them; a wrong address is an error there as well

def alloc_address(Heap heap, nbytes: int, align_bytes: int = 0) -> int:
    """Allocate without a Buffer and return the address; `free_address` must take it back.

    For tests: `align_bytes` is not checked.
    """
    cdef heap_t *c_heap = heap.enter()
    cdef size_t length, align
    cdef bint fresh
    cdef int error
    cdef char *address
    try:
        length = parse_bytes(nbytes)
        align = align_bytes
        with nogil:
            address = heap_alloc(c_heap, length, align, &fresh, &error)
        if address == NULL:
            raise heap.refusal(length, align, error)
        return <uintptr_t>address
    finally:
        heap.leave()


def free_address(Heap heap, address: int) -> None:
    """Give back what `alloc_address` gave.  For tests.

    Raises
    ------
    ValueError
        No slot or run of this heap starts at `address`, or it is free already; nothing was
        changed.
    """
    cdef heap_t *c_heap = heap.enter()
    cdef char *c_address = <char *><uintptr_t>address
    cdef int outcome
    with nogil:
        outcome = heap_free(c_heap, c_address)
    heap.leave()
    if outcome == NOT_LIVE:
        raise ValueError(f"double free: the slot at {address:#x} is free already")
    if outcome == NOT_OURS:
        raise ValueError(
            f"foreign pointer: no live slot or run of this allocator starts at {address:#x} "
            f"(freed already, inside a slot, or another allocator's)"
        )
