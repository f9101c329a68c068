"""Prefault: memory is made physical before somebody waits for it.

Purpose
    Have the kernel back a range by several threads, in chunks, so that it can be cancelled and
    followed; do so for one block, or for free memory that serves later requests.
Structure
    prefault_buffer -> populate
    prefault_heap   -> page runs -> populate -> free again, as FREED_TO_STAY
    populate: threads take chunks from one list -> populate_chunk, without the GIL
Invariants
    what prefault_heap takes is counted as in use until it has returned
    no helper thread touches memory once populate has returned
Locking
    The GIL for what the threads of one populate share.
Units
    Bytes; pages where named.
"""

import os
import threading
from collections import deque

cimport cython
from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport EINVAL
from libc.stdint cimport int64_t, uintptr_t
from libc.stdlib cimport free, malloc

from pagealloc.core.atomics cimport atomic_add_i64, atomic_store_u16
from pagealloc.core.backing cimport BACKING_HUGETLB, ERROR_GROWTH
from pagealloc.core.block_map cimport STATE_FREE, STATE_SHARED, known_block_state
from pagealloc.core.buffer cimport Buffer
from pagealloc.core.central cimport central_give_back
from pagealloc.core.heap_caches cimport heap_reclaim
from pagealloc.core.heap_owner cimport Heap
from pagealloc.core.heap_state cimport UNCACHED_RUN, heap_t
from pagealloc.core.mutex cimport mutex_lock, mutex_unlock
from pagealloc.core.os_memory cimport os_page_bytes, os_populate_write, os_real_page_bytes
from pagealloc.core.page_heap cimport (
    FREED_LONG_AGO,
    FREED_TO_STAY,
    page_heap_alloc,
    page_heap_grow,
)
from pagealloc.core.page_map cimport CHUNK_BYTES, block_t
from pagealloc.core.page_run cimport run_t

cdef extern from "poison.h" nogil:
    void unpoison "pagealloc_unpoison"(void *address, size_t nbytes)

cdef enum:
    MAX_CHUNK_BYTES = 16 << 20      # a few ms: how long a cancellation is waited for
    MAX_THREADS = 8                 # more wait for the memory, and for the kernel's locks


cdef int populate_chunk(char *address, size_t nbytes) noexcept nogil:
    """Back a range; an errno value if the kernel refused.

    Nobody else uses the range: before Linux 5.14 each page is written to, with what it holds.
    """
    cdef uintptr_t page_bytes = os_real_page_bytes()
    cdef uintptr_t first_page = <uintptr_t>address & ~(page_bytes - 1)
    cdef uintptr_t end = <uintptr_t>address + nbytes
    cdef int error = os_populate_write(
        <void *>first_page, ((end + page_bytes - 1) & ~(page_bytes - 1)) - first_page
    )
    cdef volatile char *byte = address
    if error != EINVAL:
        return error
    while <uintptr_t>byte < end:
        byte[0] = byte[0]
        byte = <volatile char *>((<uintptr_t>byte & ~(page_bytes - 1)) + page_bytes)
    return 0


@cython.final
@cython.auto_pickle(False)
cdef class Population:
    """What the threads of one populate share."""

    cdef object chunks          # of (address, nbytes) that nobody has taken yet
    cdef object cancel
    cdef int64_t done_bytes, reported_bytes
    cdef int error
    cdef bint is_stopped

    def work(self, progress, all_bytes):
        """Take chunks until there is none, or the kernel refuses, or somebody cancels."""
        cdef char *address
        cdef size_t nbytes
        cdef int error
        while not (self.is_stopped or (self.cancel is not None and self.cancel.is_set())):
            PyErr_CheckSignals()        # compiled code lets nobody else see Ctrl-C
            try:
                start, length = self.chunks.popleft()
            except IndexError:
                return
            address = <char *><uintptr_t>start
            nbytes = length
            with nogil:
                error = populate_chunk(address, nbytes)
            if error:
                self.error = error
                self.is_stopped = True
                return
            self.done_bytes += nbytes
            if progress is not None:
                self.reported_bytes = self.done_bytes
                progress(self.done_bytes, all_bytes)


cdef int64_t populate(
    object chunks, int n_threads, object progress, object cancel, int *error
) except -1:
    """Back chunks of memory that nobody else uses, the first ones first; how many bytes are.

    If the kernel refuses, its reason is in `error`.  What `progress` raises is raised.
    """
    cdef Population population = Population()
    cdef object all_bytes = sum(nbytes for _, nbytes in chunks)
    population.chunks = deque(chunks)
    population.cancel = cancel
    helpers = []
    try:
        for _ in range(min(n_threads, len(chunks)) - 1):
            helper = threading.Thread(target=population.work, args=(None, 0), daemon=True)
            try:
                helper.start()
            except RuntimeError:    # no more threads are to be had
                break
            helpers.append(helper)
        population.work(progress, all_bytes)
    except BaseException:
        population.is_stopped = True
        raise
    finally:
        join_all(helpers)
    error[0] = population.error
    if progress is not None and population.done_bytes > population.reported_bytes:
        progress(population.done_bytes, all_bytes)
    return population.done_bytes


def join_all(threads):
    """Wait for all; Ctrl-C may come meanwhile, and is raised afterwards."""
    interrupt = None
    for thread in threads:
        while thread.is_alive():
            try:
                thread.join()
            except KeyboardInterrupt as error:
                interrupt = error
    if interrupt is not None:
        raise interrupt


cdef object cut(object address, object nbytes):
    """A range as chunks."""
    return [
        (address + start, min(MAX_CHUNK_BYTES, nbytes - start))
        for start in range(0, nbytes, MAX_CHUNK_BYTES)
    ]


cdef int default_n_threads():
    n_cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(n_cpus or 1, MAX_THREADS)


cdef int prefault_buffer(Buffer buffer) except -1:
    """Back all of a new Buffer; if that is refused it is closed, and OutOfMemoryError raised."""
    cdef int error = 0
    try:
        populate(
            cut(<uintptr_t>buffer.memory, buffer.nbytes), default_n_threads(), None, None, &error
        )
        if error:
            raise buffer.owner.refusal(buffer.nbytes, buffer.align_bytes, error)
    except BaseException:
        buffer.close()
        raise
    return 0


cdef bint take_run(
    heap_t *heap, size_t nbytes, size_t grow_bytes, block_t *block, int *error
) noexcept nogil:
    """A run from the arenas there are, or from a new one of `grow_bytes`; False as page_heap_alloc.

    It is live: a child that is forked meanwhile never gets it back.
    """
    cdef int64_t n_pages = <int64_t>(nbytes // heap.pages.page_bytes)
    cdef size_t align_bytes = <size_t>CHUNK_BYTES if nbytes % CHUNK_BYTES == 0 else 1
    cdef bint fresh
    cdef run_t *run = NULL
    error[0] = 0
    mutex_lock(&heap.direct_mutex)
    while run == NULL and error[0] == 0:
        run = page_heap_alloc(
            &heap.pages, n_pages, align_bytes, UNCACHED_RUN, NULL, False, &fresh, error
        )
        if run == NULL and error[0] == ERROR_GROWTH:
            error[0] = page_heap_grow(&heap.pages, grow_bytes)
    if run != NULL:
        unpoison(run.address, nbytes)
        block.address = run.address
        block.state = known_block_state(&heap.blocks, run.address, UNCACHED_RUN)
        atomic_add_i64(&heap.centrals[UNCACHED_RUN].n_out, 1)
        atomic_store_u16(block.state, STATE_SHARED)
    mutex_unlock(&heap.direct_mutex)
    return run != NULL


cdef void give_back(
    heap_t *heap, const block_t *blocks, int64_t n, int64_t n_to_stay
) noexcept nogil:
    """Free runs, of which the first `n_to_stay` stay backed."""
    cdef int64_t i
    mutex_lock(&heap.direct_mutex)
    for i in range(n):
        atomic_store_u16(blocks[i].state, STATE_FREE)
    central_give_back(&heap.centrals[UNCACHED_RUN], blocks, n_to_stay, FREED_TO_STAY)
    central_give_back(
        &heap.centrals[UNCACHED_RUN], blocks + n_to_stay, n - n_to_stay, FREED_LONG_AGO
    )
    mutex_unlock(&heap.direct_mutex)


@cython.final
@cython.auto_pickle(False)
cdef class Runs:
    """Page runs that are out for a prefault; `give_back` must follow."""

    cdef Heap owner
    cdef heap_t *heap
    cdef block_t *blocks
    cdef int64_t n, max_n
    cdef list chunks            # (address, nbytes) of each

    def __init__(self, Heap owner not None, max_n):
        self.owner = owner
        self.chunks = []
        self.max_n = max_n
        self.blocks = <block_t *>malloc(<size_t>self.max_n * sizeof(block_t))
        if self.blocks == NULL:
            raise MemoryError(f"no memory for the addresses of {max_n} page runs")
        self.heap = owner.enter()

    def __dealloc__(self):
        free(self.blocks)

    cdef int take(self, size_t nbytes, size_t grow_bytes) except -1:
        """One more run; before it is refused, what lies idle or callbacks can free is given up."""
        cdef int error = 0, n_asked = 0
        cdef bint is_taken
        cdef block_t *block = &self.blocks[self.n]
        while True:
            with nogil:
                is_taken = take_run(self.heap, nbytes, grow_bytes, block, &error)
                if not is_taken:
                    heap_reclaim(self.heap)
                    is_taken = take_run(self.heap, nbytes, grow_bytes, block, &error)
            if is_taken:
                break
            self.owner.relieve(nbytes, 0, error, 1, &n_asked)
        self.n += 1
        self.chunks.append((<uintptr_t>block.address, nbytes))
        return 0

    cdef int give_back(self, int64_t n_to_stay) except -1:
        """Free all; the first ones stay backed."""
        with nogil:
            give_back(self.heap, self.blocks, self.n, n_to_stay)
        self.owner.leave()
        return 0


cdef int64_t prefault_heap(
    Heap heap, size_t nbytes, object n_threads, object progress, object cancel
) except -1:
    """Have so much free memory of a heap backed, and kept for later requests; how much is."""
    cdef heap_t *c_heap = heap.open_heap()
    cdef size_t page_bytes = os_page_bytes()
    cdef size_t chunk_bytes = min(<size_t>heap.arena_bytes // 2, <size_t>MAX_CHUNK_BYTES)
    cdef size_t grain_bytes = (
        c_heap.pages.placement.hugetlb_bytes if c_heap.pages.placement.ladder == BACKING_HUGETLB
        else CHUNK_BYTES
    )
    cdef size_t left_bytes = (nbytes + page_bytes - 1) & ~(page_bytes - 1)
    cdef size_t grow_bytes
    cdef int64_t done_bytes, n_to_stay = 0
    cdef int threads = default_n_threads() if n_threads is None else n_threads
    cdef int error = 0
    cdef Runs runs
    if threads < 1:
        raise ValueError(f"n_threads={n_threads}: at least 1 is possible")
    if c_heap.guard:
        raise ValueError(
            "prefault() with guard=: freed memory of such an allocator is not kept for reuse; use "
            "alloc(…, prefault=True)"
        )
    runs = Runs(heap, left_bytes // chunk_bytes + 1)
    try:
        while left_bytes:
            # The last arena is no longer than needed, so that what serves requests first is backed.
            grow_bytes = (left_bytes + grain_bytes - 1) // grain_bytes * grain_bytes
            runs.take(
                min(left_bytes, chunk_bytes), min(<size_t>heap.arena_bytes, grow_bytes)
            )
            left_bytes -= min(left_bytes, chunk_bytes)
        done_bytes = populate(runs.chunks, threads, progress, cancel, &error)
        if error:
            raise heap.refusal(nbytes, 0, error)
        n_to_stay = (done_bytes + <int64_t>chunk_bytes - 1) // <int64_t>chunk_bytes
    finally:
        runs.give_back(n_to_stay)
    return done_bytes
