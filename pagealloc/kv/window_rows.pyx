"""WindowRows: how many rows of each layer lie in a window, and copying them in and out.

Purpose
    What the rows of a sequence and its quantised ones have in common.
Structure
    Token t of a layer lies at row t of the window, or of a ring at row ``t % ring_tokens``.
    ``ready`` is kept by `row_pages` and `quantised_pages`: up to which token rows can be written.
Invariants
    n_even >= 0  <=>  all layers are n_even long (and `lengths` is stale)
    least_ready == min(ready)
Locking
    The GIL; one writer.
Units
    Tokens; bytes where named.
"""

cimport cython
cimport numpy as np
from libc.stdint cimport int64_t
from libc.stdlib cimport calloc, free

from pagealloc cimport Window
from pagealloc.kv.row_copy cimport move_rows, read_rows, rows_of, rows_t, write_rows
from pagealloc.kv.row_table cimport RowTable, kind_t

from pagealloc.errors import ClosedError, InvariantError

np.import_array()


@cython.auto_pickle(False)
cdef class WindowRows:
    """The rows of one window; what `Sequence` and `ColdRows` inherit."""

    cdef int set_up(self, RowTable table, Window window, int64_t ring_tokens) except -1:
        self.table = table
        self.ring_tokens = ring_tokens
        self.lengths = <int64_t *>calloc(<size_t>table.table.n_layers, sizeof(int64_t))
        self.ready = <int64_t *>calloc(<size_t>table.table.n_layers, sizeof(int64_t))
        if self.lengths == NULL or self.ready == NULL:
            raise MemoryError("no memory for a sequence's lengths")
        self._window = window
        return 0

    def __dealloc__(self):
        free(self.lengths)
        free(self.ready)

    # --- lengths -------------------------------------------------------------------------------

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
        """Give the layers other lengths, of rows that are there."""
        cdef int64_t i
        self.n_even = -1
        for i in range(self.table.table.n_layers):
            self.lengths[i] = lengths[i]
        self.set_length(0, lengths[0])

    def _check_lengths(self) -> None:
        lengths, ready = self.layer_lengths, self._ready
        if (self.n_even >= 0) != (min(lengths) == max(lengths)):
            raise InvariantError(f"n_even is {self.n_even}, the lengths are {lengths}")
        if self.least_ready != min(ready):
            raise InvariantError(f"least_ready is {self.least_ready}, not that of {ready}")

    # --- copies --------------------------------------------------------------------------------

    cdef char *base(self) except NULL:
        """Where the window is mapped; it stays so as long as the GIL is held."""
        cdef char *memory = self._window.memory()
        if memory == NULL:
            raise ClosedError("the sequence was closed meanwhile")
        return memory

    cdef void write(
        self, char *window, int64_t layer, int64_t kv, int64_t start, const rows_t *rows
    ) noexcept nogil:
        """Copy rows to tokens from `start` on, whose pages are private."""
        cdef rows_t part = rows[0]
        cdef int64_t token = start, end = start + rows.n_tokens
        while token < end:
            part.n_tokens = piece_end(token, end, self.ring_tokens) - token
            write_rows(
                &self.table.table, window, layer, kv, slot_of(token, self.ring_tokens), &part
            )
            part.data += part.n_tokens * part.token_stride
            token += part.n_tokens

    cdef void read(
        self, const char *window, int64_t layer, int64_t kv, int64_t start, int64_t end,
        char *target
    ) noexcept nogil:
        """Copy tokens [start, end), which are committed, to contiguous memory."""
        cdef int64_t slot, n_tokens, token = start
        cdef int64_t row_bytes = self.table.table.kinds[2 * layer + kv].row_bytes
        while token < end:
            slot = slot_of(token, self.ring_tokens)
            n_tokens = piece_end(token, end, self.ring_tokens) - token
            read_rows(&self.table.table, window, layer, kv, slot, slot + n_tokens, target)
            target += n_tokens * row_bytes
            token += n_tokens

    def _copy_of_rows(self, int64_t layer, int64_t kv, int64_t start, int64_t end):
        """Copy tokens [start, end) of a layer, which are committed: (T, H, D)."""
        cdef const kind_t *kind = &self.table.table.kinds[2 * layer + kv]
        cdef np.npy_intp[3] shape
        cdef np.ndarray array
        shape[0], shape[1], shape[2] = end - start, kind.n_heads, kind.head_dim
        array = np.PyArray_EMPTY(3, shape, self.table.type_numbers[kv], 0)
        self.read(self.base(), layer, kv, start, end, <char *>np.PyArray_DATA(array))
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
        self.write(self.base(), layer, kv, start, &rows)

    def _restore_rows(self, int64_t start, copies) -> None:
        """Write what `_copies_of_rows` returned to tokens from `start` on."""
        for layer, pair in enumerate(copies):
            self._restore(layer, 0, start, pair[0])
            self._restore(layer, 1, start, pair[1])

    def _move_rows(self, int64_t start, int64_t end, int64_t target) -> None:
        """Move tokens [start, end) of all layers towards the start, to private pages; no ring."""
        move_rows(&self.table.table, self.base(), start, end, target)
