"""numpy_handler: NumPy's arrays in an allocator's memory (NEP 49).

Purpose
    Give NumPy four C functions over a heap, and switch to them and back without ever leaving
    NumPy with functions whose heap is gone.
Structure
    NumPy's ContextVar --> capsule "mem_handler" --> NumpyHandler --> Heap
    array over the heap ->    |                        holds the PyDataMem_Handler itself
    `changes`, a ContextVar of ours beside NumPy's: what to restore, innermost first
Invariants
    a capsule holds its NumpyHandler, and pins the heap: close() refuses while one lives, so the
    functions find an open heap without looking
    of one NumpyHandler at most one capsule lives; of one Heap at most one NumpyHandler
    so a capsule needs not be immortal: whoever can call the functions, a context or an array,
    holds it.  At interpreter exit it goes with the last of them; if that never goes, nor does it.
    (The garbage collector does not see through a capsule: an array over an allocator that is
    stored in that allocator's own subclass is never collected.)
Locking
    The GIL for the objects.  The four functions may be called without it: they touch no Python
    object, and the heap locks itself.  While the heap is profiled they take it, as NumPy itself
    does right after them to tell tracemalloc.
Units
    Bytes.
"""

cimport cython
from cpython.exc cimport PyErr_SetObject, PyErr_WriteUnraisable
from cpython.object cimport PyObject
from cpython.pycapsule cimport PyCapsule_New, PyCapsule_SetContext
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.stdint cimport int64_t, uint8_t, uintptr_t
from libc.string cimport memcpy, memset, strcpy

from pagealloc.core.atomics cimport (
    atomic_add_i64,
    atomic_load_i64,
    atomic_load_ptr,
    atomic_store_ptr,
)
from pagealloc.core.heap cimport heap_alloc, heap_free, heap_usable_bytes
from pagealloc.core.heap_owner cimport Heap
from pagealloc.core.heap_state cimport heap_t
from pagealloc.core.noted cimport (
    blocks_are_noted,
    forget_memory,
    memory_is_followed,
    note_memory,
    observed,
)
from pagealloc.core.page_heap cimport FREED
from pagealloc.core.size_class cimport SLOT_UNIT_BYTES

from contextvars import ContextVar as _ContextVar
from weakref import WeakValueDictionary as _WeakValueDictionary

from pagealloc.core.allocator import default_allocator as _default_allocator

cdef extern from "Python.h" nogil:
    # Needs neither the GIL nor a thread state.
    int Py_AddPendingCall(int (*function)(void *) noexcept, void *argument)

cdef extern from "Python.h":
    # As cpython.pycapsule's, but for a capsule that may not be counted any more.
    void *PyCapsule_GetContext(PyObject *capsule)
    int PyCapsule_SetDestructor(object capsule, void (*gone)(PyObject *) noexcept) except -1

cdef extern from "numpy/arrayobject.h":
    ctypedef struct PyDataMemAllocator:
        void *ctx
        void *(*malloc)(void *ctx, size_t nbytes) noexcept nogil
        void *(*calloc)(void *ctx, size_t n_items, size_t item_bytes) noexcept nogil
        void *(*realloc)(void *ctx, void *memory, size_t nbytes) noexcept nogil
        void (*free)(void *ctx, void *memory, size_t nbytes) noexcept nogil
    ctypedef struct PyDataMem_Handler:
        char name[127]
        uint8_t version
        PyDataMemAllocator allocator
    int _import_array() except -1
    object PyDataMem_SetHandler(PyObject *handler)  # NULL: NumPy's own
    object PyDataMem_GetHandler()

cdef extern from * nogil:
    bint multiply_overflows "__builtin_mul_overflow"(size_t a, size_t b, size_t *product)

cdef const char *CAPSULE_NAME = "mem_handler"   # NumPy looks for this one
cdef size_t MAX_NBYTES = <size_t>1 << 47        # rounding up to pages cannot overflow below


# ---------------------------------------------------------------------------------------------
# What NumPy calls.  `ctx` is the heap, which the capsule keeps open.

cdef inline char *allocate(heap_t *heap, size_t nbytes, bint *fresh) noexcept nogil:
    cdef int error = 0
    cdef char *memory
    if nbytes > MAX_NBYTES:
        return NULL
    memory = heap_alloc(heap, nbytes if nbytes else 1, 0, fresh, &error)
    if observed(blocks_are_noted) and memory != NULL:
        note_memory(memory, <int64_t>nbytes)
    return memory


cdef inline int free_noted(heap_t *heap, void *memory) noexcept nogil:
    """Free a block: the heap's answer."""
    if observed(memory_is_followed):
        forget_memory(memory)   # before somebody else can have the address
    return heap_free(heap, <char *>memory)


cdef void *handler_malloc(void *ctx, size_t nbytes) noexcept nogil:
    cdef bint fresh
    return allocate(<heap_t *>ctx, nbytes, &fresh)


cdef void *handler_calloc(void *ctx, size_t n_items, size_t item_bytes) noexcept nogil:
    cdef size_t nbytes
    cdef bint fresh = False
    cdef char *memory
    if multiply_overflows(n_items, item_bytes, &nbytes):
        return NULL
    memory = allocate(<heap_t *>ctx, nbytes, &fresh)
    if memory != NULL and not fresh:
        memset(memory, 0, nbytes)
    return memory


cdef void *handler_realloc(void *ctx, void *memory, size_t nbytes) noexcept nogil:
    """The same block while it fits and at least half of it stays in use, else a new one."""
    cdef heap_t *heap = <heap_t *>ctx
    cdef size_t usable_bytes
    cdef char *moved
    cdef bint fresh
    if memory == NULL:
        return allocate(heap, nbytes, &fresh)
    usable_bytes = heap_usable_bytes(heap, <const char *>memory)
    if usable_bytes == 0:
        report_foreign(memory)
        return NULL
    if nbytes <= usable_bytes and (
        nbytes >= usable_bytes - usable_bytes // 2 or usable_bytes == SLOT_UNIT_BYTES
    ):
        return memory
    moved = allocate(heap, nbytes, &fresh)
    if moved == NULL:
        return memory if nbytes <= usable_bytes else NULL   # to shrink cannot fail
    memcpy(moved, memory, nbytes if nbytes < usable_bytes else usable_bytes)
    free_noted(heap, memory)
    return moved


cdef void handler_free(void *ctx, void *memory, size_t nbytes) noexcept nogil:
    # The heap knows the size; NumPy's `nbytes` is a guess, wrong after an array was reshaped.
    if memory != NULL and free_noted(<heap_t *>ctx, memory) != FREED:
        report_foreign(memory)


# Memory that is not ours is left alone: whose it is, and whether it is anybody's, is unknown.  The
# functions hold no GIL, so the main thread reports it, the next time that it runs Python code.
cdef int64_t n_foreign = 0          # not reported yet; atomic
cdef void *foreign_address = NULL   # the last; atomic


cdef void report_foreign(void *memory) noexcept nogil:
    atomic_store_ptr(&foreign_address, memory)
    if atomic_add_i64(&n_foreign, 1) == 1 and Py_AddPendingCall(show_foreign, NULL) != 0:
        atomic_add_i64(&n_foreign, -1)  # the queue is full: the next one tries again


cdef int show_foreign(void *unused) noexcept with gil:
    cdef int64_t n = atomic_load_i64(&n_foreign)
    atomic_add_i64(&n_foreign, -n)
    PyErr_SetObject(RuntimeError, (
        f"NumPy gave memory back, or wanted it resized, that is no live block of the allocator "
        f"its array belongs to ({n} time{'s' if n > 1 else ''}, the last at "
        f"{<uintptr_t>atomic_load_ptr(&foreign_address):#x}): something has freed it before, or "
        f"changed the array's data pointer; it was left alone"
    ))
    PyErr_WriteUnraisable(numpy_handler)
    return 0


# ---------------------------------------------------------------------------------------------
# Switching

# The changes made in this context and not undone yet: (handler, is_block, previous, outer) or
# None, `previous` being the capsule to restore and `outer` the change before.
_changes = _ContextVar("pagealloc.numpy_handler.changes", default=None)
_handlers = _WeakValueDictionary()      # id(heap) -> its NumpyHandler, which keeps the id taken


cdef void capsule_gone(PyObject *capsule) noexcept:
    cdef NumpyHandler handler = <NumpyHandler>PyCapsule_GetContext(capsule)
    handler.capsule = NULL
    handler.owner.n_pins -= 1
    Py_DECREF(handler)      # the capsule's reference


@cython.final
cdef class NumpyHandler:
    """NumPy's allocation functions over one allocator: `pagealloc.numpy_handler` makes one.

    A context manager, and a pair `install()` and `uninstall()`.  Both act on the current context
    (`contextvars`): this thread's, or this asyncio task's.

    Attributes
    ----------
    allocator : PageAllocator
        Where the arrays' memory comes from.

    Notes
    -----
    Thread-safe, nestable and re-entrant: what is to be restored is kept per context.
    """

    cdef Heap owner
    cdef PyDataMem_Handler functions
    cdef PyObject *capsule          # not a reference: NULL once it is gone
    cdef object __weakref__

    def __init__(self):
        raise TypeError("only pagealloc.numpy_handler() makes a NumpyHandler")

    @property
    def allocator(self):
        """The allocator the arrays' memory comes from."""
        return self.owner

    @property
    def active(self) -> bool:
        """Whether NumPy uses it in the current context."""
        return self.is_current()

    cdef bint is_current(self) except -1:
        if self.capsule == NULL:
            return False
        capsule = PyDataMem_GetHandler()
        return <PyObject *>capsule == self.capsule

    cdef object open_capsule(self):
        """The capsule that lives, or a new one.  Raises ClosedError."""
        if self.capsule != NULL:
            return <object>self.capsule
        if self.owner is None:
            raise TypeError("only pagealloc.numpy_handler() makes a NumpyHandler")
        self.functions.allocator.ctx = self.owner.open_heap()
        capsule = PyCapsule_New(&self.functions, CAPSULE_NAME, NULL)
        PyCapsule_SetContext(capsule, <void *>self)
        PyCapsule_SetDestructor(capsule, capsule_gone)
        Py_INCREF(self)
        self.owner.n_pins += 1
        self.capsule = <PyObject *>capsule
        return capsule

    cdef int change(self, bint is_block) except -1:
        capsule = self.open_capsule()
        previous = PyDataMem_SetHandler(<PyObject *>capsule)
        try:
            _changes.set((self, is_block, previous, _changes.get()))
        except:     # noqa: E722  out of memory, say: undo
            PyDataMem_SetHandler(<PyObject *>previous)
            raise
        return 0

    def __enter__(self):
        self.change(True)
        return self

    def __exit__(self, *exc_info):
        inner = []          # changes since, last first
        change = _changes.get()
        while change is not None and not (change[0] is self and change[1]):
            inner.append(change)
            change = change[3]
        if change is None:
            raise RuntimeError(
                "this NumPy handler was not entered in this context: a with block must end in the "
                "thread, and the asyncio task, in which it began"
            )
        previous, outer = change[2], change[3]
        # What was installed in the block goes with it.
        while inner and not inner[len(inner) - 1][1]:
            inner.pop()
        if inner:   # another block is still open, as those of generators may be: it restores later
            handler, is_block, _, _ = inner.pop()
            outer = (handler, is_block, previous, outer)
            while inner:
                outer = (*inner.pop()[:3], outer)
            _changes.set(outer)
        else:
            PyDataMem_SetHandler(<PyObject *>previous)
            _changes.set(outer)

    def install(self) -> None:
        """Make NumPy use it from now on, in the current context.

        Until `uninstall()`, or the end of the with block that is around it.  Installing twice in
        a row is once.

        Raises
        ------
        ClosedError
            The allocator is closed.
        """
        change = _changes.get()
        if change is None or change[0] is not self or change[1] or not self.is_current():
            self.change(False)

    def uninstall(self) -> None:
        """Restore what `install()` replaced, in the current context.

        Arrays made meanwhile stay as they are.

        Raises
        ------
        RuntimeError
            It is not what was installed last in this context; nothing was changed.
        """
        change = _changes.get()
        if change is None or change[0] is not self or change[1] or not self.is_current():
            raise RuntimeError(
                "this NumPy handler is not what was installed last in this context (thread, "
                "asyncio task): uninstall in the reverse order, where install() was called"
            )
        PyDataMem_SetHandler(<PyObject *>change[2])
        _changes.set(change[3])

    def __reduce_ex__(self, protocol):
        raise TypeError("a NumpyHandler belongs to this process: no copy, no pickle")

    def __repr__(self):
        return f"<NumpyHandler{' active' if self.is_current() else ''} over {self.owner!r}>"


def numpy_handler(allocator=None) -> NumpyHandler:
    """Return the handler that has NumPy allocate its arrays from `allocator` (NEP 49).

    Parameters
    ----------
    allocator : PageAllocator, optional
        None: `default_allocator()`.

    Returns
    -------
    NumpyHandler
        To be used in a ``with``, or by its `install()`.  The same one each time while it is in
        use.

    Raises
    ------
    TypeError
        `allocator` is none.
    ClosedError
        It is closed.

    Notes
    -----
    The memory is page-aligned from a page on, and 64-byte-aligned below.  Each array goes back to
    the allocator it came from, whatever is in use by then, and keeps it: `PageAllocator.close`
    refuses while arrays are alive or the handler is in use.  If the allocator refuses memory,
    NumPy raises its own `MemoryError`, without the reason.
    NumPy keeps its handler in a `contextvars.ContextVar`.  So a new thread starts with NumPy's
    own handler, whatever is installed elsewhere, and an asyncio task with that of the code which
    made it.

    Examples
    --------
    >>> with pagealloc.numpy_handler():
    ...     weights = np.empty((4096, 4096), np.float16)
    >>> weights.ctypes.data % pagealloc.page_size_bytes()
    0
    """
    cdef NumpyHandler handler
    if allocator is None:
        allocator = _default_allocator()
    if not isinstance(allocator, Heap):
        raise TypeError(
            f"allocator={allocator!r}: a PageAllocator is expected, or None for the default one"
        )
    (<Heap>allocator).open_heap()
    found = _handlers.get(id(allocator))
    if found is not None:
        return found
    _import_array()     # here, not on import: `import pagealloc` does without NumPy
    handler = NumpyHandler.__new__(NumpyHandler)
    handler.owner = allocator
    strcpy(handler.functions.name, "pagealloc")
    handler.functions.version = 1
    handler.functions.allocator.malloc = handler_malloc
    handler.functions.allocator.calloc = handler_calloc
    handler.functions.allocator.realloc = handler_realloc
    handler.functions.allocator.free = handler_free
    return _handlers.setdefault(id(allocator), handler)
