"""ModelStates: the cached prompts of one model, as rows in KV blocks.

Purpose
    Rows out of a blob into the KV cache, and out of the KV cache into a blob.
Structure
    ::

        blob                         KVCache, in block order            blob
        K of layer 0, 1, 2 ...  -->  16 tokens: K and V of layer 0, -->  K of layer 0, 1, 2 ...
        V of layer 0, 1, 2 ...       of layer 1, ...                    V of layer 0, 1, 2 ...

    A prompt's whole blocks are published, and are found by whatever prompt begins alike; what it
    shares with others behind them, `Branches` know.
Locking
    None of its own: each call makes a sequence of its own, and the KV cache serialises these.
Units
    Tokens, and bytes.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pagealloc import OutOfMemoryError, default_allocator
from pagealloc.kv import KVLayout
from pagealloc.llama.branches import Branches
from pagealloc.llama.state_blob import RecordPlace, StateFormat, transpose, write_state
from pagealloc.llama.state_rows import RowKind, one_place, one_record, rows_by_token

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy.typing as npt

    from pagealloc.kv import KVCache, Sequence

__all__ = ["ModelStates", "StoredAs", "Taken", "new_blob"]

BLOCK_TOKENS = 16
ROW_ALIGN = 4
PARALLEL_BYTES = 4 << 20
"""A blob from here on is filled by two threads: beside copying, starting one counts for nothing."""


class StoredAs(NamedTuple):
    """As what rows are stored: the arguments of `KVCache`."""

    k_type: str | None
    v_type: str | None
    rotate: str | None

    def options(self, *, k_is_plain: bool, v_is_plain: bool) -> dict[str, Any]:
        """Return the arguments for rows of a context, whose packed rows stay as they are."""
        k_type = self.k_type if k_is_plain else None
        v_type = self.v_type if v_is_plain else None
        if k_type is None and v_type is None:
            return {}
        stored = {"k": k_type, "v": v_type}
        rotate = self.rotate
        if rotate is not None:
            rotate = "".join(letter for letter in rotate if stored[letter] is not None)
        return {"k_type": k_type, "v_type": v_type, "rotate": rotate, "residual_tokens": 0}


class Taken(NamedTuple):
    """A state of a prompt's tokens from one on."""

    begin: int
    blob: memoryview
    places: list[RecordPlace]


class ModelStates:
    """What a cache holds of one model.

    Parameters
    ----------
    state_format : StateFormat
        What the states of its contexts look like.
    identity : bytes
        Of the model, see `model_identity`.
    stored_as : StoredAs
        How rows are stored.
    new_kv : callable
        Makes the KV cache of a layout and further arguments of `KVCache`, or finds one.
    head_dim : int
        Values of a head, which rotation is about; 0: nobody knows.
    max_tokens : int
        Of a prompt; of longer ones the beginning is kept.
    budget_bytes : int
        Most bytes of pages.
    salt : str or bytes, optional
        Names the owner.

    Raises
    ------
    LlamaStateError
        The rows cannot be kept as blocks.
    """

    def __init__(
        self,
        state_format: StateFormat,
        identity: bytes,
        stored_as: StoredAs,
        new_kv: Callable[[KVLayout, dict[str, Any]], KVCache],
        *,
        head_dim: int,
        max_tokens: int,
        budget_bytes: int,
        salt: str | bytes | None,
    ) -> None:
        self.state_format = state_format
        self.last_use = 0.0
        record = self._record = one_record(state_format.records)
        self._k = RowKind.of(record.k, head_dim)
        self._v = RowKind.of(record.v, head_dim)
        layout = KVLayout(
            n_layers=len(record.k),
            n_kv_heads=self._k.n_heads,
            head_dim=self._k.head_dims,
            v_head_dim=self._v.dims_for(self._k.n_heads),
            max_tokens=-(-max_tokens // BLOCK_TOKENS) * BLOCK_TOKENS,
            k_dtype=self._k.dtype,
            v_dtype=self._v.dtype,
            order="block",
            block_tokens=BLOCK_TOKENS,
        )
        options = stored_as.options(k_is_plain=self._k.is_plain, v_is_plain=self._v.is_plain)
        options |= {"budget_bytes": budget_bytes, "salt": salt, "model": identity}
        self.kv = new_kv(layout, options)
        self.branches = Branches(BLOCK_TOKENS)
        self._token_bytes = layout.token_bytes
        self._max_kept_tokens = min(
            self.kv.layout.max_tokens, budget_bytes // self.kv.cold_layout.token_bytes
        )

    # --- blobs --------------------------------------------------------------------------------

    def keep(
        self,
        tokens: npt.NDArray[np.int32],
        take: Callable[[int], Taken],
        make_room: Callable[[int], object],
    ) -> Sequence:
        """Keep the rows of a state, of which those that are known are not looked at.

        `take` is called with the first token whose rows are needed, and returns a state of it and
        all behind it, or of more.  `make_room` is called with how many bytes they will take.

        Returns
        -------
        Sequence
            With all its tokens.  Close it; whole blocks stay published.

        Raises
        ------
        LlamaStateError
            The state's cells are not those of the tokens.
        OutOfMemoryError
            The budget is too small even with all else evicted.
        """
        n_tokens = len(tokens)
        n_kept = min(n_tokens, self._max_kept_tokens)
        sequence = self._sequence(tokens[:n_kept])
        try:
            first = sequence.n_cached
            begin, blob, places = take(first)
            place = one_place(places)
            rows_of = rows_by_token(place.positions, begin, n_tokens)
            make_room(self._bytes_for(n_kept - first))
            if first < n_kept:
                for layer, k, v in self._rows(blob, place, rows_of(first, n_kept)):
                    sequence.append(layer, k, v)
            sequence.publish()
            self.branches.note_blocks(tokens[:n_kept], first)
            if n_kept == n_tokens:
                n_whole = n_kept // BLOCK_TOKENS * BLOCK_TOKENS
                self._keep_tail(tokens, self._rows(blob, place, rows_of(n_whole, n_tokens)))
        except BaseException:
            sequence.close()
            raise
        return sequence

    def _rows(
        self, blob: memoryview, place: RecordPlace, rows: Any
    ) -> Iterator[tuple[int, npt.NDArray[Any], npt.NDArray[Any]]]:
        """Yield each layer, and K and V of some cells of a state."""
        n_cells = len(place.positions)
        for layer, kind in enumerate(self._record.k):
            k = self._k.rows(kind, blob, place.k[layer], n_cells)[rows]
            v = self._v_rows(layer, blob, place, rows)
            yield layer, self._k.shaped(k, layer), self._v.shaped(v, layer)

    def _v_rows(
        self, layer: int, blob: memoryview, place: RecordPlace, rows: Any
    ) -> npt.NDArray[Any]:
        kind, n_cells = self._record.v[layer], len(place.positions)
        if not self._record.is_transposed:
            some: npt.NDArray[Any] = self._v.rows(kind, blob, place.v[layer], n_cells)[rows]
            return some
        channels = self._v.rows(kind, blob, place.v[layer], n_cells).reshape(-1, n_cells)
        if not isinstance(rows, slice):
            return np.ascontiguousarray(channels.T[rows])
        found = channels[:, rows]
        words = np.empty(found.shape[::-1], self._v.word)
        transpose(found.view(self._v.word), words)
        rows_found: npt.NDArray[Any] = words.view(found.dtype)
        return rows_found

    def _keep_tail(
        self,
        tokens: npt.NDArray[np.int32],
        layers: Iterator[tuple[int, npt.NDArray[Any], npt.NDArray[Any]]],
    ) -> None:
        tail = self.branches.new_tail(tokens, len(tokens) % BLOCK_TOKENS * self._token_bytes)
        if tail is None:
            return
        for (_, k, v), (_, k_kept, v_kept) in zip(layers, self._tail_rows(tail), strict=True):
            k_kept[...] = k
            v_kept[...] = v

    def _tail_rows(
        self, tail: memoryview
    ) -> Iterator[tuple[int, npt.NDArray[Any], npt.NDArray[Any]]]:
        """Yield each layer, and K and V of a tail."""
        n_tokens, at = len(tail) // self._token_bytes, 0
        for layer, kinds in enumerate(zip(self._record.k, self._record.v, strict=True)):
            rows = []
            for kind, which in zip(kinds, (self._k, self._v), strict=True):
                rows.append(which.shaped(which.rows(kind, tail, at, n_tokens), layer))
                at += n_tokens * kind.row_bytes
            yield layer, rows[0], rows[1]

    def blob(self, sequence: Sequence, header: bytes, first: int = 0) -> memoryview:
        """Return a blob for llama.cpp with the rows of a sequence, in memory that is its own.

        Of its tokens from `first` on.

        Raises
        ------
        OutOfMemoryError
            There is no memory for it.
        """
        blob = new_blob(header, self.blob_bytes(len(sequence) - first, header))
        self._fill(blob, header, sequence, first)
        return blob

    def blob_bytes(self, n_tokens: int, header: bytes) -> int:
        """Return how many bytes a blob has."""
        records = self.state_format.records
        return StateFormat(header, records).nbytes([n_tokens] * len(records))

    def _fill(self, blob: memoryview, header: bytes, sequence: Sequence, first: int) -> None:
        state_format = StateFormat(header, self.state_format.records)
        positions = [np.arange(first, len(sequence), dtype=np.int32)] * len(state_format.records)
        place = one_place(write_state(state_format, blob, positions))
        layers = range(len(self._record.k))
        if len(blob) < PARALLEL_BYTES:
            self._fill_layers(blob, place, sequence, layers)
            return
        half = len(layers) // 2
        with ThreadPoolExecutor(1) as other:  # copying needs no GIL
            beginning = other.submit(self._fill_layers, blob, place, sequence, layers[:half])
            self._fill_layers(blob, place, sequence, layers[half:])
            beginning.result()

    def _fill_layers(
        self, blob: memoryview, place: RecordPlace, sequence: Sequence, layers: range
    ) -> None:
        n_tokens = len(place.positions)
        first = len(sequence) - n_tokens
        scratch = np.empty(n_tokens * max(self._v.n_values), self._v.storage)
        for layer in layers:
            target = self._k.rows(self._record.k[layer], blob, place.k[layer], n_tokens)
            sequence.k(layer, first, out=self._k.shaped(target, layer))
            target = self._v.rows(self._record.v[layer], blob, place.v[layer], n_tokens)
            if not self._record.is_transposed:
                sequence.v(layer, first, out=self._v.shaped(target, layer))
                continue
            rows = scratch[: target.size].reshape(target.shape)
            sequence.v(layer, first, out=self._v.shaped(rows, layer))
            words = target.reshape(-1, n_tokens).view(self._v.word)
            transpose(rows.view(self._v.word), words)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is cached."""
        return not self.kv.sequences and not self.kv.prefixes.stats().n_blocks

    # --- prompts ------------------------------------------------------------------------------

    def find(self, tokens: npt.NDArray[np.int32]) -> Sequence | None:
        """Return a sequence with the longest prefix of a prompt that is known, to be closed."""
        tokens = tokens[: self._max_kept_tokens]
        sequence = self._sequence(tokens)
        n_known = sequence.n_cached
        branch = self.branches.find(tokens, n_known)
        if branch is not None and branch.rows is not None:
            with suppress(OutOfMemoryError):  # then it is a few tokens shorter
                for layer, k, v in self._tail_rows(branch.rows):
                    sequence.append(layer, k[: branch.n_shared], v[: branch.n_shared])
            sequence.rollback()
        elif branch is not None:
            longer = self.kv.sequence(np.concatenate((tokens[:n_known], branch.tokens)))
            if longer.n_cached > n_known:
                longer.truncate(n_known + branch.n_shared)
                sequence.close()
                sequence = longer
            else:
                longer.close()
                self.branches.forget_block(tokens, n_known, branch)
        if len(sequence):
            return sequence
        sequence.close()
        return None

    @property
    def nbytes(self) -> int:
        """Bytes of the pages of all rows."""
        return self.kv.committed_bytes + self.branches.nbytes

    def evict(self) -> bool:
        """Let go of the block used longest ago, and of a tail; False if all are needed."""
        return bool(self.kv.trim()) | self.branches.evict() | self.kv.prefixes.evict()

    def _bytes_for(self, n_tokens: int) -> int:
        """Return how many bytes so many tokens more may take."""
        layout = self.kv.cold_layout
        return (layout.n_blocks(n_tokens) + 1) * layout.block_bytes + (
            BLOCK_TOKENS * self._token_bytes
        )

    def _sequence(self, tokens: npt.NDArray[np.int32]) -> Sequence:
        self.last_use = time.monotonic()
        return self.kv.sequence(tokens)


def new_blob(header: bytes, n_bytes: int) -> memoryview:
    """Return memory for a blob, in which what comes behind the header is aligned for any row."""
    pad = -len(header) % ROW_ALIGN
    return memoryview(default_allocator().alloc(pad + n_bytes, prefault=True))[pad:]
