"""The table of a pool's items; what it is for stands in the .pxd.

Purpose
    Open addressing by address, with places for items that died while they were out swept before
    the table grows: it is never larger than eight times the items there are.
Structure
    places:  | - | item | item | - | ... |      capacity = 2 ** n, at most half of it taken
Invariants
    n_items = places with an address; no free place between an item's first place and its own
Locking
    The GIL.
Units
    Places.
"""

from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF
from libc.stdlib cimport calloc, free
from libc.string cimport memset

cdef extern from *:
    """
    static int pagealloc_is_referable(PyObject *object)
    { return PyType_SUPPORTS_WEAKREFS(Py_TYPE(object)) != 0; }
    """
    bint is_referable "pagealloc_is_referable"(PyObject *object) noexcept
    PyObject *PyWeakref_NewRef(PyObject *object, PyObject *callback) except NULL
    PyObject *None_pointer "Py_None"

cdef size_t LEAST_CAPACITY = 16


cdef PyObject *table_witness(PyObject *living, bint *is_weak) except NULL:
    """What later tells the object from another at its address; the caller owns a weak one."""
    is_weak[0] = is_referable(living)
    return PyWeakref_NewRef(living, NULL) if is_weak[0] else type_of(living)


cdef inline bint is_dead(const item_t *item) noexcept:
    return item.state == ITEM_OUT and item.is_weak and referent(item.witness) == None_pointer


cdef inline void drop_witness(item_t *item) noexcept:
    # No Python code runs: such a weak reference has no callback.
    if item.is_weak:
        Py_DECREF(<object>item.witness)


cdef item_t *free_place(item_table_t *table, PyObject *address) noexcept:
    cdef size_t i = first_place(table, address)
    while table.places[i].address != NULL:
        i = (i + 1) & table.mask
    return &table.places[i]


cdef bint rebuild(item_table_t *table) noexcept:
    """Move the living into a table four times as large as they need; False: no memory for it."""
    cdef item_table_t fresh
    cdef size_t i, capacity = LEAST_CAPACITY, n_living = 0
    memset(&fresh, 0, sizeof(fresh))
    if table.places != NULL:
        for i in range(table.mask + 1):
            if table.places[i].address != NULL and not is_dead(&table.places[i]):
                n_living += 1
    fresh.shift = 60
    while capacity < 4 * n_living:
        capacity *= 2
        fresh.shift -= 1
    fresh.places = <item_t *>calloc(capacity, sizeof(item_t))
    if fresh.places == NULL:
        return False
    fresh.mask = capacity - 1
    fresh.n_items = n_living
    if table.places != NULL:
        for i in range(table.mask + 1):
            if table.places[i].address == NULL:
                continue
            if is_dead(&table.places[i]):
                drop_witness(&table.places[i])
            else:
                free_place(&fresh, table.places[i].address)[0] = table.places[i]
    free(table.places)
    table[0] = fresh
    return True


cdef item_t *table_insert(item_table_t *table, PyObject *address) noexcept:
    """A place for an item, whose fields the caller fills; NULL: no memory, nothing changed.

    What was known of an earlier object at this address is forgotten.
    """
    cdef item_t *item = table_find(table, address)
    if item != NULL:
        drop_witness(item)
    else:
        if table.places == NULL or 2 * (table.n_items + 1) > table.mask + 1:
            if not rebuild(table):
                return NULL
        item = free_place(table, address)
        table.n_items += 1
    memset(item, 0, sizeof(item_t))
    item.address = address
    return item


cdef void table_erase(item_table_t *table, PyObject *address) noexcept:
    """Forget an item.  Those behind it close up, so that none is cut off from its first place."""
    cdef item_t *item = table_find(table, address)
    cdef size_t hole, i
    if item == NULL:
        return
    drop_witness(item)
    hole = <size_t>(item - table.places)
    i = (hole + 1) & table.mask
    while table.places[i].address != NULL:
        # How far it stands from its first place, and how far from the hole.
        if ((i - first_place(table, table.places[i].address)) & table.mask) >= (
            (i - hole) & table.mask
        ):
            table.places[hole] = table.places[i]
            hole = i
        i = (i + 1) & table.mask
    memset(&table.places[hole], 0, sizeof(item_t))
    table.n_items -= 1


cdef void table_sweep(item_table_t *table) noexcept:
    """Forget the items that died while they were out, and give room back."""
    if table.places != NULL:
        rebuild(table)      # without memory for it, a later sweep does it


cdef void table_clear(item_table_t *table) noexcept:
    """Forget everything."""
    cdef item_table_t old = table[0]
    cdef size_t i
    memset(table, 0, sizeof(item_table_t))
    if old.places != NULL:
        for i in range(old.mask + 1):
            if old.places[i].address != NULL:
                drop_witness(&old.places[i])
    free(old.places)
