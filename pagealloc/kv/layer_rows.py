"""LayerRows: where the rows of one layer lie; the table that a layout's arithmetic reads.

Units
    Bytes, unless the name says tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["KVOrder", "LayerRows", "RowShape", "place_layers", "round_up"]

KVOrder = Literal["interleaved", "split", "block"]


def round_up(nbytes: int, unit_bytes: int) -> int:
    """Return the smallest multiple of `unit_bytes`, a power of two, that is >= `nbytes`."""
    return (nbytes + unit_bytes - 1) & -unit_bytes


class RowShape(NamedTuple):
    """What the rows of a layer are: KV heads, values and bytes of a K and of a V row."""

    n_kv_heads: int
    k_head_dim: int
    v_head_dim: int
    k_row_bytes: int
    v_row_bytes: int


class LayerRows(NamedTuple):
    """Where the rows of one layer lie.

    `base` is the offset of its first K row in the window, or in its KV block in block order;
    `v_offset` is the way from there to its first V row.  A stride is the way from a row to the
    same row of the next token (of the same block): the row's bytes, its padding, and what lies
    between.
    """

    n_kv_heads: int
    k_head_dim: int
    v_head_dim: int
    k_row_bytes: int
    v_row_bytes: int
    k_stride: int
    v_stride: int
    base: int
    v_offset: int

    @property
    def token_bytes(self) -> int:
        """Bytes of K and V of one token in this layer, padding left out."""
        return self.k_row_bytes + self.v_row_bytes


def place_layers(
    shapes: Iterable[RowShape], order: KVOrder, n_tokens: int, page_bytes: int, *, pad_rows: bool
) -> tuple[tuple[LayerRows, ...], int]:
    """Return the table of each layer, and where the last layer ends.

    `n_tokens` is how many a layer has room for in one piece: a block's in block order, else the
    window's.
    """
    layers = []
    end = 0
    for shape in shapes:
        k_stride, v_stride, v_offset, unit_bytes = _spacing(
            shape, order, n_tokens, page_bytes if pad_rows else 0
        )
        base = round_up(end, unit_bytes if order == "block" else page_bytes)
        layers.append(LayerRows(*shape, k_stride, v_stride, base, v_offset))
        end = base + n_tokens * v_stride + (v_offset if order == "split" else 0)
    return tuple(layers), end


def _spacing(
    shape: RowShape, order: KVOrder, n_tokens: int, pad_to_bytes: int
) -> tuple[int, int, int, int]:
    """Return k_stride, v_stride, v_offset, and to what a layer's first row is aligned.

    `pad_to_bytes` is the page that rows shall not cross, 0 where they may.
    """
    k_bytes, v_bytes = shape.k_row_bytes, shape.v_row_bytes
    if not pad_to_bytes:
        if order == "split":
            return k_bytes, v_bytes, n_tokens * k_bytes, 1
        return k_bytes + v_bytes, k_bytes + v_bytes, k_bytes, 1
    if order == "split":
        k_stride, v_stride = _padded(k_bytes, pad_to_bytes), _padded(v_bytes, pad_to_bytes)
        return k_stride, v_stride, round_up(n_tokens * k_stride, pad_to_bytes), pad_to_bytes
    if k_bytes + v_bytes <= pad_to_bytes:  # both rows of a token in one page
        stride = _padded(k_bytes + v_bytes, pad_to_bytes)
        return stride, stride, k_bytes, stride
    v_offset = round_up(k_bytes, pad_to_bytes)
    stride = v_offset + round_up(v_bytes, pad_to_bytes)
    return stride, stride, v_offset, pad_to_bytes


def _padded(nbytes: int, page_bytes: int) -> int:
    """Return what a page holds a whole number of, or what is whole pages, and is >= `nbytes`."""
    if nbytes > page_bytes:
        return round_up(nbytes, page_bytes)
    return 1 << (nbytes - 1).bit_length()
