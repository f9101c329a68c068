"""SequenceArrays: the rows of a sequence as arrays, in a quarter of a microsecond.

Purpose
    Reading: arrays over the window without a copy, copies, converted copies, single words.
Structure
    k(), v() --> as stored, no copy     rows_array: a view of the window, checked against its pages
             --> another type           converted: the cold rows unpacked, the others converted
Invariants
    an array is an export of the window, marked with the token it reaches to: while it lives the
    window is not closed and no row under it is dropped
Locking
    The GIL, but for copying: then a view of the window keeps rows where they are.  Many readers,
    beside one writer: appending goes past what a view covers, and a cut changes `n_cuts` before it
    looks at the views, which a reader compares once it has made one, and before it reads: making
    one may let go of the GIL.
Units
    Tokens; bytes where named.
"""

cimport cython
cimport numpy as np
from cpython.number cimport PyNumber_Index
from libc.stdint cimport INT64_MAX, INT64_MIN, int64_t, uint64_t

from pagealloc cimport WindowView
from pagealloc.kv.quant cimport codec_t, fill_plain, plain_t
from pagealloc.kv.row_arrays cimport array_over, empty_rows, new_rows
from pagealloc.kv.row_codecs cimport convert_rows, unpack_rows
from pagealloc.kv.row_table cimport access_t, check_access, kind_t, table_t
from pagealloc.kv.window_rows cimport WindowRows

from pagealloc.errors import ClosedError, ForkedError, PageBoundaryError
from pagealloc.kv import boundary, conversions
from pagealloc.kv.row_formats import FORMATS as _FORMATS

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
    WORD_BYTES = 8


cdef int64_t as_token(object number) except? -1:
    """An integer, cut to what may be told apart from any token."""
    number = PyNumber_Index(number)
    try:
        return number
    except OverflowError:
        return INT64_MAX if number > 0 else INT64_MIN


@cython.auto_pickle(False)
cdef class SequenceArrays(WindowRows):
    """What `SequenceRows` inherits."""

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
        if self._is_closed:
            raise ClosedError("the sequence was closed meanwhile")
        return WindowRows.base(self)

    def _set_lengths(self, lengths) -> None:
        """As `WindowRows`, and a cut: a reader that was about to make an array looks again."""
        self.n_cuts += 1
        WindowRows._set_lengths(self, lengths)

    @property
    def _n_cuts(self) -> int:
        return self.n_cuts

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

    def k(
        self, layer, start=0, end=None, *, on_cross="view", dtype=None, out=None
    ) -> np.ndarray:
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
        dtype : NumPy dtype, optional
            float32 or float16: rows of this type, converted from what is stored.  By default as
            they were given; of a quantised sequence float32.
        out : ndarray, shape (T, H, D), optional
            Where to put the rows, converted to its type; contiguous.

        Returns
        -------
        ndarray, shape (T, H, D)
            Without a copy, unless one was asked for: as long as it lives, the sequence cannot be
            closed, nor truncated below its rows.  With `dtype` or `out`, and of a quantised
            sequence, always a copy, whatever `on_cross` says.

        Raises
        ------
        PageBoundaryError
            The layer or the tokens lie outside the committed rows; or they cross, see `on_cross`.
        TypeError, ValueError
            The rows lie in several KV blocks, or `on_cross` is none of the three; rows cannot be
            converted to `dtype`, or `out` does not fit.
        """
        if self._cold is None and dtype is None and out is None:
            return self.rows_array(layer, 0, start, end, on_cross)
        return self.converted(layer, 0, start, end, dtype, out)

    def v(
        self, layer, start=0, end=None, *, on_cross="view", dtype=None, out=None
    ) -> np.ndarray:
        """Return the V rows of a layer, read-only; as `k`."""
        if self._cold is None and dtype is None and out is None:
            return self.rows_array(layer, 1, start, end, on_cross)
        return self.converted(layer, 1, start, end, dtype, out)

    cdef object rows_array(
        self, object layer, int64_t kv, object start, object end, str on_cross
    ):
        cdef const table_t *table = &self.table.table
        cdef access_t access
        cdef WindowView view
        cdef int64_t at, first, last, n_tokens, n_cuts
        cdef bint is_view
        cdef np.ndarray array
        cdef const kind_t *kind
        cdef const char *base
        cdef char *target
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
            if view is None or self.n_cuts != n_cuts:   # the pages, or rows, went while we looked
                view = None
                continue
            if is_view:
                array = array_over(self.table, view, at, kv, last - first)
            else:
                kind = &table.kinds[2 * at + kv]
                array = new_rows(
                    last - first, kind.n_heads, kind.head_dim, kind.row_bytes,
                    self.table.type_numbers[kv],
                )
                base, target = self.base(), <char *>np.PyArray_DATA(array)
                with nogil:
                    self.read(base, at, kv, first, last, target)
            if self.n_cuts == n_cuts:
                return array
            del array, view

    cdef object converted(
        self, object layer, int64_t kv, object start, object end, object dtype, object out
    ):
        """Rows of another type than they are stored in: a copy."""
        cdef plain_t wanted
        cdef np.ndarray array
        cdef int64_t at, first, last, n_tokens, n_cuts
        at = self.layer_index(layer)
        layout = self.table.layout
        name = conversions.wanted_type(
            layout.formats[kv].name, dtype, out, is_packed=self._cold is not None
        )
        fill_plain(&wanted, name)
        n_heads, head_dim = layout.head_shape(at, kv)
        while True:
            self.require_open()
            n_cuts, n_tokens = self.n_cuts, self.length_of(at)
            first = as_token(start)
            last = n_tokens if end is None else as_token(end)
            if not 0 <= first <= last <= n_tokens:
                boundary.check_rows(
                    layout if self._cold is None else self._cold.table.layout, at,
                    PyNumber_Index(start), n_tokens if end is None else PyNumber_Index(end),
                    n_tokens,
                )
            if out is not None:
                conversions.check_out(out, (last - first, n_heads, head_dim))
                array = out
            else:
                array = new_rows(
                    last - first, n_heads, head_dim, n_heads * head_dim * wanted.value_bytes,
                    _FORMATS[name].dtype.num,
                )
            if self.fill(
                at, kv, first, last, n_tokens, n_cuts, <char *>np.PyArray_DATA(array), &wanted
            ):
                if self.n_cuts == n_cuts:
                    return array

    cdef bint fill(
        self, int64_t layer, int64_t kv, int64_t first, int64_t last, int64_t n_tokens,
        int64_t n_cuts, char *target, const plain_t *wanted
    ) except -1:
        """Convert tokens [first, last) of a layer; False: pages or rows went, look again.

        A ring is read with the GIL, which whoever overwrites its oldest rows holds.
        """
        cdef const codec_t *codec = &self.codecs.codecs[2 * layer + kv]
        cdef int64_t n_cold = self.cold_length(layer)
        cdef int64_t split = min(max(first, n_cold), last)
        cdef int64_t kind = 2 * layer + kv
        cdef char *recent = target + (split - first) * codec.n_values * wanted.value_bytes
        cdef const table_t *table
        cdef const char *window = self.base()
        cdef WindowView view
        cdef access_t access
        if self.ring_tokens:
            convert_rows(
                codec, &self.table.table, window, kind, split, last, self.ring_tokens, recent,
                wanted,
            )
        elif split < last:
            table = &self.table.table
            check_access(table, layer, split, last, kv, n_tokens, &access)
            view = self._window.view_of(access.offset, access.end - access.offset, last)
            if view is None or self.n_cuts != n_cuts:
                return False
            with nogil:
                convert_rows(codec, table, window, kind, split, last, 0, recent, wanted)
        if first < split:
            table = &self._cold.table.table
            check_access(table, layer, first, split, kv, n_cold, &access)
            view = self._cold._window.view_of(access.offset, access.end - access.offset, split)
            if view is None or self.n_cuts != n_cuts:
                return False
            window = self._cold.base()
            with nogil:
                unpack_rows(codec, table, window, kind, first, split, target, wanted)
        return True

    cdef int64_t cold_length(self, int64_t layer) noexcept:
        """How many tokens of a layer are stored otherwise than they came."""
        return 0 if self._cold is None else self._cold.length_of(layer)

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
