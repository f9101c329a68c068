# cython: annotation_typing=False
"""ExtentStore: one memfd, the page source of windows.

Purpose
    The Python face of `extent_pages`: opens and closes a store, shows its numbers, turns codes
    into exceptions.
Structure
    ExtentStore -> store_t (extent_pages) -> memfd
Invariants
    those of extent_pages and store_registry
Locking
    The store's mutex.  Nobody who holds it waits for the GIL (os.fork() waits for the mutex with
    the GIL held), and nobody who holds it makes Python objects: that may start a collection.
Units
    Bytes; pages in store_t.
"""

import errno as _errno
import os
from typing import NamedTuple

cimport cython
from cpython.number cimport PyNumber_Index
from libc.stdint cimport INT64_MAX, int64_t
from libc.stdlib cimport calloc, free

from pagealloc.core.extent_pages cimport (
    STORE_CLOSED,
    STORE_FORKED,
    STORE_OVER_BUDGET,
    extent_foreign,
    extent_t,
    store_broken_invariant,
    store_close_file,
    store_enter,
    store_leave,
    store_retry_punches,
    store_t,
    store_try_enter,
    store_wait,
)
from pagealloc.core.mutex cimport mutex_destroy, mutex_init
from pagealloc.core.os_file cimport os_file_create, os_file_held_bytes
from pagealloc.core.os_memory cimport (
    os_fork_generation,
    os_huge_page_bytes,
    os_max_mappings,
    os_page_bytes,
)
from pagealloc.core.store_registry cimport registry_add, registry_remove
from pagealloc.core.window_pages cimport windows_close_abandoned, windows_forget_abandoned

from pagealloc.core.folios import FOLIO_BYTES as _FOLIO_BYTES
from pagealloc.core.folios import why_no_folios
from pagealloc.errors import (
    BackingUnavailableError,
    ClosedError,
    ForkedError,
    InvariantError,
    OutOfMemoryError,
)
from pagealloc.units import format_bytes, parse_bytes

cdef enum:
    MAX_NAME_BYTES = 200    # the kernel takes 249


# What the kernel says when memory, of one kind or another, has run out.
cdef tuple OUT_OF_MEMORY = (
    _errno.ENOMEM, _errno.ENOSPC, _errno.EAGAIN, _errno.EFAULT, _errno.EDQUOT, _errno.EFBIG,
)


class ExtentStats(NamedTuple):
    """The numbers of an `ExtentStore` at one moment; see its attributes of the same names."""

    page_bytes: int
    budget_bytes: int | None
    committed_bytes: int
    held_bytes: int
    shared_bytes: int
    stale_bytes: int
    n_mappings: int
    n_windows: int


@cython.final
@cython.no_gc
cdef class ExtentStore:
    """One memfd, the page source of `Window` objects that may share its pages.

    Parameters
    ----------
    budget_bytes : int or str, optional
        Most bytes that may be committed at a time, such as ``"2GiB"``; hard.  None: no limit but
        the machine's.
    name : str
        Shown by the kernel in ``/proc/self/maps`` as ``/memfd:NAME``.
    max_mappings : int, optional
        While the process's windows cost more mappings than this, sharing copies instead of
        mapping.  Half of ``vm.max_map_count`` by default.
    backing : {"auto", "base", "folios", "hugetlb"}
        "auto": pages of the machine's size, of which the kernel is asked to make a huge page
        wherever a whole one is committed; what it refuses stays as it is.  "base": never.
        "folios": pages of 64 KiB, which the kernel is asked to have in one piece, where it offers
        that for a memfd.  "hugetlb": huge pages from the machine's pool (``vm.nr_hugepages``),
        which are the store's pages then: commits, budget and sharing go by them.

    Raises
    ------
    TypeError, ValueError
        A budget that is no size, or a name the kernel would refuse.
    OutOfMemoryError
        The kernel refused a file.
    BackingUnavailableError
        The kernel has no huge pages to make a file of, or offers no folios.

    Notes
    -----
    Thread-safe.  A store belongs to one owner: nothing zeroes pages on their way between windows
    except the kernel, which hands out zeros when a page is committed.  After ``os.fork()`` the
    child can read windows and look at numbers; whatever would change something raises
    `ForkedError` there.
    """

    def __cinit__(
        self,
        *,
        budget_bytes: int | str | None = None,
        name: str = "pagealloc",
        max_mappings: int | None = None,
        backing: str = "auto",
    ):
        cdef store_t *store
        cdef bytes name_bytes
        cdef int error
        if not isinstance(name, str):
            raise TypeError(f"name must be a string, not {type(name).__name__}")
        name_bytes = name.encode()
        if b"\0" in name_bytes or len(name_bytes) > MAX_NAME_BYTES:
            raise ValueError(
                f"name={name!r} is no file name: at most {MAX_NAME_BYTES} bytes, none of them zero"
            )
        if backing not in ("auto", "base", "folios", "hugetlb"):
            raise ValueError(
                f"backing={backing!r}: 'auto', 'base', 'folios' and 'hugetlb' are possible"
            )
        if backing == "folios" and (reason := why_no_folios()):
            raise BackingUnavailableError(_errno.ENOTSUP, f"backing='folios': {reason}")
        if budget_bytes is not None:
            budget_bytes = parse_bytes(budget_bytes, name="budget_bytes", minimum=0)
        if max_mappings is None:
            max_mappings = os_max_mappings() // 2
        elif PyNumber_Index(max_mappings) < 0:
            raise ValueError(f"max_mappings={max_mappings} must not be negative")
        self.name = name
        store = <store_t *>calloc(1, sizeof(store_t))
        if store == NULL:
            raise MemoryError("no memory for an extent store's books")
        store.page_bytes = os_page_bytes()
        if backing == "hugetlb":
            store.page_bytes = os_huge_page_bytes()
        elif backing == "folios":
            store.page_bytes = max(store.page_bytes, <int64_t>_FOLIO_BYTES)
            store.wants_folios = True
        store.pages_per_huge = <int64_t>os_huge_page_bytes() // store.page_bytes
        store.is_hugetlb = backing == "hugetlb"
        store.wants_huge_pages = backing == "auto" or backing == "folios"
        while <int64_t>1 << store.page_shift < store.page_bytes:
            store.page_shift += 1
        store.budget_pages = INT64_MAX if budget_bytes is None else budget_bytes // store.page_bytes
        store.max_mappings = max_mappings
        store.fork_generation = os_fork_generation()
        error = os_file_create(name_bytes, store.is_hugetlb, &store.fd)
        if error:
            free(store)
            if backing == "hugetlb" and error not in OUT_OF_MEMORY:
                raise BackingUnavailableError(
                    error,
                    f"backing='hugetlb': the kernel makes no file of huge pages "
                    f"({os.strerror(error)})",
                )
            self.require(error, "creating an extent store", 0)
        mutex_init(&store.mutex)
        registry_add(store)
        self.books = store

    def __dealloc__(self):
        cdef store_t *store = self.books
        if store == NULL:
            return
        with nogil:
            # Every open window would have kept the store alive.
            windows_forget_abandoned(store)
            registry_remove(store)
            if not store.is_closed:
                store_close_file(store)
            mutex_destroy(&store.mutex)
            free(store)

    def close(self) -> None:
        """Close the file, which gives all its pages back.  Closing twice is no error.

        Raises
        ------
        BufferError
            Windows are still open; close them first.
        OutOfMemoryError
            The kernel refused to unmap what an earlier window left; try again.
        """
        cdef int64_t n_open
        cdef bint is_left = False
        with nogil:
            store_wait(self.books)
            n_open = self.books.n_windows - self.books.n_abandoned
            if n_open == 0 and not self.books.is_closed:
                windows_close_abandoned(self.books)
                is_left = self.books.n_abandoned > 0
                if not is_left:
                    store_close_file(self.books)
            store_leave(self.books)
        if n_open:
            raise BufferError(f"the extent store has {n_open} open windows: close them first")
        if is_left:
            self.require(_errno.ENOMEM, "unmapping a window that nobody refers to", 0)

    def add_foreign(self, fd: int, nbytes: int) -> int:
        """Take another process's file, for windows to map pages of it, see `Window.share_foreign`.

        Its pages cost this store no budget, are never written, and never punched.  The descriptor
        is duplicated, and that closed with the store.

        Parameters
        ----------
        fd : int
            Open for reading.
        nbytes : int
            How long the file is, whole pages.

        Returns
        -------
        int
            Where the store has it.

        Raises
        ------
        ValueError, OSError
            It is no whole pages; the descriptor is none.
        OutOfMemoryError, ClosedError, ForkedError
        """
        cdef int64_t n_bytes = PyNumber_Index(nbytes), page_bytes = self.books.page_bytes
        cdef extent_t *extent = NULL
        cdef int code, own_fd
        if n_bytes <= 0 or n_bytes % page_bytes:
            raise ValueError(f"nbytes={nbytes}: whole pages of {page_bytes} bytes are possible")
        own_fd = os.dup(fd)
        with nogil:
            code = store_enter(self.books)
            if code == 0:
                code = extent_foreign(self.books, own_fd, n_bytes // page_bytes, &extent)
                store_leave(self.books)
        if code:
            os.close(own_fd)
        self.require(code, "adding a file", 0)
        return extent.first_page * page_bytes

    def keep_pages(self) -> None:
        """From now on give no page back to the kernel: other processes read them on.

        For a process that is about to end.
        """
        self.lock()
        self.books.keeps_pages = True
        store_leave(self.books)

    def trim(self) -> int:
        """Try again to give back what the kernel refused to take; return how many bytes it took.

        Raises
        ------
        ClosedError, ForkedError
            The store is closed, or belongs to the parent process.
        """
        cdef int64_t n_pages = 0
        cdef int code
        with nogil:
            code = store_enter(self.books)
            if code == 0:
                n_pages = self.books.n_committed_pages
                windows_close_abandoned(self.books)
                store_retry_punches(self.books)
                n_pages -= self.books.n_committed_pages
                store_leave(self.books)
        self.require(code, "trim", 0)
        return n_pages * self.books.page_bytes

    def stats(self) -> ExtentStats:
        """Return all numbers, taken at one moment.

        Raises
        ------
        ClosedError
            The store is closed.
        OSError
            The kernel refused to say what the file holds.
        """
        cdef store_t copy
        cdef int64_t held_bytes = 0
        self.lock()
        copy = self.books[0]
        if not copy.is_closed:
            held_bytes = os_file_held_bytes(copy.fd)
        store_leave(self.books)
        if copy.is_closed:
            self.require(STORE_CLOSED, "stats", 0)
        if held_bytes < 0:
            raise OSError("the kernel refused to say what the extent store's file holds")
        return ExtentStats(
            page_bytes=copy.page_bytes,
            budget_bytes=self.budget_bytes,
            committed_bytes=copy.n_committed_pages * copy.page_bytes,
            held_bytes=held_bytes,
            shared_bytes=(
                copy.n_references - (copy.n_committed_pages - copy.n_stale_pages)
            ) * copy.page_bytes,
            stale_bytes=copy.n_stale_pages * copy.page_bytes,
            n_mappings=copy.n_mappings,
            n_windows=copy.n_windows - copy.n_abandoned,
        )

    def check(self) -> None:
        """Compare the books with each other and with the kernel's.

        Raises
        ------
        InvariantError
            They disagree: a defect of pagealloc.
        """
        cdef const char *broken = NULL
        self.lock()
        if not self.books.is_closed:
            broken = store_broken_invariant(self.books, os_file_held_bytes(self.books.fd))
        store_leave(self.books)
        if broken != NULL:
            raise InvariantError((<bytes>broken).decode())

    @property
    def page_bytes(self) -> int:
        """Bytes of a page: the machine's, or a huge page."""
        return self.books.page_bytes

    @property
    def fd(self) -> int:
        """The file descriptor; -1 once closed.  Whoever writes through it breaks the books."""
        return self.books.fd

    @property
    def closed(self) -> bool:
        """True after `close`."""
        cdef bint is_closed
        self.lock()         # another thread may be closing it, without the GIL
        is_closed = self.books.is_closed
        store_leave(self.books)
        return is_closed

    @property
    def budget_bytes(self) -> int | None:
        """Most bytes that may be committed, in whole pages; None if there is no limit."""
        if self.books.budget_pages == INT64_MAX:
            return None
        return self.books.budget_pages * self.books.page_bytes

    @property
    def committed_bytes(self) -> int:
        """Bytes committed by the store's own books, a shared page once; 0 once closed."""
        return self.read(&self.books.n_committed_pages) * self.books.page_bytes

    @property
    def held_bytes(self) -> int:
        """Physical bytes of the file, asked of the kernel (about 1 us); 0 once closed."""
        return 0 if self.closed else self.stats().held_bytes

    @property
    def shared_bytes(self) -> int:
        """What sharing saves: the sum over all pages of (windows that map it - 1) pages."""
        return 0 if self.closed else self.stats().shared_bytes

    @property
    def stale_bytes(self) -> int:
        """Bytes nobody uses that the kernel so far refused to take back; see `trim`."""
        return self.read(&self.books.n_stale_pages) * self.books.page_bytes

    @property
    def n_mappings(self) -> int:
        """Kernel mappings that this store's windows cost the process, of vm.max_map_count."""
        return self.read(&self.books.n_mappings)

    @property
    def n_windows(self) -> int:
        """Open windows."""
        return self.read(&self.books.n_windows) - self.read(&self.books.n_abandoned)

    def __enter__(self) -> ExtentStore:
        return self

    def __exit__(self, exc_type: object, *exc_info: object) -> None:
        try:
            self.close()
        except BufferError:
            if exc_type is None:    # else what the block raised matters more
                raise

    def __reduce_ex__(self, protocol: int):
        raise TypeError("an ExtentStore is memory of this process: it cannot be pickled or copied")

    def __repr__(self) -> str:
        if self.closed:
            return f"<ExtentStore {self.name!r}: closed>"
        budget = self.budget_bytes
        limit = "" if budget is None else f" of {format_bytes(budget)}"
        return (
            f"<ExtentStore {self.name!r}: {format_bytes(self.committed_bytes)}{limit} committed, "
            f"{format_bytes(self.shared_bytes)} saved by sharing, {self.n_windows} windows, "
            f"{self.n_mappings} mappings>"
        )

    cdef void lock(self) noexcept:
        """Take the mutex with the GIL held; the GIL is let go while that means waiting.

        Never waits for the GIL with the mutex held: os.fork() waits the other way round.
        """
        while not store_try_enter(self.books):
            with nogil:
                store_wait(self.books)
                store_leave(self.books)

    cdef int64_t read(self, const int64_t *count) noexcept:
        """A count of the books, read under the mutex that guards it."""
        cdef int64_t value
        self.lock()
        value = count[0]
        store_leave(self.books)
        return value

    cdef int require(self, int code, str action, int64_t asked_bytes) except -1:
        """Raise what `code` means; the GIL is held and the mutex is not."""
        if code == 0:
            return 0
        if code == STORE_CLOSED:
            raise ClosedError(f"{action}: the extent store is closed")
        if code == STORE_FORKED:
            raise ForkedError(
                f"{action}: this process inherited the extent store through fork() and may only "
                "read it; make a store of its own here"
            )
        asked = f" of {format_bytes(asked_bytes)}" if asked_bytes else ""
        if code == STORE_OVER_BUDGET:
            raise OutOfMemoryError(
                f"{action}{asked}: the budget of {format_bytes(self.budget_bytes)} has "
                f"{format_bytes(self.committed_bytes)} committed; close windows, share prefixes, "
                "or raise budget_bytes"
            )
        reason = f"{action}{asked}: the kernel refused ({os.strerror(code)})"
        if code not in OUT_OF_MEMORY:
            raise OSError(code, reason)
        if self.books == NULL:
            raise OutOfMemoryError(reason)
        raise OutOfMemoryError(
            f"{reason}; {format_bytes(self.committed_bytes)} are committed here in "
            f"{self.n_mappings} mappings; close windows, or raise what is short: "
            + (
                "the machine's pool of huge pages (vm.nr_hugepages), "
                if self.books.is_hugetlb
                else "memory, "
            )
            + "the cgroup's limit, ulimit -v, or vm.max_map_count"
        )
