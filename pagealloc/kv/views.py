"""Arrays over all of a layer's rows, or its KV blocks: zero-copy, read-only.

Purpose
    What `Sequence.k_blocks`, `v_blocks` and `rows` return; `k` and `v` are `sequence_arrays`.
Invariants
    Every page under an array is committed, because blocks are committed whole.  No read can meet a
    hole of the file (which would allocate it behind the ledger's back).
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
    from pagealloc.kv.layout import KVLayout

__all__ = ["block_array", "stored_array"]


def block_array(
    window: Window, layout: KVLayout, lengths: Sequence[int], place: tuple[int, int]
) -> npt.NDArray[Any]:
    """Return the blocks that hold the tokens of one (layer, kv), as (B, b, H, D)."""
    kv = place[1]
    if layout.order != "block":
        raise ValueError(
            f"{'kv'[kv]}_blocks() needs order='block', this layout has order={layout.order!r}: "
            f"use {'kv'[kv]}(layer)"
        )
    return stored_array(window, layout, lengths, place)


def stored_array(
    window: Window, layout: KVLayout, lengths: Sequence[int], place: tuple[int, int]
) -> npt.NDArray[Any]:
    """Return the rows of one (layer, kv) as they are stored: (T, H, D), or (B, b, H, D)."""
    layer, kv = place
    boundary.check_layer(layout, layer)
    n_tokens = lengths[layer]
    shape: tuple[int, ...]
    if layout.order == "block":
        n_blocks = layout.n_blocks(n_tokens)
        span = boundary.span_of_rows(layout, place, 0, n_blocks * layout.block_tokens)
        shape = (n_blocks, layout.block_tokens, *layout.row_shape(layer, kv))
    else:
        span = boundary.span_of_rows(layout, place, 0, n_tokens)
        shape = (n_tokens, *layout.row_shape(layer, kv))
    dtype = layout.storage_dtypes[kv]
    if not span.nbytes:
        empty: npt.NDArray[Any] = np.empty(shape, dtype)
        empty.flags.writeable = False
        return empty
    view = window.view(span.start, span.nbytes, mark=n_tokens)
    return np.ndarray(shape, dtype, cast("Any", view), 0, layout.strides(layer, kv))
