# cython: language_level=3
"""A user of the cimport API: each function by itself, and loops without the GIL."""

from libc.stdint cimport uintptr_t
from libc.stdlib cimport calloc, free

from pagealloc cimport (
    PAGE_FREED,
    PAGE_NOT_LIVE,
    PAGE_NOT_OURS,
    PageHeap,
    PageStats,
    page_alloc,
    page_alloc_many,
    page_free,
    page_free_many,
    page_heap_of,
    page_stats,
    page_usable_bytes,
)

OUTCOMES = {PAGE_FREED: "freed", PAGE_NOT_OURS: "not ours", PAGE_NOT_LIVE: "not live"}


def heap_address(allocator):
    return <uintptr_t>page_heap_of(allocator)


def alloc(allocator, size_t nbytes, size_t align_bytes=0):
    """An address, or 0."""
    cdef PageHeap *heap = page_heap_of(allocator)
    cdef void *memory
    with nogil:
        memory = page_alloc(heap, nbytes, align_bytes)
    return <uintptr_t>memory


def give_back(allocator, uintptr_t address):
    cdef PageHeap *heap = page_heap_of(allocator)
    cdef int outcome
    with nogil:
        outcome = page_free(heap, <void *>address)
    return OUTCOMES[outcome]


def alloc_many(allocator, size_t n, size_t nbytes, size_t align_bytes=0):
    """`n` addresses, or None."""
    cdef PageHeap *heap = page_heap_of(allocator)
    cdef void **blocks = <void **>calloc(n + 1, sizeof(void *))
    cdef int refused
    cdef size_t i
    if blocks == NULL:
        raise MemoryError
    with nogil:
        refused = page_alloc_many(heap, nbytes, align_bytes, n, blocks)
    try:
        return None if refused else [<uintptr_t>blocks[i] for i in range(n)]
    finally:
        free(blocks)


def give_back_many(allocator, addresses):
    """How many were freed."""
    cdef PageHeap *heap = page_heap_of(allocator)
    cdef size_t i, n_freed, n = len(addresses)
    cdef void **blocks = <void **>calloc(n + 1, sizeof(void *))
    if blocks == NULL:
        raise MemoryError
    for i in range(n):
        blocks[i] = <void *><uintptr_t>addresses[i]
    with nogil:
        n_freed = page_free_many(heap, blocks, n)
    free(blocks)
    return n_freed


def usable_bytes(allocator, uintptr_t address):
    cdef PageHeap *heap = page_heap_of(allocator)
    with nogil:
        nbytes = page_usable_bytes(heap, <const void *>address)
    return nbytes


def stats(allocator):
    cdef PageHeap *heap = page_heap_of(allocator)
    cdef PageStats counts
    with nogil:
        counts = page_stats(heap)
    return counts   # a struct becomes a dict


def null_heap():
    """What every function says to a heap that is NULL."""
    cdef PageHeap *heap = NULL
    cdef void *block = NULL
    cdef PageStats counts
    cdef int refused, outcome
    cdef size_t n_freed, nbytes
    with nogil:
        block = page_alloc(heap, 64, 0)
        outcome = page_free(heap, &block)
        refused = page_alloc_many(heap, 64, 0, 1, &block)
        n_freed = page_free_many(heap, &block, 1)
        nbytes = page_usable_bytes(heap, &block)
        counts = page_stats(heap)
    return (
        <uintptr_t>block, OUTCOMES[outcome], refused, n_freed, nbytes, any((<dict>counts).values())
    )


cdef enum:
    N_HELD = 64


def churn(allocator, int n_rounds, unsigned char mark):
    """Allocate and free blocks of many sizes, without the GIL; returns how many were not whole.

    Each block carries `mark` at both its ends while it is held.
    """
    cdef PageHeap *heap = page_heap_of(allocator)
    cdef unsigned char *blocks[N_HELD]
    cdef size_t lengths[N_HELD]
    cdef int i, held, n_broken = 0
    with nogil:
        for held in range(N_HELD):
            blocks[held] = NULL
        for i in range(n_rounds + N_HELD):
            held = i % N_HELD
            if blocks[held] != NULL:
                n_broken += blocks[held][0] != mark
                n_broken += blocks[held][lengths[held] - 1] != mark
                n_broken += page_free(heap, blocks[held]) != PAGE_FREED
                blocks[held] = NULL
            if i < n_rounds:
                lengths[held] = 1 + (<size_t>i * 7919 + mark * 104729) % 20000
                blocks[held] = <unsigned char *>page_alloc(heap, lengths[held], 0)
                if blocks[held] == NULL:
                    n_broken += 1
                else:
                    n_broken += page_usable_bytes(heap, blocks[held]) < lengths[held]
                    blocks[held][0] = mark
                    blocks[held][lengths[held] - 1] = mark
    return n_broken
