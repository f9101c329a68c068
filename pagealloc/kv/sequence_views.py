"""SequenceViews: a sequence's rows as they are stored, and what storing them so cost.

Purpose
    What `sequence_arrays` is for the rows of a layer with one token axis, for those without.
Locking
    As `sequence_arrays`: many readers, beside one writer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pagealloc.errors import PageBoundaryError
from pagealloc.kv import views
from pagealloc.kv.error_stats import ErrorStats
from pagealloc.kv.sequence_rows import SequenceRows

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from pagealloc.kv.cache import KVCache
    from pagealloc.kv.layout import KVLayout

__all__ = ["SequenceViews"]

# ruff: noqa: SLF001  cache and sequences are one unit


class SequenceViews(SequenceRows):
    """What `Sequence` inherits."""

    __slots__ = ("_cache", "_layout")

    _cache: KVCache
    _layout: KVLayout

    def k_blocks(self, layer: int) -> npt.NDArray[Any]:
        """Return the K rows of a layer by KV block, without a copy, read-only; block order only.

        Returns
        -------
        ndarray, shape (B, block_tokens, H, D)
            Of the last block, only the rows up to the layer's length are valid: what lies behind
            them is committed memory of undefined content, and changes as tokens arrive.

        Raises
        ------
        PageBoundaryError
            There is no such layer.
        ValueError
            The layout is in a layer-major order.
        """
        return self._blocks(layer, 0)

    def v_blocks(self, layer: int) -> npt.NDArray[Any]:
        """Return the V rows of a layer by KV block, without a copy, read-only; as `k_blocks`."""
        return self._blocks(layer, 1)

    def rows(self, layer: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Return the quantised K and V rows of a layer as they are stored, without a copy.

        Returns
        -------
        k, v : ndarray, shape (T, bytes)
            uint8, read-only, T = `n_cold`: blocks of 32 values, see `pagealloc.kv.quant`.  In block
            order (B, block_tokens, bytes), as `k_blocks`.  Rows that are stored as given keep their
            type and shape.

        Raises
        ------
        ValueError
            The cache does not quantise.
        PageBoundaryError
            There is no such layer.
        """
        cold = self._cold
        if cold is None:
            raise ValueError("the rows are stored as they came: use k(layer) and v(layer)")
        layout = self._cache.cold_layout

        def stored(kv: int) -> npt.NDArray[Any]:
            array = self._array(
                lambda: views.stored_array(cold._window, layout, cold.layer_lengths, (layer, kv))
            )
            return array[..., 0, :] if layout.formats[kv].is_packed else array

        return stored(0), stored(1)

    def error_stats(self) -> ErrorStats:
        """Return what quantising cost the rows of each layer, from one row in 64; see `ErrorStats`.

        Of the rows that this sequence packed itself: a fork's are the parent's.

        Raises
        ------
        ValueError
            The cache does not quantise.
        """
        if self._cold is None:
            raise ValueError("the rows are stored as they came, without an error")
        return ErrorStats.of(self._cold._errors())

    def _blocks(self, layer: int, kv: int) -> npt.NDArray[Any]:
        if self._cold is not None:
            raise ValueError(
                f"{'kv'[kv]}_blocks() is about rows that are stored as they came: use "
                f"{'kv'[kv]}(layer), which unpacks them, or rows(layer)"
            )
        place = (layer, kv)
        return self._array(
            lambda: views.block_array(self._window, self._layout, self.layer_lengths, place)
        )

    def _array(self, make: Callable[[], npt.NDArray[Any]]) -> npt.NDArray[Any]:
        """As `SequenceArrays.k`: the array's view keeps the writer from cutting what it covers."""
        while True:
            self._check_open()
            n_cuts = self._n_cuts
            try:
                array = make()
            except PageBoundaryError:
                if self._n_cuts == n_cuts:
                    raise
                continue  # the pages went while we looked
            if self._n_cuts == n_cuts:
                return array
            del array
