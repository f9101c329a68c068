# cython: annotation_typing=False
"""Window: one contiguous address range over an extent store.

Purpose
    The Python face of `window_pages`: checks arguments, turns codes into exceptions.
Structure
    Window -> window_t (window_pages) -> extents of its ExtentStore -> memfd
    WindowView -> Window -> ExtentStore     each keeps the next alive, so they die in this order
Invariants
    a window with live views stays open, and its address never changes
    a writable view covers private pages only, from its birth to its death
    those of window_pages
Locking
    The store's mutex, which serialises everything that changes a window of the store.  The GIL
    is let go while the kernel works, and never waited for with the mutex held.
Units
    Bytes; pages below.
"""

from typing import NamedTuple

cimport cython
from cpython.number cimport PyNumber_Index
from libc.stdint cimport int64_t, uintptr_t
from libc.stdlib cimport free, malloc

from pagealloc.core.extent_pages cimport (
    extent_at,
    extent_t,
    store_is_frozen,
    store_leave,
    view_t,
    window_t,
)
from pagealloc.core.extents cimport ExtentStore
from pagealloc.core.interval_map cimport imap_next, interval_t
from pagealloc.core.noted cimport blocks_are_noted, note_growth, observed
from pagealloc.core.os_memory cimport os_huge_page_bytes
from pagealloc.core.os_pages cimport os_huge_bytes
from pagealloc.core.remap cimport (
    shift_t,
    window_commit,
    window_make_private,
    window_release,
    window_share,
    window_share_foreign,
    window_shift,
)
from pagealloc.core.window_pages cimport (
    WINDOW_CLOSED,
    WINDOW_HOLE,
    WINDOW_SHARED,
    WINDOW_TAKEN,
    WINDOW_UNMAPPED,
    WINDOW_VIEWED,
    page_use_t,
    window_abandon,
    window_broken_invariant,
    window_close,
    window_is_private,
    window_open,
    window_uses,
)
from pagealloc.core.window_view cimport WindowView

from pagealloc.errors import ClosedError, InvariantError, PageBoundaryError
from pagealloc.units import format_bytes, parse_bytes

cdef int64_t huge_page_bytes = os_huge_page_bytes()


class Run(NamedTuple):
    """A run of committed pages of a window that stand alike.

    `offset` and `file_offset` say where it starts in the window and in the store's file; `is_own`,
    whether that is the window's own part of the file; `n_refs`, how many windows map it (1: it is
    private).
    """

    offset: int
    nbytes: int
    file_offset: int
    is_own: bool
    n_refs: int


@cython.final
@cython.no_gc
cdef class Window:
    """A reserved, contiguous address range whose pages are committed, shared and released.

    Parameters
    ----------
    store : ExtentStore
        Where its pages come from.  Windows of one store can share pages.
    nbytes : int or str
        Length; rounded up to whole huge pages (2 MiB).  Costs address space only.
    is_mapped : bool
        Whether it has addresses.  One that has none costs neither address space nor a mapping: it
        keeps pages that `share_from` gave it, for others to share from it, until it releases them.

    Raises
    ------
    TypeError, ValueError
        `store` is no store, or `nbytes` no size.
    ClosedError, ForkedError
        The store is closed, or belongs to the parent process.
    OutOfMemoryError
        The kernel refused address space, or a longer file.

    Notes
    -----
    Bytes may be touched where they are committed, and written where they are private as well: see
    `commit`, `make_private`, `view`.  A touched hole costs memory nobody counts.

    Methods are thread-safe; what is written through views is the business of whoever writes.  A
    window that was never closed closes when nobody refers to it or to a view of it.

    Whoever gets an `OutOfMemoryError` finds everything as it was.  Only a kernel that refuses to
    map old pages back, right after it refused to map new ones, leaves some of them changed:
    committed, shared or private as was asked, with the right bytes.

    In a child of ``os.fork()`` windows can be read.  Writing through an array made before the fork
    ends the child with SIGSEGV, for it would write into its parent.
    """

    def __cinit__(self, ExtentStore store not None, nbytes: int | str, *, is_mapped: bool = True):
        cdef int64_t length_bytes = parse_bytes(nbytes)
        cdef window_t *pages = NULL
        cdef bint wants_addresses = is_mapped
        cdef int code
        length_bytes = (length_bytes + huge_page_bytes - 1) // huge_page_bytes * huge_page_bytes
        with nogil:
            code = window_open(
                store.books, length_bytes // store.books.page_bytes, wants_addresses, &pages
            )
        store.require(code, "reserving a window", length_bytes)
        self.store = store
        self.pages = pages

    def __dealloc__(self):
        if self.pages != NULL:
            with nogil:
                window_abandon(self.pages)

    def commit(self, offset: int, nbytes: int) -> None:
        """Commit all pages that cover the range; those committed before stay as they are.

        Fresh pages read as zeros.  All or nothing.

        Raises
        ------
        ValueError, PageBoundaryError
            Negative numbers; or the range leaves the window.
        OutOfMemoryError
            The budget or the kernel refused: everything is as it was before.
        ClosedError, ForkedError
        """
        cdef int64_t first_page = 0, n_pages = 0, before_bytes = -1, more_bytes
        cdef int code
        self.find(offset, nbytes, False, &first_page, &n_pages)
        if observed(blocks_are_noted):
            before_bytes = self.committed_bytes
        with nogil:
            code = window_commit(self.pages, first_page, n_pages)
        if code:
            self.require(code, "commit", offset, nbytes)
        if before_bytes >= 0:
            more_bytes = max(self.committed_bytes - before_bytes, 0)
            self.noted_bytes += more_bytes
            note_growth(self, more_bytes, 1)

    def release(self, offset: int, nbytes: int) -> None:
        """Drop this window's committed pages in a range of whole pages.

        What no other window maps goes back to the kernel.  If the kernel refuses to take it, it
        counts as committed until a later `commit`, `release` or ``store.trim()`` succeeds.

        Raises
        ------
        ValueError, PageBoundaryError
            Negative numbers, or not whole pages; or the range leaves the window.
        BufferError
            A live view covers a part of it (unless it was made with ``holes="allowed"``).
        OutOfMemoryError
            The kernel refused to map the own range back over shared pages: all is as before.
        ClosedError, ForkedError
        """
        cdef int64_t first_page = 0, n_pages = 0
        cdef int code
        self.find(offset, nbytes, True, &first_page, &n_pages)
        with nogil:
            code = window_release(self.pages, first_page, n_pages)
        if code:
            self.require(code, "release", offset, nbytes)

    def share_from(self, Window other not None, offset: int, nbytes: int) -> None:
        """Map the committed pages of another window of this store, at the same offset.

        Costs no memory.  Neither window may write these pages until `make_private` has copied
        them.  Where the process has too many mappings already the pages are copied instead.

        Parameters
        ----------
        other : Window
            Whose pages; what is not committed there stays uncommitted here.
        offset, nbytes : int
            A range of whole pages, uncommitted here.

        Raises
        ------
        TypeError, ValueError, PageBoundaryError
            `other` is no other window of the same store; negative numbers, not whole pages, or
            pages committed here; the range leaves one of the windows.
        BufferError
            A live writable view, here or there, covers a part of the range.
        OutOfMemoryError
            The kernel refused, or for copies the budget: all is as before.
        ClosedError, ForkedError
        """
        cdef int64_t first_page = 0, n_pages = 0
        cdef int code
        if other is self or other.store is not self.store:
            raise ValueError(
                "a window shares with other windows of the same extent store, not with "
                f"{'itself' if other is self else 'those of another'}"
            )
        self.find(offset, nbytes, True, &first_page, &n_pages)
        other.find(offset, nbytes, True, &first_page, &n_pages)
        with nogil:
            code = window_share(self.pages, other.pages, first_page, n_pages)
        if code:
            self.require(code, "share_from", offset, nbytes)

    def share_foreign(self, file: int, runs: list[tuple[int, int, int]]) -> None:
        """Map pages of another process's file, which can only be read here.

        As with `share_from`, whoever wants to write calls `make_private` first.

        Parameters
        ----------
        file : int
            Where the store has it, see ``ExtentStore.add_foreign``.
        runs : list of (offset, file_offset, nbytes)
            Where in the window, where in the file, whole pages; ascending in the window, apart,
            and uncommitted here.

        Raises
        ------
        ValueError, PageBoundaryError
            There is no such file; negative numbers, not whole pages, not in order, or committed
            here; a run leaves the window or the file.
        BufferError
            A live writable view covers a part of it.
        OutOfMemoryError
            The kernel refused, or the process has too many mappings: all is as before.
        ClosedError, ForkedError
        """
        cdef int64_t n_runs = len(runs), i, page_bytes = self.pages.store.page_bytes
        cdef int64_t end_page = 0, first_page, file_page
        cdef extent_t *extent
        cdef int code
        cdef shift_t *shifts = <shift_t *>malloc(<size_t>max(n_runs, 1) * sizeof(shift_t))
        if shifts == NULL:
            raise MemoryError("no memory to map another process's pages")
        try:
            first_page = PyNumber_Index(file) // page_bytes
            self.store.lock()
            extent = extent_at(self.pages.store, first_page)
            if extent != NULL and (not extent.is_foreign or extent.first_page != first_page):
                extent = NULL
            store_leave(self.store.books)
            if extent == NULL:
                raise ValueError(f"file={file}: the store has no such file of another process")
            for i, (offset, file_offset, nbytes) in enumerate(runs):
                self.find(offset, nbytes, True, &shifts[i].first_page, &shifts[i].n_pages)
                if shifts[i].first_page < end_page or not shifts[i].n_pages:
                    raise ValueError(f"the run at {offset} is empty, or does not follow the others")
                end_page = shifts[i].first_page + shifts[i].n_pages
                file_page = PyNumber_Index(file_offset) // page_bytes
                if file_offset < 0 or file_offset % page_bytes:
                    raise ValueError(f"file_offset={file_offset} is no page's")
                if file_page + shifts[i].n_pages > extent.n_foreign_pages:
                    raise PageBoundaryError(f"file_offset={file_offset}: the file ends before")
                shifts[i].target_page = file_page
            with nogil:
                code = window_share_foreign(self.pages, extent, shifts, n_runs)
        finally:
            free(shifts)
        if code:
            self.require(code, "share_foreign", runs[0][0], runs[0][2])

    def make_private(self, offset: int, nbytes: int) -> int:
        """Copy the pages covering the range that other windows map, too, and map the copies.

        Call it before anything writes.  Bytes stay equal, so views stay valid; what is
        uncommitted, or mapped by this window alone, is left alone.

        Returns
        -------
        int
            Bytes copied.

        Raises
        ------
        ValueError, PageBoundaryError
            Negative numbers; or the range leaves the window.
        OutOfMemoryError
            The budget or the kernel refused: everything is as it was before.
        ClosedError, ForkedError
        """
        cdef int64_t first_page = 0, n_pages = 0, n_copied_pages = 0
        cdef int code
        self.find(offset, nbytes, False, &first_page, &n_pages)
        with nogil:
            code = window_make_private(self.pages, first_page, n_pages, &n_copied_pages)
        if code:
            self.require(code, "make_private", offset, nbytes)
        return n_copied_pages * self.pages.store.page_bytes

    def move_pages(self, moves: list[tuple[int, int, int]]) -> None:
        """Map committed pages further to the front, in place of what stands there; all or none.

        Bytes are not copied.  Where the pages were, and no others came, nothing is committed.

        Parameters
        ----------
        moves : list of (source, target, nbytes)
            Ranges of whole pages, ``target < source``; different moves meet no common page.

        Raises
        ------
        ValueError, PageBoundaryError
            Negative numbers, not whole pages, or not to the front; a page to move is not committed,
            or a range leaves the window.
        BufferError
            A live view covers a page that would change.
        OutOfMemoryError
            The kernel refused, or the process has too many mappings: all is as before.
        ClosedError, ForkedError
        """
        cdef int64_t n_moves = len(moves), i, n_pages = 0
        cdef int code
        cdef shift_t *shifts = <shift_t *>malloc(<size_t>max(n_moves, 1) * sizeof(shift_t))
        if shifts == NULL:
            raise MemoryError("no memory to move a window's pages")
        try:
            for i, (source, target, nbytes) in enumerate(moves):
                self.find(target, nbytes, True, &shifts[i].target_page, &n_pages)
                self.find(source, nbytes, True, &shifts[i].first_page, &shifts[i].n_pages)
                if target >= source:
                    raise ValueError(f"pages at {source} move to the front, not to {target}")
            with nogil:
                code = window_shift(self.pages, shifts, n_moves)
        finally:
            free(shifts)
        if code:
            self.require(code, "move_pages", moves[0][1], moves[0][2])

    def is_private(self, offset: int, nbytes: int) -> bool:
        """Return True if no other window maps a committed page that covers the range.

        Raises
        ------
        ValueError, PageBoundaryError
            Negative numbers; or the range leaves the window.
        ClosedError
        """
        cdef int64_t first_page = 0, n_pages = 0
        cdef bint is_private
        self.find(offset, nbytes, False, &first_page, &n_pages)
        self.store.lock()
        is_private = window_is_private(self.pages, first_page, n_pages)
        store_leave(self.store.books)
        return is_private

    def view(
        self,
        offset: int,
        nbytes: int,
        *,
        writable: bool = False,
        mark: int = 0,
        holes: str = "refused",
    ) -> WindowView:
        """Export a range of bytes; the window cannot be closed while the view lives.

        Parameters
        ----------
        offset, nbytes : int
            The range; any bytes.
        writable : bool
            Ask for memory that may be written.  Its pages must be private, and stay so: they
            cannot be shared while the view lives.
        mark : int
            Any number, not negative, for `highest_mark`.
        holes : {"refused", "allowed"}
            Whether pages in the range may be uncommitted.  Where it is allowed they must not be
            touched, and `release` does not mind the view.

        Raises
        ------
        ValueError, PageBoundaryError
            Negative numbers; the range leaves the window, or a page in it is uncommitted.
        BufferError
            `writable`, and another window maps a page of the range: call `make_private` first.
        ClosedError, ForkedError
        """
        cdef int64_t first_page = 0, n_pages = 0
        cdef WindowView view = WindowView.__new__(WindowView)
        cdef int code
        offset = PyNumber_Index(offset)
        nbytes = PyNumber_Index(nbytes)
        self.find(offset, nbytes, False, &first_page, &n_pages)
        if holes != "refused" and holes != "allowed":
            raise ValueError(f"holes={holes!r} is neither 'refused' nor 'allowed'")
        if mark < 0:
            raise ValueError(f"mark={mark} must not be negative")
        view.entry.offset_bytes = offset
        view.entry.nbytes = nbytes
        view.entry.mark = PyNumber_Index(mark)
        view.entry.is_writable = writable
        view.entry.may_have_holes = holes == "allowed"
        code = view.attach(self, self.store, self.pages, first_page, n_pages)
        if code:
            self.require(code, "view", offset, nbytes)
        return view

    def highest_mark(self) -> int:
        """Return the largest mark of the live views; -1 if there are none."""
        cdef int64_t highest = -1
        cdef view_t *view
        self.store.lock()
        view = self.pages.views
        while view != NULL:
            highest = max(highest, view.mark)
            view = view.next
        store_leave(self.store.books)
        return highest

    def runs(self) -> list[Run]:
        """Return the runs of committed pages, by offset, for statistics and tests."""
        cdef page_use_t *uses = NULL
        cdef int64_t capacity = 0, n_uses = 16, i
        try:
            while n_uses > capacity:
                capacity = n_uses
                free(uses)
                uses = <page_use_t *>malloc(<size_t>capacity * sizeof(page_use_t))
                if uses == NULL:
                    raise MemoryError("no memory to list a window's runs")
                self.store.lock()
                n_uses = window_uses(self.pages, uses, capacity)
                store_leave(self.store.books)
            return [
                Run(
                    offset=uses[i].first_page * self.pages.store.page_bytes,
                    nbytes=uses[i].n_pages * self.pages.store.page_bytes,
                    file_offset=uses[i].file_offset,
                    is_own=uses[i].is_own,
                    n_refs=uses[i].n_references,
                )
                for i in range(n_uses)
            ]
        finally:
            free(uses)

    def huge_bytes(self) -> int:
        """Return how many of its bytes huge pages map, asked of the kernel (Linux 6.7).

        Counts what was touched through this window since it was mapped.

        Raises
        ------
        ClosedError
        OSError
            The kernel does not say.
        """
        cdef int64_t nbytes
        if self.pages.is_closed:
            self.require(WINDOW_CLOSED, "huge_bytes", 0, 0)
        if self.pages.is_unmapped:
            return 0
        nbytes = os_huge_bytes(self.pages.address, <size_t>self.n_bytes())
        if nbytes < 0:
            raise OSError("the kernel does not say what huge pages map (it takes Linux 6.7)")
        return nbytes

    def close(self) -> None:
        """Unmap the window and drop its pages.  Closing twice is no error.

        Raises
        ------
        BufferError
            Views of it are alive.
        OutOfMemoryError
            The kernel refused: the window is as it was, and open.
        """
        cdef int code = 0
        self.store.lock()   # the GIL is held: who saw the window open with it held is done
        if self.pages.is_closed:
            store_leave(self.store.books)
            return
        if self.pages.n_views:
            code = WINDOW_VIEWED
            store_leave(self.store.books)
        else:
            self.pages.is_closed = True     # before the GIL is let go, and the range unmapped
            with nogil:
                code = window_close(self.pages)
                if code:
                    self.pages.is_closed = False
                store_leave(self.pages.store)
        if code:
            self.require(code, "close", 0, self.nbytes)

    def check(self) -> None:
        """Compare the window's books with its store's.

        Raises
        ------
        InvariantError
            They disagree: a defect of pagealloc.
        """
        cdef const char *broken
        self.store.lock()
        broken = window_broken_invariant(self.pages)
        store_leave(self.store.books)
        if broken != NULL:
            raise InvariantError((<bytes>broken).decode())

    @property
    def address(self) -> int:
        """Where it starts in memory, on a huge page; the same until `close`, then 0.  Or always 0.
        """
        return <uintptr_t>self.pages.address

    @property
    def nbytes(self) -> int:
        """Its length, as rounded up."""
        return self.pages.n_pages * self.pages.store.page_bytes

    @property
    def closed(self) -> bool:
        """True after `close`."""
        return self.pages.is_closed

    @property
    def n_views(self) -> int:
        """Live views."""
        return self.store.read(&self.pages.n_views)

    @property
    def n_mappings(self) -> int:
        """Kernel mappings it costs the process: 1, and about 2 for each shared run."""
        return self.store.read(&self.pages.n_mappings)

    @property
    def committed_bytes(self) -> int:
        """Bytes committed here, own and shared."""
        return self.store.read(&self.pages.n_committed_pages) * self.pages.store.page_bytes

    def __enter__(self) -> Window:
        return self

    def __exit__(self, exc_type: object, *exc_info: object) -> None:
        try:
            self.close()
        except BufferError:
            if exc_type is None:    # else what the block raised matters more
                raise

    def __reduce_ex__(self, protocol: int):
        raise TypeError("a Window is memory of this process: it cannot be pickled or copied")

    def __repr__(self) -> str:
        if self.pages.is_closed:
            return f"<Window of {format_bytes(self.nbytes)}: closed>"
        where = "without addresses" if self.pages.is_unmapped else f"at {self.address:#x}"
        return (
            f"<Window of {format_bytes(self.nbytes)} {where}: "
            f"{format_bytes(self.committed_bytes)} committed, {self.n_mappings} mappings, "
            f"{self.n_views} views>"
        )

    cdef char *memory(self) noexcept:
        """Where it is mapped, NULL once closed; the GIL keeps it so, or a view."""
        return NULL if self.pages.is_closed else self.pages.address

    cdef int64_t n_bytes(self) noexcept:
        return self.pages.n_pages * self.pages.store.page_bytes

    cdef bint is_frozen(self) noexcept:
        """True in a process that inherited it through fork()."""
        return store_is_frozen(self.store.books)

    cdef WindowView view_of(self, int64_t offset_bytes, int64_t nbytes, int64_t mark):
        """A read-only view of committed bytes inside the window; None if they are not."""
        cdef WindowView view = WindowView.__new__(WindowView)
        cdef int64_t first_page = offset_bytes >> self.pages.store.page_shift
        view.entry.offset_bytes = offset_bytes
        view.entry.nbytes = nbytes
        view.entry.mark = mark
        if view.attach(
            self, self.store, self.pages, first_page,
            ((offset_bytes + nbytes - 1) >> self.pages.store.page_shift) + 1 - first_page,
        ):
            return None
        return view

    cdef bint is_one_run(self, int64_t offset_bytes, int64_t nbytes) noexcept:
        """True if one run of pages of the file stands behind all these bytes."""
        cdef int64_t page = offset_bytes >> self.pages.store.page_shift
        cdef int64_t end_page = ((offset_bytes + nbytes - 1) >> self.pages.store.page_shift) + 1
        cdef interval_t run
        cdef bint is_one
        self.store.lock()
        is_one = imap_next(&self.pages.sources, &page, end_page, &run) and page == end_page
        store_leave(self.store.books)
        return is_one

    cdef int find(
        self, object offset, object nbytes, bint is_aligned, int64_t *first_page, int64_t *n_pages
    ) except -1:
        """The pages that cover the range, or the exception it deserves."""
        cdef int64_t page_bytes = self.pages.store.page_bytes
        cdef int64_t start = -1, length = -1, window_bytes = self.pages.n_pages * page_bytes
        if self.pages.is_closed:
            self.require(WINDOW_CLOSED, "window", offset, nbytes)
        try:
            start = PyNumber_Index(offset)
            length = PyNumber_Index(nbytes)
        except OverflowError:   # beyond 64 bits, in one direction or the other
            if offset >= 0 and nbytes >= 0:
                start = length = window_bytes + 1
        if start < 0 or length < 0:
            raise ValueError(f"offset={offset}, nbytes={nbytes}: neither may be negative")
        if start > window_bytes or length > window_bytes - start:
            raise PageBoundaryError(
                f"offset={offset}, nbytes={nbytes}: the window ends at {window_bytes} bytes"
            )
        if is_aligned and (start % page_bytes or length % page_bytes):
            raise ValueError(
                f"offset={offset}, nbytes={nbytes}: both must be multiples of a page "
                f"({page_bytes} bytes)"
            )
        first_page[0] = start // page_bytes
        n_pages[0] = (start + length + page_bytes - 1) // page_bytes - first_page[0]
        if length == 0:
            n_pages[0] = 0
        return 0

    cdef int require(self, int code, str action, object offset, object nbytes) except -1:
        """Raise what `code` means; the GIL is held and the mutex is not."""
        what = f"{action} of {nbytes} bytes at {offset}"
        if code == WINDOW_CLOSED:
            raise ClosedError(f"{action}: the window is closed")
        if code == WINDOW_HOLE:
            raise PageBoundaryError(
                f"{what}: not all of these pages are committed; commit them, or say "
                "holes='allowed' and leave them untouched"
            )
        if code == WINDOW_TAKEN:
            raise ValueError(f"{what}: pages of this range are committed here; release them first")
        if code == WINDOW_SHARED:
            raise BufferError(f"{what}: other windows map these pages; call make_private first")
        if code == WINDOW_UNMAPPED:
            raise ValueError(
                f"{what}: this window has no addresses; share its pages with one that has"
            )
        if code == WINDOW_VIEWED:
            raise BufferError(f"{what}: live views forbid it; let go of the arrays made from them")
        return self.store.require(code, what, 0)
