"""The rows of a KV block as one piece of bytes, wherever they lie in a window.

Structure
    The piece is the same whatever the order of the layout, so that caches of different orders can
    exchange blocks.  It is what block order without padding has in memory::

        | layer 0: k0 v0 k1 v1 ... k15 v15 | layer 1: k0 v0 ... |

    A *segment* is a run of it that lies in one piece in the window, too.
Units
    Bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pagealloc.kv.boundary import Span

if TYPE_CHECKING:
    from pagealloc.kv.layout import KVLayout

__all__ = ["block_piece_bytes", "segments"]


def block_piece_bytes(layout: KVLayout) -> int:
    """Return the length of the piece."""
    return layout.block_tokens * layout.token_bytes


def segments(layout: KVLayout, block: int) -> list[Span]:
    """Return where a block's rows lie in a window, in the order of the piece."""
    first = block * layout.block_tokens
    if layout.order == "block" and not layout.pad_rows:
        start = block * layout.block_bytes
        return [Span(start, start + block_piece_bytes(layout))]
    found: list[Span] = []
    for layer, rows in enumerate(layout.layers):
        for token in range(first, first + layout.block_tokens):
            for kv, nbytes in enumerate((rows.k_row_bytes, rows.v_row_bytes)):
                start = layout.row_offset(layer, token, kv)
                if found and found[-1].end == start:
                    found[-1] = Span(found[-1].start, start + nbytes)
                else:
                    found.append(Span(start, start + nbytes))
    return found
