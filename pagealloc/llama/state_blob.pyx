"""The blobs that llama.cpp makes of a context's state, parsed and written.

Purpose
    Say where each layer's K and V rows lie in a blob, and write a blob around other rows.
Structure
    ::

        blob     header | record | record of the sliding window, if the model has one
        header   magic, sequence                llama_state_seq_get_data_ext
                 length, architecture's name    llama_state_get_data
        record   streams | cells: positions and sequences | K rows by layer | V rows by layer

    V rows come by token, or, where llama.cpp keeps them transposed, by channel.
Invariants
    a byte is read only where the blob has one, and a parsed blob has none left over
    what is parsed can be written again: every cell is of one sequence
Locking
    None: a blob is its caller's.
Units
    Bytes, unless the name says otherwise; little-endian, as llama.cpp on the machines supported.
Source
    ``llama_kv_cache::state_write`` of llama.cpp (src/llama-kv-cache.cpp), as of llama-cpp-python
    0.3.36.
"""

cimport cython
from libc.stdint cimport int32_t, int64_t, uint16_t, uint32_t, uint64_t, uint8_t
from libc.string cimport memcpy

from typing import NamedTuple

import numpy

from pagealloc.errors import LlamaStateError


cdef extern from "transpose.h" nogil:
    void pagealloc_transpose_16(
        uint16_t *target, int64_t target_stride, const uint16_t *source, int64_t source_stride,
        int64_t n_rows, int64_t n_columns
    )
    void pagealloc_transpose_32(
        uint32_t *target, int64_t target_stride, const uint32_t *source, int64_t source_stride,
        int64_t n_rows, int64_t n_columns
    )


cdef enum:
    MAX_STREAMS = 256       # LLAMA_MAX_SEQ
    MAX_LAYERS = 4096
    MAX_NAME_BYTES = 128
    CELL_BYTES = 8          # position, how many sequences; these follow, of 4 bytes each
    CELL_BYTES_OF_ONE = 12

_SEQUENCE_MAGIC = 0xAF143CD8


class LayerType(NamedTuple):
    """What the K or V rows of a layer are; `value_bytes` is 0 where rows come by token."""

    ggml_type: int
    row_bytes: int
    value_bytes: int = 0


class RecordFormat(NamedTuple):
    """What a record of a context looks like, whatever tokens it has."""

    n_streams: int
    stream: int
    is_transposed: bool     # V rows, channel by channel
    k: tuple
    v: tuple


class StateFormat(NamedTuple):
    """What the blobs of a context look like, whatever tokens it has."""

    header: bytes
    records: tuple

    def nbytes(self, counts) -> int:
        """Return the bytes of a blob with so many cells a record."""
        return len(self.header) + sum(
            record_bytes(record, n) for record, n in zip(self.records, counts, strict=True)
        )


class RecordPlace(NamedTuple):
    """Where a record's parts lie in a blob."""

    positions: object       # int32, a cell each
    k: list                 # offset of each layer's first row
    v: list


def record_bytes(record, n_cells):
    """Return the bytes of a record."""
    rows = sum(each.row_bytes for each in (*record.k, *record.v)) * n_cells
    n_kinds = len(record.k) + len(record.v)
    return 4 + 4 * record.n_streams + CELL_BYTES_OF_ONE * n_cells + 8 + 12 * n_kinds + rows


# ---------------------------------------------------------------------------------------------
# Parsing

@cython.auto_pickle(False)
cdef class _Reader:
    """A blob, and how far it was read."""

    cdef const uint8_t[::1] blob
    cdef int64_t at

    def __cinit__(self, const uint8_t[::1] blob not None):
        self.blob = blob

    cdef int64_t skip(self, int64_t nbytes, str what) except -1:
        """Pass some bytes, and return where they begin."""
        cdef int64_t start = self.at
        if nbytes < 0 or nbytes > self.blob.shape[0] - start:
            raise LlamaStateError(
                f"the state ends after {self.blob.shape[0]} bytes, amid {what}, which would take "
                f"{nbytes} from byte {start} on: it is truncated, or of another format"
            )
        self.at = start + nbytes
        return start

    cdef uint32_t u32(self, str what) except? 0xFFFFFFFF:
        cdef uint32_t value
        cdef int64_t start = self.skip(4, what)
        memcpy(&value, &self.blob[start], 4)
        return value

    cdef uint64_t u64(self, str what) except? 0xFFFFFFFF:
        cdef uint64_t value
        cdef int64_t start = self.skip(8, what)
        memcpy(&value, &self.blob[start], 8)
        return value

    cdef uint32_t bounded(self, str what, uint32_t most) except? 0xFFFFFFFF:
        cdef uint32_t value = self.u32(what)
        if value > most:
            raise LlamaStateError(f"{what}: {value}, at most {most} are possible")
        return value


def parse_state(blob, *, any_sequences=False):
    """Return what a blob looks like, and where its parts lie.

    Parameters
    ----------
    blob : buffer
        All of it.
    any_sequences : bool
        Take cells of several sequences or none, and of several streams: then there is a record,
        and a place, for each stream that has some, and `write_state` cannot write it.

    Returns
    -------
    format : StateFormat
    places : list of RecordPlace

    Raises
    ------
    LlamaStateError
        It is truncated, or not of a form that can be taken apart: a recurrent state, cells of
        several sequences or none, an unknown version.
    """
    cdef _Reader reader = _Reader(blob)
    header = read_header(reader)
    records, places, n_records = [], [], 0
    while reader.at < reader.blob.shape[0] and n_records < 2:
        streams = read_record(reader, any_sequences)
        n_records += 1
        records += [record for record, _ in streams]
        places += [place for _, place in streams]
    if reader.at < reader.blob.shape[0]:
        raise LlamaStateError(
            f"{reader.blob.shape[0] - reader.at} bytes are left over behind the state's records"
        )
    if not records:
        raise LlamaStateError("the state holds no record of a KV cache")
    return StateFormat(header, tuple(records)), places


cdef bytes read_header(_Reader reader):
    cdef uint32_t first = reader.u32("the header")
    if first == _SEQUENCE_MAGIC:
        reader.skip(4, "the sequence")
    elif 0 < first <= MAX_NAME_BYTES:
        reader.skip(first, "the architecture's name")
    else:
        raise LlamaStateError(
            f"the state begins with {first:#010x}: neither a sequence's nor a context's"
        )
    return bytes(reader.blob[:reader.at])


cdef list read_record(_Reader reader, bint any_sequences):
    """(RecordFormat, RecordPlace) of each stream that has cells."""
    cdef uint32_t n_streams = reader.bounded("the number of streams", MAX_STREAMS)
    cdef uint32_t n_cells, stream
    cdef bint is_transposed
    found = []
    for stream in range(n_streams):
        n_cells = reader.u32("the number of cells")
        if not n_cells:
            continue
        positions = read_cells(reader, n_cells, any_sequences)
        is_transposed = reader.bounded("whether V is transposed", 1)
        n_layers = reader.bounded("the number of layers", MAX_LAYERS)
        k, k_places = read_rows(reader, n_layers, n_cells, False)
        v, v_places = read_rows(reader, n_layers, n_cells, is_transposed)
        record = RecordFormat(n_streams, stream, is_transposed, k, v)
        found.append((record, RecordPlace(positions, k_places, v_places)))
    if not found:
        raise LlamaStateError("the state holds no tokens")
    if len(found) > 1 and not any_sequences:
        raise LlamaStateError("the state has cells in several streams")
    return found


cdef object read_cells(_Reader reader, uint32_t n_cells, bint any_sequences):
    """Positions of the cells, each of which is of one sequence, or of any."""
    cdef int64_t i, at
    cdef int32_t sequence = 0, first = 0
    cdef uint32_t n_sequences
    reader.at = reader.skip(CELL_BYTES * <int64_t>n_cells, "the cells")
    positions = numpy.empty(n_cells, numpy.int32)
    cdef int32_t[::1] target = positions
    for i in range(n_cells):
        at = reader.skip(CELL_BYTES, "a cell")
        memcpy(&target[i], &reader.blob[at], 4)
        memcpy(&n_sequences, &reader.blob[at + 4], 4)
        at = reader.skip(4 * <int64_t>n_sequences, "a cell's sequences")
        if n_sequences:
            memcpy(&sequence, &reader.blob[at], 4)
        if i == 0:
            first = sequence
        if target[i] < 0 or n_sequences > MAX_STREAMS or (
            not any_sequences and (n_sequences != 1 or sequence != first)
        ):
            raise LlamaStateError(
                f"cell {i} of the state is at position {target[i]}, of {n_sequences} sequences: "
                "one and the same for all is what can be taken apart"
            )
    return positions


cdef tuple read_rows(_Reader reader, int64_t n_layers, int64_t n_cells, bint is_transposed):
    cdef int64_t layer, row_bytes, value_bytes
    types, places = [], []
    for layer in range(n_layers):
        what = f"the rows of layer {layer}"
        ggml_type = reader.bounded("a row's type", 1 << 16)
        value_bytes = 0
        if is_transposed:
            value_bytes = reader.bounded("the bytes of a value", 8)
            row_bytes = value_bytes * <int64_t>reader.bounded("the values of a row", 1 << 24)
        else:
            row_bytes = <int64_t>min(reader.u64("the bytes of a row"), <uint64_t>(1 << 40))
        if row_bytes < 1 or row_bytes > 1 << 28:
            raise LlamaStateError(f"{what} have {row_bytes} bytes each")
        types.append(LayerType(ggml_type, row_bytes, value_bytes))
        places.append(reader.skip(row_bytes * n_cells, what))
    return tuple(types), places


# ---------------------------------------------------------------------------------------------
# Writing

@cython.auto_pickle(False)
cdef class _Writer:
    """A blob to be, and how far it was written."""

    cdef uint8_t[::1] blob
    cdef int64_t at

    def __cinit__(self, uint8_t[::1] blob not None):
        self.blob = blob

    cdef void u32(self, uint32_t value) noexcept:
        memcpy(&self.blob[self.at], &value, 4)
        self.at += 4

    cdef void u64(self, uint64_t value) noexcept:
        memcpy(&self.blob[self.at], &value, 8)
        self.at += 8


def write_state(state_format, blob, positions):
    """Write a blob but for its rows, and return where these belong.

    Parameters
    ----------
    state_format : StateFormat
        What it is to look like.
    blob : writable buffer
        Of ``state_format.nbytes([len(each) for each in positions])`` bytes.
    positions : list of ndarray of int32
        Of the cells of each record, which are of sequence 0; at least one a record.

    Returns
    -------
    list of RecordPlace

    Raises
    ------
    ValueError
        The buffer is of another length.
    """
    cdef _Writer writer = _Writer(blob)
    n_bytes = state_format.nbytes([len(each) for each in positions])
    if writer.blob.shape[0] != n_bytes:
        raise ValueError(f"a buffer of {writer.blob.shape[0]} bytes for a state of {n_bytes}")
    header = state_format.header
    for byte in header:
        writer.blob[writer.at] = byte
        writer.at += 1
    return [
        write_record(writer, record, each)
        for record, each in zip(state_format.records, positions, strict=True)
    ]


cdef object write_record(_Writer writer, object record, object positions):
    cdef const int32_t[::1] cells = positions
    cdef int64_t i, stream
    writer.u32(record.n_streams)
    for stream in range(record.n_streams):
        if stream != record.stream:
            writer.u32(0)
            continue
        writer.u32(<uint32_t>cells.shape[0])
        for i in range(cells.shape[0]):
            writer.u32(<uint32_t>cells[i])
            writer.u32(1)
            writer.u32(0)
        writer.u32(record.is_transposed)
        writer.u32(len(record.k))
        k = write_rows(writer, record.k, cells.shape[0])
        v = write_rows(writer, record.v, cells.shape[0])
    return RecordPlace(positions, k, v)


cdef list write_rows(_Writer writer, tuple types, int64_t n_cells):
    places = []
    for each in types:
        writer.u32(each.ggml_type)
        if each.value_bytes:
            writer.u32(each.value_bytes)
            writer.u32(each.row_bytes // each.value_bytes)
        else:
            writer.u64(each.row_bytes)
        places.append(writer.at)
        writer.at += each.row_bytes * n_cells
    return places


# ---------------------------------------------------------------------------------------------
# Transposed V

def transpose(source, target) -> None:
    """Copy a matrix of 2- or 4-byte values into its transpose.

    Parameters
    ----------
    source, target : ndarray, shapes (M, N) and (N, M)
        Of one unsigned type, uint16 or uint32; values of a row are neighbours.

    Raises
    ------
    ValueError, TypeError
        They are not.
    """
    if source.shape != target.shape[::-1] or source.dtype != target.dtype:
        raise ValueError(f"{target.dtype}{target.shape} is not the transpose of {source.shape}")
    if not source.size:
        return
    if not source.strides[1] == target.strides[1] == source.itemsize:
        raise ValueError("values of a row must be neighbours")
    if source.dtype == numpy.uint16:
        transpose_16(source, target)
    else:
        transpose_32(source, target)


cdef int transpose_16(const uint16_t[:, :] source, uint16_t[:, :] target) except -1:
    with nogil:
        pagealloc_transpose_16(
            &target[0, 0], target.strides[0] // 2, &source[0, 0], source.strides[0] // 2,
            source.shape[0], source.shape[1],
        )
    return 0


cdef int transpose_32(const uint32_t[:, :] source, uint32_t[:, :] target) except -1:
    with nogil:
        pagealloc_transpose_32(
            &target[0, 0], target.strides[0] // 4, &source[0, 0], source.strides[0] // 4,
            source.shape[0], source.shape[1],
        )
    return 0
