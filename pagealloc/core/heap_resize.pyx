"""A live block made longer or shorter.

Purpose
    Keep a block where it is if that is possible, move it without a copy if that is, else copy it.
Structure
    the same block serves the new length           -> nothing to do
    run -> run, of a class that is counted first   -> page_heap_resize, page_heap_move
    anything else                                  -> alloc, copy, free
Invariants
    a block that moves by its page tables is out in one class at any time: n_out of its new one is
    counted before, of its old one after
Locking
    The caller has the block: nobody else frees or resizes it meanwhile.  direct_mutex, so that no
    fork finds it in two classes.
Units
    Bytes; pages where named.
"""

from libc.stdint cimport int64_t, uint16_t
from libc.string cimport memcpy, memset

from pagealloc.core.atomics cimport atomic_add_i64
from pagealloc.core.block_map cimport FIRST_RUN_CLASS, block_chunk, block_class
from pagealloc.core.central cimport central_count_out
from pagealloc.core.heap cimport heap_alloc, heap_free
from pagealloc.core.heap_state cimport (
    UNCACHED_RUN,
    heap_block_bytes,
    heap_class_of_unusual,
    heap_key_of,
    heap_run_class,
    heap_t,
)
from pagealloc.core.mutex cimport mutex_lock, mutex_unlock
from pagealloc.core.page_resize cimport page_heap_move, page_heap_resize

cdef extern from "poison.h" nogil:
    void unpoison "pagealloc_unpoison"(void *address, size_t nbytes)


cdef char *heap_resize(
    heap_t *heap, char *address, size_t old_bytes, size_t nbytes, size_t align_bytes, int *error
) noexcept nogil:
    """Where the live block of `old_bytes` is once it has `nbytes`; its alignment is as asked for.

    NULL with a code in `error`, and the block as it was, if it cannot be.
    """
    cdef size_t kept_bytes = nbytes if nbytes < old_bytes else old_bytes
    cdef char *moved = resize_without_copy(heap, address, nbytes, align_bytes)
    cdef bint fresh
    if moved == NULL:
        moved = heap_alloc(heap, nbytes, align_bytes, &fresh, error)
        if moved != NULL:
            memcpy(moved, address, kept_bytes)
            heap_free(heap, address)
            return moved
        # By now all that was idle has been given up, and there may be room for what it adds.
        moved = resize_without_copy(heap, address, nbytes, align_bytes)
    if moved != NULL:
        unpoison(moved, nbytes)
        if heap.zero_on_reuse and nbytes > old_bytes:
            memset(moved + old_bytes, 0, nbytes - old_bytes)
    return moved


cdef char *resize_without_copy(
    heap_t *heap, char *address, size_t nbytes, size_t align_bytes
) noexcept nogil:
    cdef size_t size_class = block_class(
        &heap.blocks, block_chunk(&heap.blocks, address), address
    )
    cdef size_t new_class = heap_class_of_unusual(heap, nbytes, align_bytes)
    cdef int64_t key
    cdef char *moved
    if heap.guard:      # by a copy, so that what points to the old block is found out
        return NULL
    if size_class < FIRST_RUN_CLASS:
        return address if size_class == new_class else NULL
    if 0 < new_class < FIRST_RUN_CLASS:
        return NULL
    key = heap_key_of(heap, nbytes, align_bytes)
    if (key >> 6) << heap.blocks.page_shift == <int64_t>heap_block_bytes(
        heap, address, size_class
    ):
        return address
    mutex_lock(&heap.direct_mutex)
    new_class = enter_class(heap, key)
    moved = address if page_heap_resize(
        &heap.pages, address, key >> 6, <uint16_t>new_class
    ) else page_heap_move(
        &heap.pages, address, key >> 6, <size_t>1 << (key & 63), <uint16_t>new_class
    )
    atomic_add_i64(&heap.centrals[size_class if moved != NULL else new_class].n_out, -1)
    mutex_unlock(&heap.direct_mutex)
    return moved


cdef size_t enter_class(heap_t *heap, int64_t key) noexcept nogil:
    """The class of runs of `key`, with one more of them out."""
    cdef size_t size_class
    while True:
        size_class = heap_run_class(heap, key)
        if size_class == UNCACHED_RUN:
            atomic_add_i64(&heap.centrals[UNCACHED_RUN].n_out, 1)
            return size_class
        if central_count_out(&heap.centrals[size_class], key):
            return size_class
