"""The ladder of backings.

Purpose
    Reserve a range from the kernel with the best backing that can be had, on the NUMA node asked
    for, and say what it is: seen, not assumed.
Structure
    hugetlb -> thp: by a touch -> thp: by MADV_COLLAPSE -> base
Invariants
    what is had is untouched but for hugetlb pages, which are all there from the start: a touch of
    one that the kernel cannot place, because the pool or the node is empty, would be SIGBUS
    nothing is left behind by a rung that failed
Locking
    None.
Units
    Bytes.
"""

from libc.errno cimport EINVAL, errno
from libc.stdint cimport int64_t

from pagealloc.core.os_memory cimport (
    MADV_COLLAPSE,
    MADV_HUGEPAGE,
    MADV_NOHUGEPAGE,
    MADV_WIPEONFORK,
    os_abandon,
    os_advise,
    os_huge_page_bytes,
    os_page_bytes,
    os_populate_write,
    os_purge,
    os_reserve,
    os_reserve_hugetlb,
    os_resident_bytes,
)
from pagealloc.core.os_pages cimport os_bind_to_node


cdef int place(const placement_t *placement, void *address, size_t nbytes) noexcept nogil:
    """Say where the range shall lie and what a fork does with it, before its first touch."""
    cdef int error = 0
    if placement.is_wiped_on_fork:
        error = os_advise(address, nbytes, MADV_WIPEONFORK)
    if error == 0 and placement.node >= 0:
        if os_bind_to_node(address, nbytes, placement.node, placement.node_is_strict) != 0:
            error = ERROR_PLACEMENT
    return error


cdef bint is_huge(char *address, size_t huge_bytes) noexcept nogil:
    return os_resident_bytes(address, huge_bytes) == <int64_t>huge_bytes


cdef void backing_collapse(char *address, size_t huge_bytes) noexcept nogil:
    """Back an untouched huge page's range by one, if the kernel has one: zero, as before."""
    # Of an empty range it makes nothing, hence the one page; populated by the kernel, for it may be
    # a neighbour's that is free, and poisoned.
    if os_populate_write(address, os_page_bytes()) == 0:
        os_advise(address, huge_bytes, MADV_COLLAPSE)


cdef char *reserve_hugetlb(
    const placement_t *placement, size_t nbytes, size_t align_bytes, int *error
) noexcept nogil:
    cdef char *address
    if align_bytes > placement.hugetlb_bytes:
        error[0] = ERROR_ALIGNMENT
        return NULL
    address = <char *>os_reserve_hugetlb(nbytes, placement.hugetlb_bytes)
    if address == NULL:
        error[0] = errno
        return NULL
    error[0] = 0        # children: WIPEONFORK is not for hugetlb, see arenas_leave_hugetlb
    if placement.node >= 0:
        if os_bind_to_node(address, nbytes, placement.node, placement.node_is_strict) != 0:
            error[0] = ERROR_PLACEMENT
    if error[0] == 0:
        error[0] = os_populate_write(address, nbytes)
        if error[0] == EINVAL:      # before Linux 5.14: the reservation has to do
            error[0] = 0
    if error[0]:
        os_abandon(address, nbytes)
        return NULL
    return address


cdef char *reserve_thp(
    const placement_t *placement, size_t nbytes, size_t align_bytes, bint *collapses, int *error
) noexcept nogil:
    """Reserve a range in which one touch, or one collapse, was seen to back a whole huge page.

    The advice alone proves nothing: THP may be off, or memory too fragmented.  So the first huge
    page is touched, counted, and given back: a new arena is untouched.
    """
    cdef size_t huge_bytes = os_huge_page_bytes()
    cdef char *address = <char *>os_reserve(nbytes, align_bytes)
    cdef bint is_backed = False
    if address == NULL:
        error[0] = errno
        return NULL
    error[0] = place(placement, address, nbytes)
    if error[0] == 0:
        error[0] = os_advise(address, nbytes, MADV_HUGEPAGE)
    if error[0] == 0:
        (<volatile char *>address)[0] = 0
        is_backed = is_huge(address, huge_bytes)
        collapses[0] = not is_backed
        if not is_backed:
            backing_collapse(address, huge_bytes)
            is_backed = is_huge(address, huge_bytes)
        error[0] = os_purge(address, huge_bytes)
    if error[0] == 0 and is_backed:
        return address
    os_abandon(address, nbytes)
    if error[0] != ERROR_PLACEMENT:
        error[0] = ERROR_NO_HUGE_PAGES
    return NULL


cdef char *reserve_base(
    const placement_t *placement, size_t nbytes, size_t align_bytes, int *error
) noexcept nogil:
    """Reserve a range on base pages, also where the system gives huge pages unasked."""
    cdef char *address = <char *>os_reserve(nbytes, align_bytes)
    cdef int refusal
    if address == NULL:
        error[0] = errno
        return NULL
    error[0] = place(placement, address, nbytes)
    if error[0] == 0:
        refusal = os_advise(address, nbytes, MADV_NOHUGEPAGE)
        if refusal != EINVAL:       # a kernel without THP, which is base pages as well
            error[0] = refusal
    if error[0]:
        os_abandon(address, nbytes)
        return NULL
    return address


cdef bint backing_reserve(
    const placement_t *placement, size_t nbytes, size_t align_bytes, backing_t *backing, int *error
) noexcept nogil:
    """Reserve at least `nbytes` on the highest rung that can be had; False with an error code."""
    cdef size_t huge_bytes = os_huge_page_bytes()
    error[0] = ERROR_NO_HUGE_PAGES
    backing.address = NULL
    backing.collapses = False
    # A huge page far above the request (512 MiB where base pages have 64 KiB) serves nobody.
    if placement.ladder & BACKING_HUGETLB and placement.hugetlb_bytes <= 2 * nbytes:
        backing.achieved = BACKING_HUGETLB
        backing.granule_bytes = placement.hugetlb_bytes
        backing.nbytes = round_up(nbytes, placement.hugetlb_bytes)
        backing.address = reserve_hugetlb(placement, backing.nbytes, align_bytes, error)
    if backing.address == NULL and placement.ladder & BACKING_THP and huge_bytes <= 2 * nbytes:
        backing.achieved = BACKING_THP
        backing.granule_bytes = huge_bytes
        backing.nbytes = round_up(nbytes, huge_bytes)
        backing.address = reserve_thp(
            placement, backing.nbytes, align_bytes if align_bytes > huge_bytes else huge_bytes,
            &backing.collapses, error
        )
    if backing.address == NULL and placement.ladder & BACKING_BASE:
        backing.achieved = BACKING_BASE
        backing.granule_bytes = os_page_bytes()
        backing.nbytes = nbytes
        backing.collapses = False
        backing.address = reserve_base(placement, nbytes, align_bytes, error)
    return backing.address != NULL
