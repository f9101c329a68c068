"""SequenceRows: the rows of one sequence, as fast as they can be appended and looked at.

Purpose
    The part of `Sequence` that every token passes: lengths, positions, the copy into the window,
    arrays over it.  What happens once a page (committing, making private) is in `row_pages`, what
    happens once a conversation in `sequence`.
Structure
    append --> fits? --> pages ready? --> copy --> one token longer        about a microsecond
                              | no
                              v
                   _make_ready: row_pages commits, makes private           once a page or KV block
Invariants
    n_even >= 0  <=>  all layers are n_even long (and `lengths` is stale)
    length_of(layer) <= ready[layer] <= max_tokens;  least_ready == min(ready)
    as many positions as max(length_of(layer))
    rows up to `ready` may be written: their pages are committed and private
    an array is an export of the window, marked with the token it reaches to: while it lives the
    window is not closed and no row under it is dropped
Locking
    The GIL, held from the look at the window to the end of the copy; for copies of NOGIL_BYTES or
    more a view of the window instead.  One writer a sequence, many readers: appending goes past
    what an array covers, and a cut changes `n_cuts` before it looks at the arrays, which a reader
    compares after it has made one.
Units
    Tokens; bytes where named.
"""

cimport cython
cimport numpy as np
from cpython.number cimport PyNumber_Index
from libc.stdint cimport INT64_MAX, INT64_MIN, int64_t, uint64_t
from libc.stdlib cimport calloc, free

from pagealloc cimport WindowView
from pagealloc.kv.row_arrays cimport array_over, copied_rows, empty_rows
from pagealloc.kv.row_copy cimport (
    as_array,
    move_rows,
    read_rows,
    row_of,
    rows_of,
    rows_t,
    token_of,
    write_rows,
    write_token,
)
from pagealloc.kv.row_table cimport (
    RowTable,
    access_t,
    check_access,
    kind_t,
    table_t,
)
from pagealloc.kv.token_positions cimport TokenPositions

from pagealloc.errors import ClosedError, ForkedError, InvariantError, PageBoundaryError
from pagealloc.kv import boundary

np.import_array()

cdef extern from * nogil:
    """
    static inline uint64_t pagealloc_load_word(const char *address)
    { return __atomic_load_n((const uint64_t *)address, __ATOMIC_ACQUIRE); }
    static inline void pagealloc_store_word(char *address, uint64_t value)
    { __atomic_store_n((uint64_t *)address, value, __ATOMIC_RELEASE); }
    """
    uint64_t load_word "pagealloc_load_word"(const char *address)
    void store_word "pagealloc_store_word"(char *address, uint64_t value)

cdef enum:
    NOGIL_BYTES = 65536
    WORD_BYTES = 8


cdef int64_t as_token(object number) except? -1:
    """An integer, cut to what may be told apart from any token."""
    number = PyNumber_Index(number)
    try:
        return number
    except OverflowError:
        return INT64_MAX if number > 0 else INT64_MIN


@cython.auto_pickle(False)
cdef class SequenceRows:
    """What `Sequence` inherits; made by it alone."""

    def __cinit__(self, cache, *arguments, for_fork=False, **options):
        cdef RowTable table = cache._table
        self.table = table
        self.tokens = TokenPositions()
        self.lengths = <int64_t *>calloc(<size_t>table.table.n_layers, sizeof(int64_t))
        self.ready = <int64_t *>calloc(<size_t>table.table.n_layers, sizeof(int64_t))
        if self.lengths == NULL or self.ready == NULL:
            raise MemoryError("no memory for a sequence's lengths")
        self._window = cache._new_window(for_fork=for_fork)

    def __dealloc__(self):
        free(self.lengths)
        free(self.ready)

    # --- lengths, kept in step by `sequence` and `row_pages` -----------------------------------

    cdef int64_t length_of(self, int64_t layer) noexcept:
        return self.n_even if self.n_even >= 0 else self.lengths[layer]

    cdef void set_length(self, int64_t layer, int64_t n_tokens) noexcept:
        """One layer's length; all are alike again once the last has caught up."""
        cdef int64_t i, n_layers = self.table.table.n_layers
        if self.n_even >= 0:
            for i in range(n_layers):
                self.lengths[i] = self.n_even
            self.n_even = -1
        self.lengths[layer] = n_tokens
        for i in range(n_layers):
            if self.lengths[i] != n_tokens:
                return
        self.n_even = n_tokens

    def __len__(self) -> int:
        """Tokens that every layer holds."""
        cdef int64_t i, shortest
        if self.n_even >= 0:
            return self.n_even
        shortest = self.lengths[0]
        for i in range(1, self.table.table.n_layers):
            shortest = min(shortest, self.lengths[i])
        return shortest

    @property
    def layer_lengths(self) -> tuple[int, ...]:
        """Tokens that each layer holds."""
        return tuple([self.length_of(i) for i in range(self.table.table.n_layers)])

    @property
    def _ready(self) -> list:
        return [self.ready[i] for i in range(self.table.table.n_layers)]

    @_ready.setter
    def _ready(self, ready):
        cdef int64_t i
        for i in range(self.table.table.n_layers):
            self.ready[i] = ready[i]
        self.least_ready = min(ready)

    def _set_lengths(self, lengths) -> None:
        """Give the layers other lengths, of rows that are there; positions are not changed.

        Counts as a cut: a reader that was about to make an array looks again.
        """
        cdef int64_t i
        self.n_cuts += 1
        self.n_even = -1
        for i in range(self.table.table.n_layers):
            self.lengths[i] = lengths[i]
        self.set_length(0, lengths[0])

    # --- positions -----------------------------------------------------------------------------

    @property
    def positions(self) -> np.ndarray:
        """Position of each token, in the order of storage: a copy, shape (T,), int32."""
        return self.tokens.as_array()

    def _set_positions(self, positions) -> None:
        """Replace all positions; int32."""
        self.tokens.replace(positions)

    def pos_min(self) -> int:
        """Return the smallest position of its tokens, -1 if it has none."""
        return self.tokens.smallest()

    def pos_max(self) -> int:
        """Return the largest position of its tokens, -1 if it has none."""
        return self.tokens.largest

    # --- appending -----------------------------------------------------------------------------

    cdef int require_open(self) except -1:
        if self._is_closed or self._window.memory() == NULL:
            raise ClosedError(
                "the cache evicted this sequence to make room for others"
                if self._was_evicted
                else "the sequence is closed"
            )
        return 0

    def _check_open(self) -> None:
        self.require_open()

    cdef int require_writable(self) except -1:
        self.require_open()
        if self._window.is_frozen():
            raise ForkedError(
                "this process inherited the sequence through os.fork() and may only read it: its "
                "memory is shared with the process that made it; build a new KVCache here"
            )
        return 0

    def _check_writable(self) -> None:
        self.require_writable()

    cdef char *base(self) except NULL:
        """Where the window is mapped; it stays so as long as the GIL is held."""
        cdef char *memory = self._window.memory()
        if memory == NULL or self._is_closed:
            raise ClosedError("the sequence was closed while rows were appended")
        return memory

    def append(self, layer, k, v, *, position=None) -> None:
        """Add rows to one layer.

        Parameters
        ----------
        layer : int
            Which layer; each has its own length until all have had the same rows.
        k, v : ndarray, shape (T, H, D)
            Rows of the layout's types (``uint16`` for bfloat16), with any strides.  Nothing is
            converted silently.
        position : int, optional
            Position of the first token, and the others follow; behind the largest so far by
            default.  Layers must agree on the positions of a token.

        Raises
        ------
        TypeError, ValueError
            The arrays do not fit the layout, or the positions those of other layers.
        PageBoundaryError
            There is no such layer, or the window has no room for the rows.
        OutOfMemoryError
            The budget or the kernel refused the pages; the sequence is as it was.
        ForkedError
            This process inherited the sequence through ``os.fork()``.
        """
        cdef rows_t k_rows, v_rows
        cdef int64_t at, start, end, first
        cdef int64_t token_bytes
        cdef char *base
        cdef bint is_large
        self.require_writable()
        at = self.layer_index(layer)
        k, v = as_array(k), as_array(v)
        rows_of(self.table, k, "k", at, 0, &k_rows)
        rows_of(self.table, v, "v", at, 1, &v_rows)
        if k_rows.n_tokens != v_rows.n_tokens:
            raise ValueError(
                f"k holds {k_rows.n_tokens} tokens and v {v_rows.n_tokens}: every token has both"
            )
        start = self.length_of(at)
        end = start + k_rows.n_tokens
        first = self.tokens.first_of(start, end, position)
        if end > self.ready[at]:
            self._make_ready([at], end)
        token_bytes = (
            self.table.table.kinds[2 * at].row_bytes + self.table.table.kinds[2 * at + 1].row_bytes
        )
        is_large = k_rows.n_tokens * token_bytes >= NOGIL_BYTES
        if is_large:    # the arrays keep their shape, and the window its place, without the GIL
            _pins = (memoryview(k), memoryview(v), self._window.view(0, 1, holes="allowed"))
            rows_of(self.table, k, "k", at, 0, &k_rows)
            rows_of(self.table, v, "v", at, 1, &v_rows)
            if k_rows.n_tokens != end - start or v_rows.n_tokens != end - start:
                raise ValueError("k or v changed its shape while it was appended")
        base = self.base()
        if is_large:
            with nogil:
                write_rows(&self.table.table, base, at, 0, start, &k_rows)
                write_rows(&self.table.table, base, at, 1, start, &v_rows)
        else:
            write_rows(&self.table.table, base, at, 0, start, &k_rows)
            write_rows(&self.table.table, base, at, 1, start, &v_rows)
        self.tokens.add(end, first)
        self.set_length(at, end)

    def append_token(self, kv, *, position=None) -> None:
        """Add one token to all layers, or to none.

        Parameters
        ----------
        kv : ndarray, shape (L, 2, H, D), or sequence of (k, v)
            K and V of the token by layer.  Where rows differ in shape or type between layers, or
            between K and V, a sequence of one pair of arrays (H, D) a layer.
        position : int, optional
            Its position; behind the largest so far by default.

        Raises
        ------
        ValueError
            The layers differ in length, besides the errors of `append`.
        """
        cdef rows_t rows
        cdef int64_t layer_stride = 0, start, first
        self.require_writable()
        if not self.table.is_uniform:
            self.append_pairs(kv, position)
            return
        kv = as_array(kv)
        token_of(self.table, kv, &rows, &layer_stride)
        start = self.n_even
        if start < 0:
            self._equal_length("append a token")
        first = self.tokens.first_of(start, start + 1, position)
        if start >= self.least_ready:
            self.make_token_ready(start)
        write_token(&self.table.table, self.base(), start, &rows, layer_stride)
        self.tokens.add(start + 1, first)
        self.n_even = start + 1

    cdef int make_token_ready(self, int64_t start) except -1:
        cdef int64_t i
        short = [i for i in range(self.table.table.n_layers) if self.ready[i] <= start]
        self._make_ready(short, start + 1)
        return 0

    def _token_position(self, position) -> int:
        """The position of one more token of all layers, for which there is room from then on."""
        if self.n_even < 0:
            self._equal_length("append a token")
        return self.tokens.first_of(self.n_even, self.n_even + 1, position)

    def _make_token_ready(self, keep) -> None:
        """Pages for one more token; `keep` are the sequences that must not be evicted for it."""
        if self.n_even >= self.least_ready:
            short = [i for i in range(self.table.table.n_layers) if self.ready[i] <= self.n_even]
            self._make_ready(short, self.n_even + 1, keep)

    cdef int append_pairs(self, object pairs, object position) except -1:
        """A token whose rows are not of one shape and type."""
        cdef rows_t rows
        cdef int64_t i, kv, start, first
        cdef char *base
        pairs = [tuple([as_array(part) for part in parts]) for parts in pairs]
        if len(pairs) != self.table.table.n_layers or any([len(pair) != 2 for pair in pairs]):
            raise ValueError(
                f"a token of this layout is {self.table.table.n_layers} pairs (k, v) of arrays"
            )
        for i, pair in enumerate(pairs):
            for kv in range(2):
                row_of(self.table, pair[kv], f"{'kv'[kv]} of layer {i}", i, kv, &rows)
        start = self.n_even
        if start < 0:
            self._equal_length("append a token")
        first = self.tokens.first_of(start, start + 1, position)
        if start >= self.least_ready:
            self.make_token_ready(start)
        base = self.base()
        for i, pair in enumerate(pairs):
            for kv in range(2):
                row_of(self.table, pair[kv], f"{'kv'[kv]} of layer {i}", i, kv, &rows)
                write_rows(&self.table.table, base, i, kv, start, &rows)
        self.tokens.add(start + 1, first)
        self.n_even = start + 1
        return 0

    # --- reading -------------------------------------------------------------------------------

    cdef int64_t layer_index(self, object layer) except -1:
        cdef int64_t index = -1
        try:
            index = PyNumber_Index(layer)
        except (TypeError, OverflowError):
            pass
        if not 0 <= index < self.table.table.n_layers:
            boundary.check_layer(self.table.layout, layer)
        return index

    def k(self, layer, start=0, end=None, *, on_cross="view") -> np.ndarray:
        """Return the K rows of a layer, read-only.

        Parameters
        ----------
        layer : int
            Which layer.
        start, end : int
            Tokens ``[start, end)``; to the layer's last row by default.
        on_cross : {"view", "copy", "raise"}
            What an access gets whose rows cross into a page of another run: the sequence's own
            pages, and those of each sequence it shares some of, are runs of their own.  "view": an
            array over the window, where they are neighbours all the same; "copy": a copy of the
            rows; "raise": a `PageBoundaryError`.  In block order rows of several KV blocks have no
            one token axis, and can be copied only; see `k_blocks`.

        Returns
        -------
        ndarray, shape (T, H, D)
            Without a copy, unless one was asked for: as long as it lives, the sequence cannot be
            closed, nor truncated below its rows.

        Raises
        ------
        PageBoundaryError
            The layer or the tokens lie outside the committed rows; or they cross, see `on_cross`.
        ValueError
            The rows lie in several KV blocks, or `on_cross` is none of the three.
        """
        return self.rows_array(layer, 0, start, end, on_cross)

    def v(self, layer, start=0, end=None, *, on_cross="view") -> np.ndarray:
        """Return the V rows of a layer, read-only; as `k`."""
        return self.rows_array(layer, 1, start, end, on_cross)

    cdef object rows_array(
        self, object layer, int64_t kv, object start, object end, str on_cross
    ):
        cdef const table_t *table = &self.table.table
        cdef access_t access
        cdef WindowView view
        cdef int64_t at, first, last, n_tokens, n_cuts
        cdef bint is_view
        if on_cross != "view" and on_cross != "copy" and on_cross != "raise":
            raise ValueError(f"on_cross={on_cross!r}: 'view', 'copy' and 'raise' are possible")
        at = self.layer_index(layer)
        while True:
            self.require_open()
            n_cuts = self.n_cuts
            n_tokens = self.length_of(at)
            first = as_token(start)
            last = n_tokens if end is None else as_token(end)
            if first == last and 0 <= first <= n_tokens:
                return empty_rows(self.table, at, kv)
            if check_access(table, at, first, last, kv, n_tokens, &access):
                boundary.check_rows(
                    self.table.layout, at, PyNumber_Index(start),
                    n_tokens if end is None else PyNumber_Index(end), n_tokens,
                )
            is_view = table.block_tokens == 0 or (
                first // table.block_tokens == (last - 1) // table.block_tokens
            )
            if not is_view and on_cross != "copy":
                raise ValueError(
                    f"{'kv'[kv]}() has one token axis, which rows of several KV blocks have not: "
                    f"use {'kv'[kv]}_blocks(layer), on_cross='copy', or a layout with "
                    "order='interleaved'"
                )
            if on_cross != "view" and is_view:
                is_view = self._window.is_one_run(access.offset, access.end - access.offset)
                if not is_view and on_cross == "raise":
                    raise PageBoundaryError(
                        f"layer {at}, tokens {first} to {last - 1} at offset {access.offset} (page "
                        f"{access.first_page}) cross into pages of another run, up to page "
                        f"{access.last_page}, end {access.end}; on_cross='copy' would copy them"
                    )
            view = self._window.view_of(access.offset, access.end - access.offset, last)
            if view is None:        # the pages went while we looked
                continue
            if is_view:
                array = array_over(self.table, view, at, kv, last - first)
            else:
                array = copied_rows(self.table, self.base(), at, kv, first, last)
            if self.n_cuts == n_cuts:
                return array
            del array, view

    # --- copies, for what happens once a conversation -------------------------------------------

    @property
    def _n_cuts(self) -> int:
        return self.n_cuts

    def _copy_of_rows(self, int64_t layer, int64_t kv, int64_t start, int64_t end):
        """Copy tokens [start, end) of a layer, which are committed: (T, H, D)."""
        cdef const kind_t *kind = &self.table.table.kinds[2 * layer + kv]
        cdef np.npy_intp[3] shape
        cdef np.ndarray array
        shape[0], shape[1], shape[2] = end - start, kind.n_heads, kind.head_dim
        array = np.PyArray_EMPTY(3, shape, self.table.type_numbers[kv], 0)
        read_rows(
            &self.table.table, self.base(), layer, kv, start, end, <char *>np.PyArray_DATA(array)
        )
        return array

    def _copies_of_rows(self, start: int, end: int) -> list:
        """Copy tokens [start, end) of all layers: (K, V) of each."""
        return [
            (self._copy_of_rows(i, 0, start, end), self._copy_of_rows(i, 1, start, end))
            for i in range(self.table.table.n_layers)
        ]

    def _restore(self, int64_t layer, int64_t kv, int64_t start, array) -> None:
        """Write rows (T, H, D) to tokens from `start` on, whose pages are private."""
        cdef rows_t rows
        rows_of(self.table, array, "rows", layer, kv, &rows)
        write_rows(&self.table.table, self.base(), layer, kv, start, &rows)

    def _restore_rows(self, int64_t start, copies) -> None:
        """Write what `_copies_of_rows` returned to tokens from `start` on."""
        for layer, pair in enumerate(copies):
            self._restore(layer, 0, start, pair[0])
            self._restore(layer, 1, start, pair[1])

    def _move_rows(self, int64_t start, int64_t end, int64_t target) -> None:
        """Move tokens [start, end) of all layers towards the start, to private pages."""
        move_rows(&self.table.table, self.base(), start, end, target)

    def _check_rows(self) -> None:
        lengths, ready = self.layer_lengths, self._ready
        if (self.n_even >= 0) != (min(lengths) == max(lengths)):
            raise InvariantError(f"n_even is {self.n_even}, the lengths are {lengths}")
        if self.least_ready != min(ready):
            raise InvariantError(f"least_ready is {self.least_ready}, not that of {ready}")
        positions = self.positions
        if len(positions) != max(lengths):
            raise InvariantError(f"{len(positions)} positions for lengths {lengths}")
        if positions.max(initial=-1) != self.tokens.largest:
            raise InvariantError(f"the largest position is not {self.tokens.largest}")

    # --- single words --------------------------------------------------------------------------

    cdef int64_t committed_word(self, object offset) except -1:
        """The offset of an 8-byte word that lies in one committed page."""
        cdef int64_t at
        try:
            at = PyNumber_Index(offset)
        except OverflowError:
            at = -1
        if at < 0 or at > self._window.n_bytes() - WORD_BYTES or at % WORD_BYTES:
            raise PageBoundaryError(
                f"offset={offset}: a word of {WORD_BYTES} bytes can be read and written at once "
                f"only inside a page, so its offset must be a multiple of {WORD_BYTES}, from 0 to "
                f"{self._window.n_bytes() - WORD_BYTES}"
            )
        return at

    def read_word(self, offset) -> int:
        """Read 8 bytes of the window at once, atomically, whatever another thread writes.

        Parameters
        ----------
        offset : int
            From the window's start, see `KVLayout.offset`; a multiple of 8.

        Returns
        -------
        int
            Unsigned, in the machine's byte order.

        Raises
        ------
        PageBoundaryError
            The offset is no multiple of 8, or outside the committed pages.
        """
        cdef int64_t at
        self.require_open()
        at = self.committed_word(offset)
        view = self._window.view_of(at, WORD_BYTES, 0)
        if view is None:
            raise PageBoundaryError(f"offset={offset}: its page is not committed")
        return load_word(self._window.memory() + at)

    def write_word(self, offset, value) -> None:
        """Write 8 bytes of the window at once, atomically; its page is made private first.

        Raises
        ------
        OverflowError
            `value` does not fit into 64 unsigned bits.
        PageBoundaryError
            The offset is no multiple of 8, or outside the committed pages.
        OutOfMemoryError, ForkedError
            As `append`.
        """
        cdef uint64_t word = value
        cdef int64_t at
        self.require_writable()
        at = self.committed_word(offset)
        view = self._window.view_of(at, WORD_BYTES, 0)
        if view is None:
            raise PageBoundaryError(f"offset={offset}: its page is not committed")
        self._window.make_private(at, WORD_BYTES)
        store_word(self.base() + at, word)
