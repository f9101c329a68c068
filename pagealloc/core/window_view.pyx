"""WindowView: a range of a window's bytes, exported through the buffer protocol.

Purpose
    Keep a window open, and its rows in place, as long as something made from the view lives.
Structure
    numpy array --base--> WindowView --keeps open--> Window --> ExtentStore
    `entry`, inside the object, is in the window's list of live views
Invariants
    window is not None <=> the entry is in the list
Locking
    The store's mutex for the list.
Units
    Bytes; pages where named.
"""

cimport cython
from libc.stdint cimport int64_t, uintptr_t

from pagealloc.core.export cimport fill_buffer
from pagealloc.core.extent_pages cimport (
    STORE_FORKED,
    store_is_frozen,
    store_leave,
    window_t,
)
from pagealloc.core.extents cimport ExtentStore
from pagealloc.core.window_pages cimport window_add_view, window_remove_view

from pagealloc.units import format_bytes


@cython.final
@cython.no_gc
@cython.freelist(64)
cdef class WindowView:
    """Bytes of a window, for the buffer protocol: ``np.frombuffer(view)``, ``memoryview(view)``.

    Made by `Window.view`.  Whatever was made from it keeps it alive, and it keeps the window open.
    Thread-safe.
    """

    def __init__(self):
        raise TypeError("a WindowView is made by Window.view()")

    cdef int attach(
        self, object window, ExtentStore store, window_t *pages, int64_t first_page, int64_t n_pages
    ) noexcept:
        """Enter it into the window's list: 0 or a code.  From then on its death takes it out."""
        cdef int code
        store.lock()
        if self.entry.is_writable and store_is_frozen(store.books):
            code = STORE_FORKED
        else:
            code = window_add_view(pages, &self.entry, first_page, n_pages)
        store_leave(store.books)
        if code == 0:
            self.window = window
            self.store = store
            self.pages = pages
        return code

    def __dealloc__(self):
        if self.window is not None:
            self.store.lock()
            window_remove_view(self.pages, &self.entry)
            store_leave(self.store.books)

    cdef char *memory(self) except NULL:
        if self.window is None:
            raise TypeError("a WindowView is made by Window.view()")
        return self.pages.address + self.entry.offset_bytes

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        fill_buffer(
            buffer, self, self.memory(), self.entry.nbytes, not self.entry.is_writable, flags
        )

    def __releasebuffer__(self, Py_buffer *buffer):
        pass    # the view itself is the export

    @property
    def address(self) -> int:
        """Where it starts in memory."""
        return <uintptr_t>self.memory()

    @property
    def offset(self) -> int:
        """Where it starts in the window."""
        return self.entry.offset_bytes

    @property
    def nbytes(self) -> int:
        """Its length."""
        return self.entry.nbytes

    @property
    def readonly(self) -> bool:
        """False if it may be written."""
        return not self.entry.is_writable

    @property
    def mark(self) -> int:
        """The number given to `Window.view`."""
        return self.entry.mark

    def __len__(self) -> int:
        return self.entry.nbytes

    def __reduce_ex__(self, protocol: int):
        raise TypeError("a WindowView is memory of this process: it cannot be pickled or copied")

    def __repr__(self) -> str:
        kind = "writable" if self.entry.is_writable else "read-only"
        return (
            f"<WindowView of {format_bytes(self.entry.nbytes)} at offset "
            f"{self.entry.offset_bytes}, {kind}, mark {self.entry.mark}>"
        )
