"""BatchRows: rows of many sequences copied at once, without the GIL, by several threads.

Purpose
    The inner loops of `KVCache.append_batch` and `gather`.
Structure
    BatchRows pins the windows and keeps, of each sequence, where it is mapped and which tokens are
    meant; `write` and `gather` copy a part of them, so that threads can share the work.
Invariants
    a pinned window stays mapped, and its rows where they are, as long as the BatchRows lives
    parts that run at the same time are of different sequences, and go to different rows
Locking
    None while copying.  The GIL before, and after.
Units
    Tokens; bytes where named.
"""

cimport cython
cimport numpy as np
from libc.stdint cimport int64_t
from libc.stdlib cimport calloc, free

from pagealloc.kv.quant cimport codec_t, fill_plain, plain_t
from pagealloc.kv.row_codecs cimport convert_rows, unpack_rows
from pagealloc.kv.row_copy cimport rows_t, write_token
from pagealloc.kv.row_table cimport RowTable, table_t
from pagealloc.kv.sequence_rows cimport SequenceRows
from pagealloc.kv.window_rows cimport slot_of

np.import_array()

ctypedef struct part_t:
    char *window
    char *cold_window       # gather, of quantised sequences
    int64_t n_tokens        # write: where the token goes; gather: how many there are
    int64_t n_cold          # gather: how many of them are in the cold window
    int64_t row             # gather: where its first row goes


@cython.final
cdef class BatchRows:
    """The windows of some sequences, pinned.

    Parameters
    ----------
    table : RowTable
    sequences : list of SequenceRows
        Open ones, of that layout.
    layer : int
        Of which the lengths are meant.
    """

    cdef RowTable table
    cdef RowTable cold              # gather, of quantised sequences
    cdef list sequences
    cdef list pins
    cdef part_t *parts
    cdef readonly int64_t n_rows    # tokens of the layer, of all sequences

    def __cinit__(self, RowTable table not None, list sequences not None, int64_t layer):
        cdef SequenceRows rows
        cdef int64_t i
        self.table = table
        self.sequences = sequences
        self.pins = []
        self.parts = <part_t *>calloc(<size_t>max(len(sequences), 1), sizeof(part_t))
        if self.parts == NULL:
            raise MemoryError("no memory for a batch")
        for i in range(len(sequences)):
            rows = sequences[i]
            self.pin(rows, layer, &self.parts[i])
            self.parts[i].row = self.n_rows
            self.n_rows += self.parts[i].n_tokens

    def __dealloc__(self):
        free(self.parts)

    cdef int pin(self, SequenceRows rows, int64_t layer, part_t *part) except -1:
        """Mark the rows of a layer: they are neither dropped nor moved until this object goes.

        Once the view is there, whoever cuts the sequence sees it; who did so before is seen here.
        """
        cdef int64_t n_cuts
        while True:
            rows.require_open()
            n_cuts = rows.n_cuts
            part.n_tokens = rows.length_of(layer)
            view = rows._window.view(0, 1, mark=part.n_tokens, holes="allowed")
            if rows.n_cuts == n_cuts:
                break
        self.pins.append(view)
        part.window = rows.base()
        return 0

    def write(self, np.ndarray kv not None, int64_t start, int64_t end) -> None:
        """Copy tokens (S, L, 2, H, D), of sequences [start, end), behind their last ones."""
        cdef rows_t rows
        cdef const table_t *table = &self.table.table
        cdef char *data = <char *>np.PyArray_DATA(kv)
        cdef int64_t sequence_stride = np.PyArray_STRIDE(kv, 0)
        cdef int64_t layer_stride = np.PyArray_STRIDE(kv, 1)
        cdef int64_t ring_tokens = (<SequenceRows>self.sequences[0]).ring_tokens
        cdef int64_t i
        rows.n_tokens = 1
        rows.token_stride = np.PyArray_STRIDE(kv, 2)
        rows.head_stride = np.PyArray_STRIDE(kv, 3)
        rows.item_stride = np.PyArray_STRIDE(kv, 4)
        with nogil:
            for i in range(start, end):
                rows.data = data + i * sequence_stride
                write_token(
                    table, self.parts[i].window,
                    slot_of(self.parts[i].n_tokens, ring_tokens), &rows, layer_stride,
                )

    def finish_write(self, list firsts) -> None:
        """Make every sequence one token longer; `firsts` are the tokens' positions."""
        cdef SequenceRows rows
        cdef int64_t i
        for i in range(len(self.sequences)):
            rows = self.sequences[i]
            rows.add_token(self.parts[i].n_tokens, firsts[i])

    def gather_rings(
        self, int64_t layer, int64_t kv, np.ndarray out not None, str wanted
    ) -> None:
        """Copy the rows that lie in rings, first of all: it takes the GIL, see `sequence_arrays`.

        From then on the others are known, which `gather` copies.
        """
        cdef SequenceRows rows
        cdef plain_t plain
        cdef part_t *part
        cdef int64_t i, row_bytes
        fill_plain(&plain, wanted)
        for i in range(len(self.sequences)):
            rows, part = self.sequences[i], &self.parts[i]
            if rows._cold is None:
                continue
            part.n_cold = min(rows.cold_length(layer), part.n_tokens)   # it may have grown
            part.cold_window = rows._cold.base()
            self.cold = rows._cold.table
            row_bytes = rows.codecs.codecs[2 * layer + kv].n_values * plain.value_bytes
            convert_rows(
                &rows.codecs.codecs[2 * layer + kv], &self.table.table, part.window, 2 * layer + kv,
                part.n_cold, part.n_tokens, rows.ring_tokens,
                <char *>np.PyArray_DATA(out) + (part.row + part.n_cold) * row_bytes, &plain,
            )

    def gather(
        self, int64_t layer, int64_t kv, np.ndarray out not None, str wanted, int64_t start,
        int64_t end,
    ) -> None:
        """Copy the rows of a layer of sequences [start, end) into `out` (sum of T, H, D)."""
        cdef SequenceRows first = self.sequences[0]
        cdef const codec_t *codec = &first.codecs.codecs[2 * layer + kv]
        cdef const table_t *cold = NULL if self.cold is None else &self.cold.table
        cdef char *data = <char *>np.PyArray_DATA(out)
        cdef char *target
        cdef plain_t plain
        cdef part_t *part
        cdef int64_t i
        fill_plain(&plain, wanted)
        with nogil:
            for i in range(start, end):
                part = &self.parts[i]
                target = data + part.row * codec.n_values * plain.value_bytes
                if cold == NULL:
                    convert_rows(
                        codec, &self.table.table, part.window, 2 * layer + kv, 0, part.n_tokens, 0,
                        target, &plain,
                    )
                else:
                    unpack_rows(
                        codec, cold, part.cold_window, 2 * layer + kv, 0, part.n_cold, target,
                        &plain,
                    )

    def __reduce__(self):
        raise TypeError("a BatchRows cannot be pickled or copied")
