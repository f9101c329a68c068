"""Which slot sizes there are.

Purpose
    Build the table that `size_class_of` reads, for a given page size.
Structure
    request --(round up to 64 B)--> class_of_units[] --> class --> slot_bytes[]
Invariants
    slot_bytes[1 .. n_classes] is strictly rising; all are multiples of 64, at most page_bytes / 2
    every power of two from 64 to page_bytes / 2 is a class
    slot_bytes[class_of(n)] >= n, and no smaller class is
Locking
    None: a table is written once, before anyone reads it.
Units
    Bytes, and units of 64 bytes in the look-up.
"""

from libc.stdint cimport uint8_t, uint32_t


cdef void size_classes_init(size_classes_t *table, size_t page_bytes) noexcept nogil:
    """Fill `table` for pages of `page_bytes`.

    Candidates are page_bytes / k rounded down to 64 bytes: the largest slot of which k fit in a
    page.  From each candidate the next is at least a tenth larger, except that no power of two
    is left out; with 4 KiB pages that makes 14 classes.
    """
    cdef size_t n_slots, slot, last = 0, unit
    cdef int i = 1
    table.n_classes = 0
    table.page_bytes = page_bytes
    table.largest_bytes = page_bytes // 2
    for n_slots in range(page_bytes // SLOT_UNIT_BYTES, 1, -1):
        slot = page_bytes // n_slots // SLOT_UNIT_BYTES * SLOT_UNIT_BYTES
        if slot == last or table.n_classes == MAX_SLOT_CLASSES:
            continue
        if slot & (slot - 1) == 0 or slot * 10 >= last * 11:
            table.n_classes += 1
            table.slot_bytes[table.n_classes] = <uint32_t>slot
            last = slot
    for unit in range(table.largest_bytes // SLOT_UNIT_BYTES + 1):
        while table.slot_bytes[i] < unit * SLOT_UNIT_BYTES:
            i += 1
        table.class_of_units[unit] = <uint8_t>i
    table.class_of_units[0] = NO_CLASS      # nothing is no request


cdef int size_class_aligned(
    const size_classes_t *table, size_t nbytes, size_t align_bytes
) noexcept nogil:
    """Smallest class whose every slot starts on `align_bytes` (a power of two); NO_CLASS if none.

    Slots lie at multiples of their size from a page's start, so the size must be a multiple of
    the alignment.
    """
    cdef int i = size_class_of(table, nbytes if nbytes > align_bytes else align_bytes)
    if i == NO_CLASS:
        return NO_CLASS
    while table.slot_bytes[i] % align_bytes != 0:   # the next power of two ends this
        i += 1
        if i > table.n_classes:
            return NO_CLASS
    return i


cdef int init_checked(size_classes_t *table, object page_bytes) except -1:
    if page_bytes not in (4096, 16384, 65536):
        raise ValueError(f"page_bytes={page_bytes!r}: pages have 4096, 16384 or 65536 bytes")
    size_classes_init(table, page_bytes)
    return 0


def slot_sizes_bytes(page_bytes: int) -> list[int]:
    """Return the slot sizes of all classes for pages of `page_bytes`, smallest first."""
    cdef size_classes_t table
    init_checked(&table, page_bytes)
    return [table.slot_bytes[i] for i in range(1, table.n_classes + 1)]


def slot_size_bytes(nbytes: int, align_bytes: int, page_bytes: int) -> int | None:
    """Return the slot size that serves a request, or None where it takes a page run."""
    cdef size_classes_t table
    cdef int i
    init_checked(&table, page_bytes)
    i = size_class_aligned(&table, nbytes, align_bytes)
    return None if i == NO_CLASS else table.slot_bytes[i]
