"""Rows of a KV layout that reach into one page more than their length needs.

Purpose
    Say of a layout how many rows straddle pages, and what it would cost that none does.
Invariants
    0 <= n_straddling <= n_rows
Units
    Rows; padding as a share of the bytes of a token.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from pagealloc.kv import is_page_safe

if TYPE_CHECKING:
    from pagealloc.kv import KVLayout
    from pagealloc.kv.layer_rows import LayerRows

__all__ = ["NO_ROWS", "StraddlingRows", "straddling_rows"]


class StraddlingRows(NamedTuple):
    """What was found in a layout."""

    n_rows: int
    """Rows that were looked at: after them, the pattern repeats."""
    n_straddling: int
    """Of them, those that reach into one page more than they need."""
    padding_share: float | None
    """How many more bytes a token would take with ``pad_rows=True``, 0.25: a quarter; None: a
    sequence would not fit into an address space then."""

    @property
    def share(self) -> float:
        """Which part of the rows straddles pages; 0 if there are none."""
        return self.n_straddling / self.n_rows if self.n_rows else 0.0


NO_ROWS = StraddlingRows(0, 0, 0.0)


@lru_cache(maxsize=64)
def straddling_rows(layout: KVLayout) -> StraddlingRows:
    """Return which rows of a layout straddle pages.

    Packed rows are left out: they are unpacked one behind the other, and what padding takes is
    what packing was for.

    Parameters
    ----------
    layout : KVLayout
        Any.  Of each layer as many tokens are looked at as lie differently in their pages, once
        for layers that lie alike.  Thread-safe.
    """
    n_tokens = min(layout.remap_tokens, layout.max_tokens)
    kinds = [kv for kv in (0, 1) if not layout.formats[kv].is_packed]
    n_rows = n_straddling = 0
    alike: Counter[LayerRows] = Counter()
    layer_of: dict[LayerRows, int] = {}
    for layer, rows in enumerate(layout.layers):
        in_page = rows._replace(base=rows.base % layout.page_bytes)
        alike[in_page] += 1
        layer_of[in_page] = layer
    for in_page, layer in layer_of.items():
        for kv in kinds:
            n_rows += n_tokens * alike[in_page]
            n_straddling += _count_straddling(layout, layer, kv, n_tokens) * alike[in_page]
    return StraddlingRows(n_rows, n_straddling, _padding_share(layout) if n_straddling else 0.0)


def _count_straddling(layout: KVLayout, layer: int, kv: int, n_tokens: int) -> int:
    """Count the rows of the first tokens whose last bytes lie in a page too many."""
    page_bytes, row_bytes = layout.page_bytes, layout.row_bytes(layer, kv)
    last_bytes = (row_bytes - 1) % page_bytes + 1  # what a row on a page has in its last page
    return sum(
        not is_page_safe(layout.row_offset(layer, token, kv), last_bytes, page_bytes)
        for token in range(n_tokens)
    )


def _padding_share(layout: KVLayout) -> float | None:
    try:
        padded = replace(layout, pad_rows=True)
    except ValueError:  # such a window would not fit into an address space
        return None
    return _token_bytes(padded) / _token_bytes(layout) - 1


def _token_bytes(layout: KVLayout) -> float:
    if layout.order == "block":
        return layout.block_bytes / layout.block_tokens
    return layout.token_stride_bytes
