"""KVRows: where the rows of a context's tokens lie in its KV buffer.

Purpose
    llama.cpp says nowhere which cell a token has.  A state has the rows, in the order of cells: so
    they are looked for in the buffer, and nothing is assumed that was not seen there.
Structure
    ::

        buffer   k of layer 0 | v of layer 0 | k of layer 1 | ...   each of all cells, C of them,
                 of one stream behind the other
        k, v     C rows; v without flash attention: a run of C values for each channel
Locking
    None: nothing may evaluate meanwhile.
Units
    Bytes and cells.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import llama_cpp
import numpy as np

from pagealloc import LlamaStateError, default_allocator, page_size_bytes
from pagealloc.llama.state_blob import parse_state
from pagealloc.llama.state_rows import PLAIN_TYPES

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    from pagealloc.llama.kv_buffer import KVBuffer
    from pagealloc.llama.state_blob import LayerType, RecordFormat, RecordPlace

__all__ = ["KVRows", "Tensor", "find_rows"]

LOOK_BYTES = 64 << 10
"""Of a layer's rows that are looked at together, if any of their pages is there."""


class Tensor(NamedTuple):
    """K or V of a layer in the buffer."""

    start: int
    nbytes: int
    kind: LayerType


class KVRows:
    """The rows of a context; made by `find_rows`."""

    def __init__(
        self,
        buffer: KVBuffer,
        streams: list[tuple[RecordFormat, RecordPlace]],
        blob: memoryview,
        n_cells: int,
        n_heads: int,
    ) -> None:
        self.buffer = buffer
        self.record = streams[0][0]
        self.n_cells = n_cells
        self._n_heads = n_heads
        self.tensors = list(self._lay_out())
        self.used = np.zeros((self.record.n_streams, n_cells), np.bool_)
        for record, place in streams:
            self._find(record, place, blob)

    @property
    def n_streams(self) -> int:
        """How many streams the cells lie in."""
        return self.record.n_streams

    def _lay_out(self) -> Iterator[Tensor]:
        start = 0
        for kinds in zip(self.record.k, self.record.v, strict=True):
            for kind in kinds:
                nbytes = kind.row_bytes * self.n_cells * self.n_streams
                yield Tensor(start, nbytes, kind)
                start += nbytes
        if start != self.buffer.nbytes:
            raise LlamaStateError(
                f"the KV buffer has {self.buffer.nbytes} bytes, and its rows would take {start}: "
                "they lie otherwise than this version knows"
            )

    def _find(self, record: RecordFormat, place: RecordPlace, blob: memoryview) -> None:
        """Mark the cells of a stream that hold rows of a state."""
        kind, n_tokens = record.k[0], len(place.positions)
        rows = bytes(blob[place.k[0] : place.k[0] + n_tokens * kind.row_bytes])
        wanted = {rows[i : i + kind.row_bytes] for i in range(0, len(rows), kind.row_bytes)}
        found = set()
        for cell, row in self._rows_present(record.stream, kind.row_bytes):
            if row in wanted:  # also one that is free by now, and held the same: it stays
                self.used[record.stream, cell] = True
                found.add(row)
        if len(found) < len(wanted):
            raise LlamaStateError(
                f"{len(wanted) - len(found)} of {n_tokens} tokens' rows are not in the KV buffer: "
                "they lie otherwise than this version knows"
            )

    def _rows_present(self, stream: int, row_bytes: int) -> Iterator[tuple[int, bytes]]:
        """Yield the K rows of layer 0 that pages are behind, without bringing in others."""
        view, page = memoryview(self.buffer), page_size_bytes()
        first = stream * self.n_cells * row_bytes
        step = max(1, LOOK_BYTES // row_bytes)
        for cell in range(0, self.n_cells, step):
            start = first + cell * row_bytes
            end = first + min(self.n_cells, cell + step) * row_bytes
            pages = (start // page * page, -(-end // page) * page)
            if not self.buffer.resident_bytes(pages[0], pages[1] - pages[0]):
                continue
            some = bytes(view[start:end])
            for i in range(0, len(some), row_bytes):
                yield cell + i // row_bytes, some[i : i + row_bytes]

    # --- arrays -------------------------------------------------------------------------------

    def array(self, layer: int, kv: Literal["k", "v"]) -> npt.NDArray[Any]:
        """Return the rows of a layer; see `KVMemory.k`."""
        if not 0 <= layer < len(self.record.k):
            raise ValueError(f"layer={layer}: the context keeps K and V of {len(self.record.k)}")
        tensor = self.tensors[2 * layer + (kv == "v")]
        all_cells = self.n_cells * self.n_streams
        name, value_bytes = PLAIN_TYPES.get(tensor.kind.ggml_type, ("", 0))
        flat = np.frombuffer(memoryview(self.buffer), np.uint8)[
            tensor.start : tensor.start + tensor.nbytes
        ]
        if not name:
            return flat.reshape(all_cells, -1)
        values: npt.NDArray[Any] = flat.view(np.uint16 if name == "bfloat16" else name)
        n_values = tensor.kind.row_bytes // value_bytes
        if tensor.kind.value_bytes:
            by_channel = values.reshape(self.n_streams, n_values, self.n_cells)
            rows = by_channel.swapaxes(1, 2)
            if self.n_streams > 1:
                raise ValueError("transposed V of several streams has no one axis of cells")
            return _by_head(rows[0], self._n_heads)
        return _by_head(values.reshape(all_cells, n_values), self._n_heads)

    # --- pages --------------------------------------------------------------------------------

    def purge_unused(self) -> None:
        """Give back the pages of cells that no token has."""
        for tensor in self.tensors:
            for start, end in self._unused(tensor):
                page = page_size_bytes()
                first, last = -(-start // page) * page, end // page * page
                if first < last:
                    self.buffer.purge(first, last - first)

    def _unused(self, tensor: Tensor) -> Iterator[tuple[int, int]]:
        """Yield the ranges of a tensor where no token's row lies."""
        stream_bytes = tensor.nbytes // self.n_streams
        for stream in range(self.n_streams):
            base = tensor.start + stream * stream_bytes
            for first, end in _runs(~self.used[stream]):
                if not tensor.kind.value_bytes:
                    row_bytes = tensor.kind.row_bytes
                    yield base + first * row_bytes, base + end * row_bytes
                    continue
                value_bytes = tensor.kind.value_bytes
                for channel in range(tensor.kind.row_bytes // value_bytes):
                    run = base + channel * self.n_cells * value_bytes
                    yield run + first * value_bytes, run + end * value_bytes


def find_rows(context: int, buffer: KVBuffer) -> KVRows | None:
    """Return where the rows of a context's tokens lie; None if it has none.

    Raises
    ------
    LlamaStateError
        They do not lie as this version knows: a sliding window's buffers, or another llama.cpp.
    OutOfMemoryError
        There is no memory for a copy of the state.
    """
    memory = llama_cpp.llama_get_memory(context)
    n_seq = llama_cpp.llama_n_seq_max(context)
    if all(llama_cpp.llama_memory_seq_pos_max(memory, seq) < 0 for seq in range(n_seq)):
        return None
    n_bytes = llama_cpp.llama_state_get_size(context)
    blob = memoryview(default_allocator().alloc(n_bytes))
    array = (llama_cpp.llama_cpp.ctypes.c_uint8 * n_bytes).from_buffer(blob)
    n_taken = llama_cpp.llama_state_get_data(context, array, n_bytes)
    state_format, places = parse_state(blob[:n_taken], any_sequences=True)
    streams = list(zip(state_format.records, places, strict=True))
    record = streams[0][0]
    if any(other.k != record.k or other.v != record.v for other, _ in streams):
        raise LlamaStateError("a sliding window's rows lie in a buffer of their own")
    model = llama_cpp.llama_get_model(context)
    n_cells = llama_cpp.llama_n_ctx(context) // record.n_streams
    n_heads = llama_cpp.llama_model_n_head_kv(model)
    return KVRows(buffer, streams, blob, n_cells, n_heads)


def _by_head(rows: npt.NDArray[Any], n_heads: int) -> npt.NDArray[Any]:
    """Return rows (C, values) as (C, H, D), whatever their strides."""
    n_values = rows.shape[1]
    dim = n_values if n_values % n_heads else n_values // n_heads
    return np.lib.stride_tricks.as_strided(
        rows,
        (len(rows), n_values // dim, dim),
        (rows.strides[0], dim * rows.strides[1], rows.strides[1]),
        writeable=False,
    )


def _runs(mask: npt.NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """Yield the ranges in which a mask is true."""
    edges = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0, append=0))
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)
