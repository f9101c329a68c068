"""IdleItems: what lies idle in a pool.

Purpose
    Keep idle items where the next get() finds them fast, and give all of them back in the end.
Structure
    slots:    one private item for each thread that put one
    shared:   a stack of what was put while the own slot was taken
    victims:  what was idle at the last collection
    table (item_table.pyx):  what is out, what is idle, by the item's address
Invariants
    the idle items of the table = the items in slots, shared and victims, each there once
    idle_bytes = sum of what they count with <= max_idle_bytes
    at most one slot a thread; last is in slots, or is nobody's
Locking
    The GIL.  Nothing here runs a user's code (new, reset, a destructor) in the middle of a change.
    A method that makes an object makes it first, for that may collect garbage, and so run any
    code, which may call the pool; a pointer into the table does not outlive such a call.
Units
    Items; bytes where named.
"""

cimport cython
from cpython.object cimport PyObject
from cpython.pythread cimport PyThread_get_thread_ident
from libc.stdint cimport int64_t

from pagealloc.core.buffer cimport Buffer
from pagealloc.core.item_table cimport (
    ITEM_IDLE,
    ITEM_OUT,
    item_is,
    item_t,
    table_clear,
    table_erase,
    table_find,
    table_insert,
    table_sweep,
    table_witness,
)

cdef extern from "Python.h":
    void Py_DECREF(PyObject *object) noexcept

cdef size_t NO_LIMIT = <size_t>-1
cdef size_t LEAST_SLOTS = 8


@cython.final
@cython.freelist(8)
@cython.auto_pickle(False)
cdef class Slot:
    """A thread's private item."""


@cython.auto_pickle(False)
@cython.no_gc_clear     # its lists clear themselves, so no method meets a field that is None
cdef class IdleItems:
    """The idle items of a pool; the base of `pagealloc.Pool`, which makes them and checks users."""

    def __cinit__(self, *args, **kwargs):
        self.last = Slot()
        self.slots = []
        self.shared = []
        self.victims = []
        self.max_idle_bytes = NO_LIMIT
        self.max_slots = LEAST_SLOTS

    def __dealloc__(self):
        table_clear(&self.table)

    cdef object pop(self, bint *is_stolen):
        """Take an item out of the lists; None: there is none.  Leaves it idle in the table."""
        cdef Slot slot = self.find_slot()
        cdef object item
        if slot is not None and slot.item is not None:
            item = slot.item
            slot.item = None
            return item
        if self.shared:
            return self.shared.pop()
        for slot in self.slots:
            if slot.item is not None:
                item = slot.item
                slot.item = None
                is_stolen[0] = True
                return item
        return self.victims.pop() if self.victims else None

    cdef bint admit(self, object item, size_t nbytes) except -1:
        """Enter a new item as out; False: it is one of the pool's already."""
        cdef bint is_weak = False
        cdef PyObject *witness = table_witness(<PyObject *>item, &is_weak)
        cdef item_t *known
        # From here on nothing else runs.
        known = table_find(&self.table, <PyObject *>item)
        # Without weak references, what was out at this address may have died.
        if known != NULL and (
            known.state != ITEM_OUT or known.is_weak and item_is(known, <PyObject *>item)
        ):
            if is_weak:
                Py_DECREF(witness)
            return False
        known = table_insert(&self.table, <PyObject *>item)
        if known == NULL:
            if is_weak:
                Py_DECREF(witness)
            raise MemoryError("no memory for the table of a Pool's items")
        known.witness = witness
        known.is_weak = is_weak
        known.is_buffer = isinstance(item, Buffer)
        known.nbytes = (<Buffer>item).nbytes if known.is_buffer else nbytes
        known.state = ITEM_OUT
        return True

    cdef void forget(self, object item) noexcept:
        """Drop an item that is in no list, or in a list that is no longer the pool's."""
        cdef item_t *known = table_find(&self.table, <PyObject *>item)
        if known != NULL:
            if known.state == ITEM_IDLE:
                self.idle_bytes -= known.nbytes
            table_erase(&self.table, <PyObject *>item)
        self.n_dropped += 1

    cdef list turn_over(self):
        """Make what is idle the victims; what was victim is the caller's to let go."""
        cdef list fresh = [], slots = [], old
        cdef Slot nobody = Slot(), slot
        cdef object item
        # From here on nothing else runs.
        old = self.victims
        self.victims = self.shared
        self.shared = fresh
        for item in old:
            self.forget(item)
        for slot in self.slots:
            if slot.item is not None:
                self.victims.append(slot.item)
                slot.item = None
        self.slots = slots
        self.last = nobody
        self.max_slots = LEAST_SLOTS
        table_sweep(&self.table)
        return old

    cdef list take_all(self):
        """Empty the pool, and forget what is out; what was idle is the caller's to let go."""
        cdef list fresh = [], slots = [], victims = [], items
        cdef Slot nobody = Slot(), slot
        # From here on nothing else runs.
        items = self.shared
        for slot in self.slots:
            if slot.item is not None:
                items.append(slot.item)
                slot.item = None
        items.extend(self.victims)
        self.shared, self.slots, self.victims, self.last = fresh, slots, victims, nobody
        self.idle_bytes = 0
        self.n_dropped += len(items)
        table_clear(&self.table)
        return items

    cdef int64_t n_private(self) noexcept:
        """How many slots hold an item."""
        cdef Slot slot
        cdef int64_t n = 0
        for slot in self.slots:
            n += slot.item is not None
        return n

    cdef Slot find_slot(self):
        """The calling thread's slot, and the last from then on; None: it has none."""
        cdef unsigned long thread_id = PyThread_get_thread_ident()
        cdef Slot slot = self.last
        if slot.thread_id == thread_id:
            return slot
        for slot in self.slots:
            if slot.thread_id == thread_id:
                self.last = slot
                return slot
        return None

    cdef Slot own_slot(self):
        """The calling thread's slot, made if need be.

        Threads end without a word.  Before there are more slots than ever, the empty ones go,
        whosever they are: so there are never many more than items in them.
        """
        cdef Slot slot = self.find_slot(), fresh
        cdef list kept = None
        if slot is not None:
            return slot
        fresh = Slot()      # may collect garbage, which may use the pool
        fresh.thread_id = PyThread_get_thread_ident()
        kept = []
        slot = self.find_slot()
        if slot is not None:
            return slot
        if <size_t>len(self.slots) < self.max_slots:
            self.slots.append(fresh)
        else:
            for slot in self.slots:
                if slot.item is not None:
                    kept.append(slot)
            kept.append(fresh)
            self.slots = kept
            self.max_slots = max(LEAST_SLOTS, 2 * <size_t>len(kept))
        self.last = fresh
        return fresh

    cdef str broken(self):
        """Which invariant does not hold, or None.  Makes no object: that could collect garbage."""
        cdef size_t i, n_idle = 0, n_listed = 0, n_items = 0, idle_bytes = 0
        cdef item_t *known
        cdef Slot slot, other
        cdef list items
        cdef object item
        if self.table.places != NULL:
            for i in range(self.table.mask + 1):
                known = &self.table.places[i]
                if known.address == NULL:
                    continue
                if table_find(&self.table, known.address) != known:
                    return "an item in the table cannot be found"
                known.is_marked = False
                n_items += 1
                if known.state == ITEM_IDLE:
                    n_idle += 1
                    idle_bytes += known.nbytes
        if n_items != self.table.n_items or 2 * n_items > self.table.mask + 1:
            return "the table's number of items is wrong, or too large for it"
        if idle_bytes != self.idle_bytes or idle_bytes > self.max_idle_bytes:
            return "idle_bytes is not what the idle items count with, or above the limit"
        for slot in self.slots:
            for other in self.slots:
                if other is not slot and other.thread_id == slot.thread_id:
                    return "a thread has two slots"
            if slot.item is not None:
                n_listed += 1
                if not self.mark(slot.item):
                    return "a private item is not idle, or is in the pool twice"
        for items in (self.shared, self.victims):
            for item in items:
                n_listed += 1
                if not self.mark(item):
                    return "a shared item or a victim is not idle, or is in the pool twice"
        if n_listed != n_idle:
            return "an item counts as idle and is in no list"
        if self.last.thread_id != 0 and self.last not in self.slots:
            return "the last slot is in no list"
        return None

    cdef bint mark(self, object item) noexcept:
        """Mark an idle item; False: it is none, or was marked before."""
        cdef item_t *known = table_find(&self.table, <PyObject *>item)
        if known == NULL or known.state != ITEM_IDLE or known.is_marked:
            return False
        known.is_marked = True
        return True
