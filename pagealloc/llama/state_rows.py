"""Rows of states: where they lie in a blob, and what they are, as NumPy has them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pagealloc import LlamaStateError
from pagealloc.llama.state_blob import RecordPlace

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from pagealloc.llama.state_blob import LayerType, RecordFormat

__all__ = ["PLAIN_TYPES", "RowKind", "one_place", "one_record", "rows_by_token"]

PLAIN_TYPES = {0: ("float32", 4), 1: ("float16", 2), 30: ("bfloat16", 2)}
"""ggml's types whose values lie one by one; rows of all others are kept as the words they are."""


class RowKind:
    """What the K or V rows of all layers are."""

    def __init__(self, dtype: str, word: type[np.generic], rows: tuple[LayerType, ...]) -> None:
        self.dtype = dtype
        self.word = word
        self.storage = np.dtype(np.uint16 if dtype == "bfloat16" else dtype)
        self.n_values = [row.row_bytes // self.storage.itemsize for row in rows]
        self.n_heads = [1] * len(rows)
        self.head_dims = self.n_values
        self.is_plain = True

    @classmethod
    def of(cls, rows: tuple[LayerType, ...], head_dim: int) -> RowKind:
        """Return the kind of the layers' rows, which must be of one type.

        Raises
        ------
        LlamaStateError
            They are not.
        """
        types = {row.ggml_type for row in rows}
        if len(types) > 1:
            raise LlamaStateError(f"the layers' rows are of several types: {sorted(types)}")
        dtype, value_bytes = PLAIN_TYPES.get(rows[0].ggml_type, ("float16", 2))
        if any(row.row_bytes % value_bytes for row in rows):
            raise LlamaStateError("rows of an odd number of bytes")
        kind = cls(dtype, np.uint32 if value_bytes == 4 else np.uint16, rows)
        kind.is_plain = rows[0].ggml_type in PLAIN_TYPES
        head_dim = head_dim or _likely_head_dim(kind.n_values)
        if kind.is_plain and not any(n % head_dim for n in kind.n_values):
            kind.n_heads = [n // head_dim for n in kind.n_values]
            kind.head_dims = [head_dim] * len(rows)
        return kind

    def dims_for(self, n_heads: list[int]) -> list[int]:
        """Return the values of a head of each layer, if there are so many."""
        if any(n % heads for n, heads in zip(self.n_values, n_heads, strict=True)):
            raise LlamaStateError("V rows do not divide into as many heads as K rows")
        self.n_heads = n_heads
        self.head_dims = [n // heads for n, heads in zip(self.n_values, n_heads, strict=True)]
        return self.head_dims

    def rows(
        self, kind: LayerType, blob: memoryview, offset: int, n_tokens: int
    ) -> npt.NDArray[Any]:
        """Return a layer's rows in a blob: an array (T, values); by channel if transposed."""
        n_values = kind.row_bytes // self.storage.itemsize
        flat = np.frombuffer(blob, self.storage, n_tokens * n_values, offset)
        rows: npt.NDArray[Any] = flat.reshape(n_tokens, n_values)
        return rows

    def shaped(self, rows: npt.NDArray[Any], layer: int) -> npt.NDArray[Any]:
        """Return rows by head."""
        return rows.reshape(len(rows), self.n_heads[layer], self.head_dims[layer])


def one_record(records: tuple[RecordFormat, ...]) -> RecordFormat:
    """Return the layers of all records as those of one.

    A model with a sliding window has two: of the layers that see all, and of those that see the
    window.  Of a prompt that fits into the window both have the same cells.
    """
    first = records[0]
    if any(each.is_transposed != first.is_transposed for each in records):
        raise LlamaStateError("V is transposed in some layers only")
    return first._replace(
        k=tuple(kind for each in records for kind in each.k),
        v=tuple(kind for each in records for kind in each.v),
    )


def one_place(places: list[RecordPlace]) -> RecordPlace:
    """Return where the rows of all records lie, as those of one.

    Raises
    ------
    LlamaStateError
        They are of different tokens.
    """
    first = places[0]
    if any(not np.array_equal(each.positions, first.positions) for each in places):
        raise LlamaStateError("the state's records are of different tokens")
    return RecordPlace(
        first.positions,
        [at for each in places for at in each.k],
        [at for each in places for at in each.v],
    )


def _likely_head_dim(n_values: list[int]) -> int:
    """Return the largest power of two, of those that heads have, that all rows divide into."""
    return next((n for n in (128, 64, 32) if not any(each % n for each in n_values)), 1)


def rows_by_token(
    positions: npt.NDArray[np.int32], begin: int, end: int
) -> Callable[[int, int], slice | npt.NDArray[np.intp]]:
    """Return what says in which cells some tokens lie, of a state of those from `begin` to `end`.

    Raises
    ------
    LlamaStateError
        It is not of these.
    """
    expected = np.arange(begin, end, dtype=np.int32)
    if np.array_equal(positions, expected):
        return lambda first, last: slice(first - begin, last - begin)
    order = np.argsort(positions, kind="stable")
    if not np.array_equal(positions[order], expected):
        raise LlamaStateError(
            f"the state's {len(positions)} tokens are not at positions {begin} to {end - 1}: some "
            "were removed or moved"
        )
    return lambda first, last: order[first - begin : last - begin]
