"""Which slots of ggml's tables of functions are meant, found out by trying.

Purpose
    Let a buffer be ours without declaring a structure of ggml's: a wrong one would fail silently.
Invariants
    the tables are as they were once `find_slots` returns
Locking
    None: one thread, while no other makes a context.
"""

from libc.stdint cimport uintptr_t


cdef enum:
    N_SLOTS = 10                # of a table that are tried
    PROBE_BYTES = 4096


cdef int n_probed = 0
cdef void *probed_memory = NULL

cdef void *probe(void *table, size_t argument) noexcept nogil:
    """Stands in a slot to see whether it is called; what it returns is memory at least."""
    global n_probed
    n_probed += 1
    return probed_memory


cdef int find_alloc_slot(
    alloc_function alloc, free_function free_buffer, void **table
) noexcept nogil:
    global n_probed
    cdef void *before
    cdef void *buffer
    cdef int slot
    for slot in range(N_SLOTS // 2):
        before, table[slot] = table[slot], <void *>probe
        n_probed = 0
        buffer = alloc(table, PROBE_BYTES)
        table[slot] = before
        if n_probed == 1 and buffer == probed_memory:
            return slot
        if n_probed == 0 and buffer != NULL:
            free_buffer(buffer)
    return -1


cdef int find_clear_slot(
    from_ptr_function from_ptr, clear_function clear, free_function free_buffer, char *memory
) noexcept nogil:
    global n_probed
    cdef void **buffer = <void **>from_ptr(memory, PROBE_BYTES)
    cdef void *before
    cdef int slot, found = -1
    if buffer == NULL:
        return -1
    for slot in range(N_SLOTS):
        memory[0], memory[PROBE_BYTES - 1] = 1, 1
        before, buffer[slot] = buffer[slot], <void *>probe
        n_probed = 0
        clear(buffer, 0)
        buffer[slot] = before
        if n_probed == 1 and memory[0] == 1 and memory[PROBE_BYTES - 1] == 1:
            found = slot
            break
    clear(buffer, 0)
    if memory[0] != 0 or memory[PROBE_BYTES - 1] != 0:
        found = -1
    free_buffer(buffer)
    return found


cdef int find_free_slot(
    from_ptr_function from_ptr, free_function free_buffer, char *memory, int clear_slot
) noexcept nogil:
    global n_probed
    cdef void **buffer
    cdef int slot
    for slot in range(N_SLOTS):
        if slot == clear_slot:
            continue
        buffer = <void **>from_ptr(memory, PROBE_BYTES)
        if buffer == NULL:
            return -1
        if buffer[slot] != NULL:    # memory that is not ggml's is not freed by it
            free_buffer(buffer)
            continue
        buffer[slot] = <void *>probe
        n_probed = 0
        free_buffer(buffer)
        if n_probed == 1:
            return slot
    return -1


cdef slots_t find_slots(
    void **table, alloc_function alloc, from_ptr_function from_ptr, clear_function clear,
    free_function free_buffer,
) noexcept nogil:
    """The slots of ``alloc_buffer`` in the table of a kind of buffers, and of two in a buffer's."""
    global probed_memory
    cdef char[2 * PROBE_BYTES] room
    cdef char *memory = room + PROBE_BYTES - <uintptr_t>&room[0] % PROBE_BYTES
    cdef slots_t slots
    probed_memory = memory
    slots.alloc = find_alloc_slot(alloc, free_buffer, table)
    slots.clear = find_clear_slot(from_ptr, clear, free_buffer, memory)
    slots.free = find_free_slot(from_ptr, free_buffer, memory, slots.clear)
    probed_memory = NULL
    return slots
