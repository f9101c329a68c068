"""Bytes -> size class, for requests below a page.

A class is a slot size that is a multiple of 64 bytes and divides a page into equal slots that
never straddle it (what is left at the end of a page, below one slot, is unused).  Powers of two
are always among them, so every alignment below a page is served by some class.  The look-up is
one shift and one load; it is inline, so that a caller's fast path stays one straight line.
"""

from libc.stdint cimport uint8_t, uint32_t

cdef enum:
    SLOT_UNIT_BYTES = 64        # a cache line: the least alignment ever promised
    MAX_SLOT_CLASSES = 64
    MAX_PAGE_BYTES = 65536
    MAX_LOOKUP = MAX_PAGE_BYTES // 2 // SLOT_UNIT_BYTES
    SLAB_BYTES = 65536          # a slab is this long, or one page where pages are longer
    NO_CLASS = 0                # no slots serve the request; classes count from 1

cdef struct size_classes_t:
    int n_classes                           # they are 1 .. n_classes
    size_t page_bytes
    size_t largest_bytes                    # half a page; above it a page run is the better fit
    uint32_t slot_bytes[MAX_SLOT_CLASSES + 1]
    uint8_t class_of_units[MAX_LOOKUP + 1]  # index: request in units of 64 bytes, rounded up

cdef void size_classes_init(size_classes_t *table, size_t page_bytes) noexcept nogil
cdef int size_class_aligned(
    const size_classes_t *table, size_t nbytes, size_t align_bytes
) noexcept nogil


cdef inline int size_class_of(const size_classes_t *table, size_t nbytes) noexcept nogil:
    """Class of a request of 1 .. largest_bytes bytes; NO_CLASS above."""
    if nbytes > table.largest_bytes:
        return NO_CLASS
    return table.class_of_units[(nbytes + SLOT_UNIT_BYTES - 1) // SLOT_UNIT_BYTES]
