"""Arrays over a window's rows: zero-copy, read-only.

Purpose
    Turn committed rows into the arrays that `Sequence.k` and its siblings return.
Invariants
    Every page under an array is committed: rows because appending committed them, and in block
    order whole blocks, because they are committed whole.  No read can meet a hole of the file
    (which would allocate it behind the ledger's back).
    An array is an export of its window, marked with the token it reaches to: while it lives, the
    window is not closed and no row under it is dropped.
Units
    Shape comments: T tokens, H KV heads, D head_dim, B KV blocks, b block_tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np

from pagealloc.kv import boundary

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from pagealloc import Window
    from pagealloc.kv.boundary import Span
    from pagealloc.kv.layout import KVLayout

__all__ = ["block_array", "row_array"]


def row_array(
    window: Window,
    layout: KVLayout,
    lengths: Sequence[int],
    place: tuple[int, int],
    tokens: tuple[int, int | None],
) -> npt.NDArray[Any]:
    """Return rows [start, end) of one (layer, kv) in a layer-major order, as (T, H, D).

    `lengths` are those of the layers; an `end` of None is the layer's.
    """
    layer, kv = place
    if layout.order == "block":
        raise ValueError(
            f"{'kv'[kv]}() has one token axis, which rows in block order have not: use "
            f"{'kv'[kv]}_blocks(layer), or a layout with order='interleaved'"
        )
    boundary.check_layer(layout, layer)
    n_tokens = lengths[layer]
    start, end = tokens[0], n_tokens if tokens[1] is None else tokens[1]
    boundary.check_rows(layout, layer, start, end, n_tokens)
    span = boundary.span_of_rows(layout, place, start, end)
    shape = (end - start, layout.n_kv_heads, layout.head_dim)  # (T, H, D)
    return _array(window, layout, span, shape, end)


def block_array(
    window: Window, layout: KVLayout, lengths: Sequence[int], place: tuple[int, int]
) -> npt.NDArray[Any]:
    """Return the blocks that hold the tokens of one (layer, kv), as (B, b, H, D)."""
    layer, kv = place
    if layout.order != "block":
        raise ValueError(
            f"{'kv'[kv]}_blocks() needs order='block', this layout has order={layout.order!r}: "
            f"use {'kv'[kv]}(layer)"
        )
    boundary.check_layer(layout, layer)
    n_tokens = lengths[layer]
    n_blocks = layout.n_blocks(n_tokens)
    span = boundary.span_of_rows(layout, place, 0, n_blocks * layout.block_tokens)
    shape = (n_blocks, layout.block_tokens, layout.n_kv_heads, layout.head_dim)  # (B, b, H, D)
    return _array(window, layout, span, shape, n_tokens)


def _array(
    window: Window,
    layout: KVLayout,
    span: Span,
    shape: tuple[int, ...],
    reach_tokens: int,
) -> npt.NDArray[Any]:
    """Return a read-only array over `span`, marked with the token it reaches to."""
    if not span.nbytes:
        empty: npt.NDArray[Any] = np.empty(shape, layout.storage_dtype)
        empty.flags.writeable = False
        return empty
    view = window.view(span.start, span.nbytes, mark=reach_tokens)
    return np.ndarray(shape, layout.storage_dtype, cast("Any", view), 0, layout.strides)
