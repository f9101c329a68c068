"""Pool: idle items kept for reuse.

Purpose
    Save the making of objects that are needed for a short time again and again.
Structure
    get():      own slot -> shared (newest first) -> another's slot -> victims -> make one
    put():      own slot, or shared if that is taken
    collect():  victims go; slots and shared become the victims
    Pool --is a--> IdleItems (idle_items.pyx): the lists, and the table of all items
Invariants
    is_open => new or allocator is not None; closed => no item is known
Locking
    The GIL.  What runs other code (new, reset, a destructor, an allocation that collects garbage)
    runs before a change or after it, never in the middle: such code may call the pool, and
    another thread may come in between.  A pointer into the table does not outlive such a call.
Units
    Items; bytes where named.
"""

cimport cython
from cpython.object cimport PyObject
from cpython.pythread cimport PyThread_get_thread_ident
from libc.stdint cimport uintptr_t

from pagealloc.core.buffer cimport Buffer
from pagealloc.core.idle_items cimport IdleItems, Slot, is_usable
from pagealloc.core.item_table cimport (
    ITEM_IDLE,
    ITEM_OUT,
    ITEM_PUTTING,
    item_is,
    item_t,
    table_erase,
    table_find,
    table_nbytes,
)

import gc as _gc
from types import GenericAlias as _GenericAlias
from weakref import ref as _ref

from pagealloc.core.allocator import PageAllocator as _PageAllocator
from pagealloc.core.allocator import default_allocator as _default_allocator
from pagealloc.core.counters import PoolStats as _PoolStats
from pagealloc.errors import ClosedError, InvariantError
from pagealloc.units import format_bytes as _format_bytes
from pagealloc.units import parse_bytes as _parse_bytes

cdef str name_of(object item):
    """For messages; no repr(), which may be huge, or run the item's own code."""
    return f"the {type(item).__name__} at {<uintptr_t><void *>item:#x}"


cdef int let_go(object item) except -1:
    """Close a Buffer that left the pool.  Runs other code."""
    if isinstance(item, Buffer):
        try:
            (<Buffer>item).close()
        except BufferError:
            pass    # somebody holds a view: the last one gives the memory back
    return 0


@cython.final
@cython.auto_pickle(False)
@cython.no_gc_clear     # as its base: no method meets a field that was cleared
cdef class Pool(IdleItems):
    """Idle items, kept for reuse: Buffers of one length, or whatever `new` makes.

    Parameters
    ----------
    new : callable, optional
        Makes an item when none is idle: any object but None that it has not returned before.
    nbytes : int or str, optional
        Without `new`: the items are Buffers of this length, from `allocator`.  With `new`: what an
        item counts with for `max_idle_bytes`, unless it is a Buffer, which counts its own length.
    reset : callable, optional
        Called with the item by each `put`, before the item can be got again.  Meant to clear
        lengths and references, not memory: the next user writes that anyway.
    max_idle_bytes : int or str, optional
        What is put beyond it is dropped.  0 keeps nothing; None: no limit.
    allocator : PageAllocator, optional
        Where Buffers come from; None: `default_allocator()`.

    Raises
    ------
    TypeError, ValueError
        Neither `new` nor `nbytes`; an `allocator` that would not be used; `max_idle_bytes` without
        `nbytes`; or a value that is no callable, size or allocator.

    Notes
    -----
    **When not to use it.**  An item may vanish at any collection, so a pool is nothing for what is
    scarce, must be closed in order, or is expected to be there: connections, files, threads.  It
    is nothing for long-lived objects, which would only pass through; nor for objects of very
    different sizes, where a small request gets, and holds, the largest; nor for objects that are
    as cheap to make as to reset.  `PageAllocator.alloc` itself serves from free slots and runs: a
    pool of Buffers saves the making of the handle and little else.

    `get` takes, in this order: what this thread put last, the newest of the items all threads
    share, another thread's private item, an item from before the last collection, a new one.
    The content of an item is what its last user and `reset` left.

    A collection drops what lay idle since the collection before: `collect()` runs one, and so does
    each garbage collection of the oldest generation.  A program that makes no garbage has none of
    these; `max_idle_bytes` is the limit that always holds.

    Thread-safe.  `new` and `reset` run while other threads use the pool, may use it themselves, and
    may raise: the exception comes out of `get` or `put`.  A forked child has a copy of all that
    lay idle, the items private to the parent's other threads included.

    Of an item that is out the pool knows its address, and holds a weak reference if its type
    supports one (a Buffer, an array, an ordinary class: yes; a list, a dict, a bytearray: no).
    Where it does not, the pool cannot tell an item that died without being put from a later object
    of the same type at the same address, takes that object when it is put, and remembers the
    address of the dead item, in some 100 bytes, until it makes another item there.

    Examples
    --------
    >>> pool = Pool(nbytes="64KiB", max_idle_bytes="16MiB")
    >>> with pool.borrow() as buffer:
    ...     memoryview(buffer)[:5] = b"hello"
    >>> lists = Pool(list, reset=list.clear)
    """

    cdef size_t item_nbytes
    cdef object new, reset, allocator
    cdef bint is_made, is_open
    cdef object __weakref__

    def __init__(
        self, new=None, *, nbytes=None, reset=None, max_idle_bytes=None, allocator=None
    ):
        if self.is_made:
            raise TypeError("this Pool is made already: make a new one")
        if new is None and nbytes is None:
            raise TypeError("a Pool needs new=, a callable that makes an item, or nbytes= for "
                            "Buffers of that length")
        for name, value in (("new", new), ("reset", reset)):
            if value is not None and not callable(value):
                raise TypeError(f"{name} must be callable, not {type(value).__name__}")
        if new is not None and allocator is not None:
            raise ValueError("allocator= is for the Buffers of a Pool without new=: let new "
                             "allocate from it instead")
        if allocator is not None and not isinstance(allocator, _PageAllocator):
            raise TypeError(f"allocator must be a PageAllocator, not {type(allocator).__name__}")
        if max_idle_bytes is not None and nbytes is None:
            raise ValueError("max_idle_bytes= needs nbytes=, what an item counts with")
        cdef size_t item_nbytes = 0, limit = self.max_idle_bytes
        if nbytes is not None:
            item_nbytes = _parse_bytes(nbytes)
        if max_idle_bytes is not None:
            limit = _parse_bytes(max_idle_bytes, name="max_idle_bytes", minimum=0)
        if new is None and allocator is None:
            allocator = _default_allocator()
        self.item_nbytes = item_nbytes
        self.max_idle_bytes = limit
        self.new = new
        self.reset = reset
        self.allocator = allocator
        register(self)
        self.is_made = self.is_open = True

    # ---------------------------------------------------------------------------------------
    # Getting

    def get(self):
        """Return an idle item, or a new one.

        Raises
        ------
        ClosedError
            The pool is closed.
        TypeError, ValueError
            `new` returned None, or an object that is one of the pool's items already.
        OutOfMemoryError
            The allocator refused a Buffer.
        Exception
            What `new` raised.
        """
        return self.take()

    cdef inline object take(self):
        cdef Slot slot = self.last
        cdef item_t *known
        cdef object item
        if slot.thread_id == PyThread_get_thread_ident() and slot.item is not None:
            item = slot.item
            known = table_find(&self.table, <PyObject *>item)
            if not known.is_buffer or is_usable(item):
                slot.item = None
                self.hand_out(known)
                return item
        return self.take_slow()

    cdef inline void hand_out(self, item_t *known) noexcept:
        known.state = ITEM_OUT
        self.idle_bytes -= known.nbytes
        self.n_hits += 1

    cdef object take_slow(self):
        cdef item_t *known
        cdef object item = None
        cdef bint is_stolen
        while True:
            is_stolen = False
            item = self.pop(&is_stolen)
            if item is None:
                return self.make()
            known = table_find(&self.table, <PyObject *>item)
            if not known.is_buffer or is_usable(item):
                self.n_steals += is_stolen
                self.hand_out(known)
                return item
            self.forget(item)   # who put it went on using it, and must not share it with others
            let_go(item)
            item = None         # here: its destructor must not run within the next change

    cdef object make(self):
        """A new item, known as out."""
        cdef object item
        self.require_open()
        item = self.allocator.alloc(self.item_nbytes) if self.new is None else self.new()
        if item is None:
            raise TypeError("new() returned None: it must return the item it makes")
        if not self.admit(item, self.item_nbytes):
            raise ValueError(
                f"new() returned {name_of(item)}, which is an item of this Pool already: it must "
                f"make another object at each call"
            )
        if not self.is_open:
            table_erase(&self.table, <PyObject *>item)
            raise ClosedError("this Pool was closed while an item was made for it")
        self.n_misses += 1
        return item

    # ---------------------------------------------------------------------------------------
    # Putting

    def put(self, item) -> None:
        """Give an item back, once, after its last use.

        Raises
        ------
        ValueError
            It was not got from this pool, or is in the pool already; or it is a closed Buffer, or
            the pool is closed (`ClosedError`).  Nothing was changed.
        BufferError
            Views of it (a memoryview, a NumPy array) are alive, through which this user and the
            next would share it.  It stays out: drop them, and put it again.
        Exception
            What `reset` raised; the item was dropped.
        """
        self.give(item)

    cdef inline int give(self, object item) except -1:
        cdef Slot slot
        cdef item_t *known
        if self.reset is not None and not self.run_reset(item):
            return 0
        slot = self.last
        if slot.thread_id != PyThread_get_thread_ident():
            slot = self.own_slot()
        # From here on nothing else runs.
        known = self.find_out(item)
        if known.nbytes > self.max_idle_bytes - self.idle_bytes:
            self.forget(item)
            return let_go(item)
        if slot.item is None:
            slot.item = item
        else:
            self.shared.append(item)
        known.state = ITEM_IDLE
        self.idle_bytes += known.nbytes
        return 0

    cdef inline item_t *find_out(self, object item) except NULL:
        """What is known of an item that is out and may be put."""
        cdef item_t *known = table_find(&self.table, <PyObject *>item)
        if (
            known == NULL
            or known.state != ITEM_OUT
            or not item_is(known, <PyObject *>item)
            or known.is_buffer and not is_usable(item)
        ):
            raise self.refusal(item)
        return known

    cdef object refusal(self, object item):
        """Why this item cannot be put."""
        cdef item_t *known = table_find(&self.table, <PyObject *>item)
        cdef Py_ssize_t n_exports
        if not self.is_open:
            return ClosedError("this Pool is closed")
        if known != NULL and known.state == ITEM_IDLE:
            return ValueError(
                f"{name_of(item)} is in this Pool already: put an item once, after its last use"
            )
        if known != NULL and known.state == ITEM_PUTTING:
            return ValueError(
                f"{name_of(item)} is being put into this Pool already: its reset is running"
            )
        if known == NULL or not item_is(known, <PyObject *>item):
            return ValueError(
                f"{name_of(item)} is foreign to this Pool: only what its get() returned can be "
                f"put, and not again once the Pool has dropped it"
            )
        n_exports = (<Buffer>item).n_exports
        if n_exports == 0:
            return ClosedError(
                f"{name_of(item)} is closed: put a Buffer back as it is, or close it and do not "
                f"put it"
            )
        return BufferError(
            f"{n_exports} view{'s' if n_exports > 1 else ''} of {name_of(item)} (memoryview, NumPy "
            f"array) still alive: drop them before it is put, or the next user shares its memory"
        )

    cdef bint run_reset(self, object item) except -1:
        """Reset an item that is out; False: the pool was closed meanwhile, and the item let go."""
        cdef item_t *known = self.find_out(item)
        known.state = ITEM_PUTTING
        try:
            self.reset(item)
        except:  # noqa: E722  (whatever it is, it goes on)
            self.forget(item)
            let_go(item)
            raise
        known = table_find(&self.table, <PyObject *>item)
        if known == NULL:
            let_go(item)
            return False
        known.state = ITEM_OUT
        return True

    # ---------------------------------------------------------------------------------------
    # Letting go

    def borrow(self):
        """Return a context manager that gets an item and puts it at the end of the block.

        Returns
        -------
        Borrow
            ``with pool.borrow() as item``: the item is put also if the block raises.  It raises
            what `get` and `put` raise, but no BufferError over an exception of the block, whose
            traceback may hold the views: such an item stays out, and ends with its last reference.
            If the pool was closed meanwhile, the item is let go.

        Notes
        -----
        Entered once at a time; several threads need a Borrow each.
        """
        cdef Borrow borrow = Borrow.__new__(Borrow)
        borrow.pool = self
        return borrow

    def collect(self) -> int:
        """Drop what lay idle since the last collection; the rest of what is idle goes at the next.

        Returns
        -------
        int
            Items dropped.  Buffers among them are closed.

        Notes
        -----
        Thread-safe.  Garbage collections of the oldest generation call it, too.
        """
        cdef list old = self.turn_over()
        for item in old:
            let_go(item)
        return len(old)

    def close(self) -> None:
        """Drop all items; closing twice is fine.

        `get` and `put` raise `ClosedError` from then on.  What is out stays usable, and is its
        user's; an allocator can be closed after that, not while the pool holds its Buffers.
        """
        cdef list items
        cdef object item, _kept
        if not self.is_open:
            return
        items = self.take_all()
        self.is_open = False
        _kept = self.new, self.reset, self.allocator     # so that none dies before all are None
        self.new = self.reset = self.allocator = None
        for item in items:
            let_go(item)

    # ---------------------------------------------------------------------------------------
    # The rest

    cdef int require_open(self) except -1:
        if not self.is_open:
            raise ClosedError("this Pool is closed")
        return 0

    @property
    def closed(self) -> bool:
        """True after `close()`."""
        return not self.is_open

    def stats(self):
        """Return what the pool did so far, and what lies idle in it: a `PoolStats`."""
        cdef Py_ssize_t n_victims = len(self.victims)
        return _PoolStats(
            hits=self.n_hits,
            misses=self.n_misses,
            steals=self.n_steals,
            dropped=self.n_dropped,
            n_idle=self.n_private() + len(self.shared) + n_victims,
            n_victims=n_victims,
            idle_bytes=self.idle_bytes,
        )

    def check(self) -> None:
        """Raise `InvariantError` if what the pool knows of its items does not hold."""
        cdef str broken = self.broken()
        if broken is not None:
            raise InvariantError(f"Pool: {broken}")

    def __sizeof__(self):
        return object.__sizeof__(self) + table_nbytes(&self.table)

    def __enter__(self):
        self.require_open()
        return self

    def __exit__(self, exc_type, exc_value, traceback):
        self.close()

    def __class_getitem__(cls, item):
        return _GenericAlias(cls, item)

    def __reduce_ex__(self, protocol):
        raise TypeError("a Pool belongs to this process: no copy, no pickle; make another one")

    def __repr__(self):
        if not self.is_open:
            return "<Pool, closed>"
        stats = self.stats()
        return (
            f"<Pool with {stats.n_idle} idle item{'' if stats.n_idle == 1 else 's'} "
            f"of {_format_bytes(stats.idle_bytes)}>"
        )


@cython.final
@cython.freelist(8)
cdef class Borrow:
    """A block's use of an item of a pool; `Pool.borrow` makes one."""

    cdef Pool pool
    cdef object item    # None: not entered

    def __init__(self):
        raise TypeError("only Pool.borrow() makes a Borrow")

    def __enter__(self):
        if self.pool is None:
            raise TypeError("only Pool.borrow() makes a Borrow")
        if self.item is not None:
            raise ValueError("this Borrow is in use: each with block needs a pool.borrow() of "
                             "its own")
        self.item = self.pool.take()
        return self.item

    def __exit__(self, exc_type, exc_value, traceback):
        cdef object item = self.item
        if item is None:
            return
        self.item = None
        if not self.pool.is_open:
            let_go(item)
            return
        try:
            self.pool.give(item)
        except BufferError:
            if exc_type is None:    # else what the block raised matters more, and holds the views
                raise

    def __class_getitem__(cls, item):
        return _GenericAlias(cls, item)

    def __reduce_ex__(self, protocol):
        raise TypeError("a Borrow belongs to its block: no copy, no pickle")


# ---------------------------------------------------------------------------------------------
# All pools

cdef set living_pools = set()   # weak references


cdef int register(Pool pool) except -1:
    living_pools.add(_ref(pool, living_pools.discard))
    if _on_collection not in _gc.callbacks:
        _gc.callbacks.append(_on_collection)
    return 0


def collect_pools() -> int:
    """Run `Pool.collect` of every pool of the process: how many items they dropped."""
    cdef Py_ssize_t n_dropped = 0
    for reference in tuple(living_pools):
        pool = reference()
        if pool is not None:
            n_dropped += (<Pool>pool).collect()
    return n_dropped


def _on_collection(phase, info):
    if phase == "stop" and info["generation"] == 2:
        collect_pools()
