"""What stands behind an arena: hugetlb, THP or base pages, and where it lies."""

from libc.stdint cimport int64_t

cdef enum:                      # rungs of the ladder; a set of them is what a heap may use
    BACKING_HUGETLB = 1
    BACKING_THP = 2
    BACKING_BASE = 4

cdef enum:                      # beside errno values, which are positive
    ERROR_BUDGET = -1
    ERROR_NO_HUGE_PAGES = -2    # the backing asked for by name cannot be had
    ERROR_ALIGNMENT = -3        # hugetlb memory starts on a huge page, and on nothing larger
    ERROR_GROWTH = -4           # it takes a new arena, and that was not allowed
    ERROR_RETRY = -5            # the size class has become that of another size meanwhile
    ERROR_PLACEMENT = -6        # the kernel refused to bind the memory to a NUMA node

cdef struct placement_t:        # how the arenas of a heap are had; never changes
    int ladder
    size_t hugetlb_bytes        # which hugetlb pages
    int node                    # NUMA node; -1: wherever the kernel puts it
    bint node_is_strict         # from no other node
    bint is_wiped_on_fork       # a forked child finds zeros

cdef struct backing_t:
    char *address
    size_t nbytes
    int achieved
    size_t granule_bytes        # what one touch backs
    bint collapses              # a huge page comes to be by MADV_COLLAPSE, not by a touch

cdef bint backing_reserve(
    const placement_t *placement, size_t nbytes, size_t align_bytes, backing_t *backing, int *error
) noexcept nogil
cdef void backing_collapse(char *address, size_t huge_bytes) noexcept nogil


cdef inline size_t round_up(size_t nbytes, size_t unit_bytes) noexcept nogil:
    return (nbytes + unit_bytes - 1) // unit_bytes * unit_bytes
