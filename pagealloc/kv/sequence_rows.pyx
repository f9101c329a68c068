"""SequenceRows: the rows of one sequence, as fast as they can be appended.

Purpose
    The part of `Sequence` that every token passes: lengths, positions, the copy into the window.
    What happens once a page (committing, making private) is in `row_pages`, what happens once a
    conversation in `sequence`.
Structure
    append --> fits? --> pages ready? --> copy --> one token longer        about a microsecond
                              | no              `--> enough for a step? --> cool: pack a few rows
                              v
                   _make_ready: commits, makes private                     once a page or KV block
Invariants
    length_of(layer) <= ready[layer] <= max_tokens
    as many positions as max(length_of(layer))
    rows up to `ready` may be written: their pages are committed and private, and so are those of
    what becomes cold by then
Locking
    The GIL, held from the look at the window to the end of the copy; for copies of NOGIL_BYTES or
    more a view of the window instead.  A ring is written with the GIL only: who reads it has it.
    One writer a sequence.
Units
    Tokens; bytes where named.
"""

cimport cython
cimport numpy as np
from libc.stdint cimport INT64_MAX, int64_t
from libc.stdlib cimport free, malloc

from pagealloc.kv.cold_rows cimport ColdRows
from pagealloc.kv.quant cimport fill_plain, plain_t
from pagealloc.kv.row_copy cimport as_array, row_of, rows_of, rows_t, token_of, write_token
from pagealloc.kv.row_table cimport RowTable, kind_t
from pagealloc.kv.sequence_arrays cimport SequenceArrays
from pagealloc.kv.token_positions cimport TokenPositions
from pagealloc.kv.window_rows cimport slot_of

import numpy

from pagealloc.errors import InvariantError

np.import_array()

cdef enum:
    NOGIL_BYTES = 65536


@cython.auto_pickle(False)
cdef class SequenceRows(SequenceArrays):
    """What `Sequence` inherits; made by it alone."""

    def __cinit__(self, cache, *arguments, for_fork=False, **options):
        cdef RowTable table = cache._table
        self.tokens = TokenPositions()
        self.codecs = cache._codecs
        self._cold = cache._new_cold_rows(for_fork=for_fork)
        self.set_up(table, cache._new_window(for_fork=for_fork), cache._ring_tokens)
        self.cool_at = INT64_MAX if self._cold is None else 0

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
        if is_large:    # the arrays keep their shape, and the windows their place, without the GIL
            _pins = (memoryview(k), memoryview(v), *self._pins())
            rows_of(self.table, k, "k", at, 0, &k_rows)
            rows_of(self.table, v, "v", at, 1, &v_rows)
            if k_rows.n_tokens != end - start or v_rows.n_tokens != end - start:
                raise ValueError("k or v changed its shape while it was appended")
        base = self.base()
        if self._cold is not None:
            self.write_quantised(base, at, start, &k_rows, &v_rows, is_large)
        elif is_large:
            with nogil:
                self.write(base, at, 0, start, &k_rows)
                self.write(base, at, 1, start, &v_rows)
        else:
            self.write(base, at, 0, start, &k_rows)
            self.write(base, at, 1, start, &v_rows)
        self.tokens.add(end, first)
        self.set_length(at, end)

    def _pins(self) -> tuple:
        """Views that keep the windows where they are, but hinder no cut."""
        if self._cold is None:
            return (self._window.view(0, 1, holes="allowed"),)
        return tuple(
            [window.view(0, 1, holes="allowed") for window in (self._window, self._cold._window)]
        )

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
        write_token(
            &self.table.table, self.base(), slot_of(start, self.ring_tokens), &rows, layer_stride
        )
        self.add_token(start, first)

    cdef int add_token(self, int64_t start, int64_t first) except -1:
        """One token more in all layers, whose rows are written; it stands at `first`."""
        self.tokens.add(start + 1, first)
        self.n_even = start + 1
        if self.n_even >= self.cool_at:
            self.cool()
        return 0

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
                self.write(base, i, kv, start, &rows)
        return self.add_token(start, first)

    # --- quantised sequences -------------------------------------------------------------------

    cdef int write_quantised(
        self, char *base, int64_t layer, int64_t start, const rows_t *k, const rows_t *v,
        bint is_large,
    ) except -1:
        """Write new rows of a layer: what is due to be cold packed, the others as they are.

        The ring's oldest rows are packed first: the new ones may lie where they do.
        """
        cdef ColdRows cold = self._cold
        cdef const kind_t *kinds = &self.table.table.kinds[2 * layer]
        cdef char *window = cold.base()
        cdef int64_t n_tokens = k.n_tokens, n_direct, kv
        cdef int64_t due = cold.due(layer, start + n_tokens)
        cdef rows_t[2] parts
        cdef char *scratch
        if n_tokens == 0:       # pages are ready for what new rows have packed, not before
            return 0
        scratch = <char *>malloc(<size_t>max(kinds[0].row_bytes, kinds[1].row_bytes))
        if scratch == NULL:
            raise MemoryError("no memory for a row")
        n_direct = max(0, due - start)
        parts[0], parts[1] = k[0], v[0]
        cold.pack_recent(window, self, base, layer, cold.length_of(layer), min(start, due))
        for kv in range(2):
            parts[kv].n_tokens = n_direct
            if is_large:
                with nogil:
                    cold.pack_given(window, layer, kv, start, &parts[kv], &kinds[kv], scratch)
            else:
                cold.pack_given(window, layer, kv, start, &parts[kv], &kinds[kv], scratch)
        for kv in range(2):
            parts[kv].data += n_direct * parts[kv].token_stride
            parts[kv].n_tokens = n_tokens - n_direct
            self.write(base, layer, kv, start + n_direct, &parts[kv])
        free(scratch)
        cold.set_length(layer, due)
        self.cool_at = 0
        return 0

    cdef int cool(self) except -1:
        """Pack the rows that have become old; all layers are n_even long, the pages are there."""
        cdef ColdRows cold = self._cold
        cdef int64_t layer, n_cold, due, n_layers = self.table.table.n_layers
        cdef int64_t least = INT64_MAX, most = 0
        cdef char *window = cold.base()
        cdef char *base = self.base()
        for layer in range(n_layers):
            n_cold, due = cold.length_of(layer), cold.due(layer, self.n_even)
            if due > n_cold:
                cold.pack_recent(window, self, base, layer, n_cold, due)
            least, most = min(least, due), max(most, due)
        if least == most:
            cold.n_even = least
        else:
            for layer in range(n_layers):
                cold.set_length(layer, cold.due(layer, self.n_even))
        self.cool_at = cold.residual_tokens + (least // cold.step_tokens + 1) * cold.step_tokens
        return 0

    def _look_at_cold(self) -> None:
        """The cold rows were cut: the next token is to look when rows are due."""
        self.cool_at = 0

    def _pack_up_to(self, int64_t n_tokens) -> None:
        """Have the first `n_tokens` of each layer cold; the pages are there."""
        cdef ColdRows cold = self._cold
        cdef int64_t layer
        for layer in range(self.table.table.n_layers):
            cold.pack_recent(
                cold.base(), self, self.base(), layer, cold.length_of(layer), n_tokens
            )
        cold._set_lengths([max(n, n_tokens) for n in cold.layer_lengths])
        self.cool_at = 0

    def _write_rows(self, int64_t layer, int64_t start, k, v) -> None:
        """Write rows of a quantised layer as `append` does; its length is the caller's."""
        cdef rows_t k_rows, v_rows
        rows_of(self.table, k, "k", layer, 0, &k_rows)
        rows_of(self.table, v, "v", layer, 1, &v_rows)
        self.write_quantised(self.base(), layer, start, &k_rows, &v_rows, False)

    def _k_values(self, int64_t layer, int64_t start, int64_t end):
        """K rows of tokens [start, end), shown or not, as float32."""
        cdef plain_t single
        fill_plain(&single, "float32")
        array = numpy.empty((end - start, *self.table.layout.head_shape(layer, 0)), numpy.float32)
        self.fill(
            layer, 0, start, end, end, self.n_cuts, <char *>np.PyArray_DATA(<np.ndarray>array),
            &single,
        )
        return array

    def _put_k(self, int64_t layer, int64_t start, array) -> None:
        """Replace K rows, of the type they come in, from token `start` on; pages are private."""
        cdef rows_t rows, part
        cdef const kind_t *kind = &self.table.table.kinds[2 * layer]
        cdef int64_t n_packed
        array = numpy.ascontiguousarray(array)
        rows_of(self.table, array, "k", layer, 0, &rows)
        n_packed = min(rows.n_tokens, max(0, self.cold_length(layer) - start))
        part = rows
        part.n_tokens = n_packed
        if n_packed:
            self._cold.pack_given(self._cold.base(), layer, 0, start, &part, kind, NULL)
        part.data = rows.data + n_packed * rows.token_stride
        part.n_tokens = rows.n_tokens - n_packed
        self.write(self.base(), layer, 0, start + n_packed, &part)

    def _check_rows(self) -> None:
        self._check_lengths()
        lengths, positions = self.layer_lengths, self.positions
        if len(positions) != max(lengths):
            raise InvariantError(f"{len(positions)} positions for lengths {lengths}")
        if positions.max(initial=-1) != self.tokens.largest:
            raise InvariantError(f"the largest position is not {self.tokens.largest}")
