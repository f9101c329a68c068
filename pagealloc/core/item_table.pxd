"""What a pool knows of each of its items, found by the item's address.

Purpose: tell an item that is out from one that is idle, and both from a foreign object, without a
Python call.  The table keeps no item alive: of an item that supports weak references it owns one,
which says whether the object at that address is still the item; of any other it knows the type.

Invariants: at most half of the places are taken; an item stands in the first place from its hash
on that is not taken by another.  Locking: the GIL.  No function here runs Python code, except
`table_witness`, which may collect garbage.  Units: items; bytes where named.
"""

from cpython.object cimport PyObject
from libc.stdint cimport uint8_t, uint64_t

cdef extern from *:
    """
    static inline PyObject *pagealloc_referent(PyObject *reference)
    { return ((PyWeakReference *)reference)->wr_object; }
    static inline PyObject *pagealloc_type(PyObject *object)
    { return (PyObject *)Py_TYPE(object); }
    """
    PyObject *referent "pagealloc_referent"(PyObject *reference) noexcept
    PyObject *type_of "pagealloc_type"(PyObject *object) noexcept

cdef enum:
    ITEM_OUT        # somebody has it
    ITEM_PUTTING    # its reset is running
    ITEM_IDLE       # the pool has it, and keeps it alive

ctypedef struct item_t:
    PyObject *address       # NULL: nobody's place
    PyObject *witness       # a weak reference to it, owned; or its type, only to compare with
    size_t nbytes           # what it counts with
    uint8_t state
    uint8_t is_weak         # the witness is a weak reference
    uint8_t is_buffer
    uint8_t is_marked       # for check()

ctypedef struct item_table_t:
    item_t *places
    size_t mask             # capacity - 1; the capacity is a power of two
    int shift               # 64 - log2(capacity)
    size_t n_items

cdef inline item_t *table_find(const item_table_t *table, PyObject *address) noexcept:
    """What is known of the object at this address; NULL: nothing."""
    cdef size_t i
    if table.places == NULL:
        return NULL
    i = first_place(table, address)
    while table.places[i].address != NULL:
        if table.places[i].address == address:
            return &table.places[i]
        i = (i + 1) & table.mask
    return NULL


cdef inline size_t first_place(const item_table_t *table, PyObject *address) noexcept:
    return <size_t>((<uint64_t><size_t>address * <uint64_t>0x9E3779B97F4A7C15) >> table.shift)


cdef inline size_t table_nbytes(const item_table_t *table) noexcept:
    return 0 if table.places == NULL else (table.mask + 1) * sizeof(item_t)


cdef inline bint item_is(const item_t *item, PyObject *living) noexcept:
    """Whether the living object at the item's address is the item, as far as can be told."""
    if item.is_weak:
        return referent(item.witness) == living
    return type_of(living) == item.witness


cdef PyObject *table_witness(PyObject *living, bint *is_weak) except NULL
cdef item_t *table_insert(item_table_t *table, PyObject *address) noexcept
cdef void table_erase(item_table_t *table, PyObject *address) noexcept
cdef void table_sweep(item_table_t *table) noexcept
cdef void table_clear(item_table_t *table) noexcept
