"""IdleItems: what lies idle in a pool, and what the pool knows of every item."""

from libc.stdint cimport int64_t

from pagealloc.core.buffer cimport Buffer
from pagealloc.core.item_table cimport item_table_t

cdef class Slot:
    cdef unsigned long thread_id    # 0: nobody's
    cdef object item                # None: empty

cdef class IdleItems:
    cdef Slot last                  # of the thread that called last, or nobody's; never None
    cdef list slots                 # of Slot
    cdef list shared                # newest at the end
    cdef list victims               # newest at the end
    cdef item_table_t table
    cdef size_t idle_bytes, max_idle_bytes, max_slots
    cdef int64_t n_hits, n_misses, n_steals, n_dropped
    cdef object pop(self, bint *is_stolen)
    cdef bint admit(self, object item, size_t nbytes) except -1
    cdef void forget(self, object item) noexcept
    cdef list turn_over(self)
    cdef list take_all(self)
    cdef Slot find_slot(self)
    cdef Slot own_slot(self)
    cdef int64_t n_private(self) noexcept
    cdef str broken(self)
    cdef bint mark(self, object item) noexcept

cdef inline bint is_usable(object item) noexcept:
    """Whether an idle Buffer is still the pool's alone."""
    return (<Buffer>item).memory != NULL and (<Buffer>item).n_exports == 0
