"""HeldBlocks: the pages of consecutive KV blocks that the prefix index keeps.

Purpose
    Keep rows that no open sequence may have, for sequences to come.
Structure
    ::

        blocks   0 .......... first | first ............ end |
        pages    of other HeldBlocks| in `window`, which has no addresses

    Blocks lie in it at the offsets that they have in every window.  In layer-major orders the page
    where the first block starts may hold rows of the block before, which are right, too: whoever
    computed the first block had them.
Invariants
    window's committed pages == pages_of_blocks(first, end), until the kernel refuses a release
Locking
    The index's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pagealloc.errors import InvariantError
from pagealloc.kv import boundary
from pagealloc.kv.boundary import Span
from pagealloc.kv.lineage import part

if TYPE_CHECKING:
    from pagealloc import Window
    from pagealloc.kv.layout import KVLayout
    from pagealloc.kv.lineage import Cells
    from pagealloc.kv.prefix_client import RemoteLease
    from pagealloc.kv.prefix_nodes import Node

__all__ = ["HeldBlocks", "pages_of_blocks"]


def pages_of_blocks(layout: KVLayout, first: int, end: int) -> list[Span]:
    """Return the pages that hold rows of KV blocks [first, end)."""
    if layout.order == "block":
        return [Span(first * layout.block_bytes, end * layout.block_bytes)]
    start_token, end_token = first * layout.block_tokens, end * layout.block_tokens
    return boundary.page_spans(
        layout,
        [
            span
            for layer in range(layout.n_layers)
            for span in boundary.pages_of_rows(layout, layer, start_token, end_token)
        ],
    )


class HeldBlocks:
    """Consecutive KV blocks, published together.

    Parameters
    ----------
    window : Window
        Without addresses, and without pages.
    layout : KVLayout
        Where rows lie in windows.
    blocks : (int, int)
        The first block, and the one behind the last.
    cells : list of Cells
        Which tokens these are, to count rows once.
    parent : Node
        The block before its first, or the root.
    keeps : RemoteLease, optional
        On pages among these that another process has.
    """

    __slots__ = ("cells", "end", "first", "keeps", "layout", "parent", "window")

    def __init__(
        self,
        window: Window,
        layout: KVLayout,
        blocks: tuple[int, int],
        cells: list[Cells],
        parent: Node,
        keeps: RemoteLease | None = None,
    ) -> None:
        self.window = window
        self.layout = layout
        self.first, self.end = blocks
        self.cells = cells
        self.parent = parent
        self.keeps = keeps

    def pages(self, first: int, end: int) -> list[Span]:
        """Return the pages of some of its blocks."""
        return pages_of_blocks(self.layout, first, end)

    def take(self, source: Window) -> None:
        """Keep the pages of the blocks that another window has now.

        Raises
        ------
        BufferError, OutOfMemoryError
            An array may write to them; the kernel has no memory for the books.
        """
        for span in self.pages(self.first, self.end):
            self.window.share_from(source, span.start, span.nbytes)

    def first_cells(self, end: int) -> list[Cells]:
        """Return the cells of its blocks up to `end`."""
        return part(self.cells, 0, (end - self.first) * self.layout.block_tokens)

    def cut(self, end: int) -> None:
        """Let go of the blocks from `end` on.

        Raises
        ------
        OutOfMemoryError
            There is no memory for the books; what went is gone, and the rest stays.
        """
        kept = self.pages(self.first, end) if end > self.first else []
        for span in boundary.subtract(self.pages(self.first, self.end), kept):
            self.window.release(span.start, span.nbytes)
        self.cells = self.first_cells(end)
        self.end = end
        if end == self.first:
            self.window.close()

    def check(self) -> None:
        """Raise InvariantError if what the module says must hold does not."""
        self.window.check()
        runs = [Span(run.offset, run.offset + run.nbytes) for run in self.window.runs()]
        expected = self.pages(self.first, self.end)
        if boundary.page_spans(self.layout, runs) != expected:
            raise InvariantError(f"blocks {self.first} to {self.end}: {runs}, not {expected}")
