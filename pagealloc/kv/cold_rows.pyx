"""ColdRows: the rows of a sequence that are stored as the cache was asked to, mostly quantised.

Purpose
    The older part of a quantised sequence; the newest rows stay as they came, in a ring.
Structure
    Of a layer of n tokens the first n_cold are cold::

        token    0 ............................. n_cold .................. n
        stored   | cold window, packed           | ring, as given          |
        an append: n_cold = max(n_cold, (n - residual_tokens) rounded down to step_tokens)
        what removes rows: n_cold less the cold ones among them

    The length of a layer here is its n_cold.
Invariants
    n_cold depends on the lengths the layer had and on what was removed, not on how its rows came
    n - n_cold < residual_tokens + step_tokens, the ring's length
    a packed row is packed once, from the row that was given
Locking
    As `window_rows`; packed rows do not change, so that they are read without the GIL.
Units
    Tokens; bytes where named.
"""

cimport cython
from libc.stdint cimport int64_t
from libc.stdlib cimport calloc, free

from pagealloc.kv.quant cimport codec_t, error_t, measure_row, pack_row
from pagealloc.kv.row_codecs cimport RowCodecs
from pagealloc.kv.row_copy cimport copy_scattered_row, is_contiguous, rows_t
from pagealloc.kv.row_table cimport RowTable, kind_t, row_place
from pagealloc.kv.window_rows cimport WindowRows, slot_of

import numpy

cdef enum:
    SAMPLE_TOKENS = 64      # of one row in so many the error is measured


@cython.auto_pickle(False)
cdef class ColdRows(WindowRows):
    """The cold rows of one sequence.

    Parameters
    ----------
    table : RowTable
        Of the layout as stored.
    window : Window
        Where they lie.
    codecs : RowCodecs
        How they are packed.
    residual_tokens, step_tokens : int
        How many of the newest tokens are not cold, and how many become so at a time.
    """

    def __cinit__(
        self, RowTable table not None, window, RowCodecs codecs not None, int64_t residual_tokens,
        int64_t step_tokens,
    ):
        self.set_up(table, window, 0)
        self.codecs = codecs
        self.residual_tokens = residual_tokens
        self.step_tokens = step_tokens
        self.errors = <error_t *>calloc(<size_t>(2 * table.table.n_layers), sizeof(error_t))
        if self.errors == NULL:
            raise MemoryError("no memory for a sequence's error statistics")

    def __dealloc__(self):
        free(self.errors)

    cdef int64_t due(self, int64_t layer, int64_t n_tokens) noexcept nogil:
        """How many tokens of a layer are cold once it was appended to, up to `n_tokens`."""
        cdef int64_t n_old = max(0, n_tokens - self.residual_tokens)
        cdef int64_t n_cold = self.n_even if self.n_even >= 0 else self.lengths[layer]
        return max(n_cold, n_old - n_old % self.step_tokens)

    def _due(self, int64_t layer, int64_t n_tokens) -> int:
        return self.due(layer, n_tokens)

    # --- packing -------------------------------------------------------------------------------

    cdef void pack(
        self, char *window, int64_t layer, int64_t kv, int64_t token, const char *row
    ) noexcept nogil:
        cdef const codec_t *codec = &self.codecs.codecs[2 * layer + kv]
        cdef char *target = window + row_place(
            &self.table.table, &self.table.table.kinds[2 * layer + kv], token
        )
        pack_row(codec, row, target)
        if token % SAMPLE_TOKENS == 0 and codec.pack != NULL:
            measure_row(codec, row, target, &self.errors[2 * layer + kv])

    cdef void pack_recent(
        self, char *window, WindowRows recent, const char *ring, int64_t layer, int64_t start,
        int64_t end
    ) noexcept nogil:
        """Pack tokens [start, end) of a layer, which lie in the ring."""
        cdef const kind_t *kind
        cdef int64_t kv, token
        for kv in range(2):
            kind = &recent.table.table.kinds[2 * layer + kv]
            for token in range(start, end):
                self.pack(
                    window, layer, kv, token,
                    ring + row_place(
                        &recent.table.table, kind, slot_of(token, recent.ring_tokens)
                    ),
                )

    cdef void pack_given(
        self, char *window, int64_t layer, int64_t kv, int64_t start, const rows_t *rows,
        const kind_t *kind, char *scratch
    ) noexcept nogil:
        """Pack rows of an array to tokens from `start` on; `scratch` has room for one."""
        cdef bint in_one_piece = is_contiguous(kind, rows)
        cdef const char *row = rows.data
        cdef int64_t i
        for i in range(rows.n_tokens):
            if in_one_piece:
                self.pack(window, layer, kv, start + i, row)
            else:
                copy_scattered_row(scratch, row, kind, rows)
                self.pack(window, layer, kv, start + i, scratch)
            row += rows.token_stride

    # --- what packing costs --------------------------------------------------------------------

    def _errors(self) -> numpy.ndarray:
        """Of what was packed so far: (L, 2, 4), the fields of error_t, float64."""
        cdef int64_t i
        errors = numpy.zeros((self.table.table.n_layers, 2, 4))
        for i in range(2 * self.table.table.n_layers):
            errors[i // 2, i % 2] = (
                self.errors[i].n_values, self.errors[i].squared_error, self.errors[i].squared,
                self.errors[i].largest_error,
            )
        return errors
