"""RingPages: the pages behind the ring of a quantised sequence's newest rows.

Purpose
    As `row_pages`, for a window in which token t lies at ``t % ring_tokens``.
Structure
    Tokens [start, end) are one piece of the ring, or two where they pass its end::

        ring    | 144 145 146 147 |  4   5 ...  142 143 |      of 144 tokens, holding [20, 148)
Invariants
    pages with rows are committed; pages in `own` are committed and private
    whoever writes makes the pages private first: share() takes what it shares out of `own`
    pages without rows may stay, of a warm window
    surplus: pages that the kernel refused to let go; every later change tries again
Locking
    None: one writer a sequence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pagealloc.errors import InvariantError, OutOfMemoryError
from pagealloc.kv import boundary
from pagealloc.kv.boundary import Span

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pagealloc import Window
    from pagealloc.kv.layout import KVLayout

__all__ = ["RingPages"]

Range = tuple[int, int]


class RingPages:
    """The pages of one ring.

    Parameters
    ----------
    window : Window
        Where the pages are; a new one, or a warm one with pages that nobody else has.
    layout : KVLayout
        Of the ring: `max_tokens` is its length.
    """

    __slots__ = ("_all", "has_shared", "layout", "own", "surplus", "window")

    def __init__(self, window: Window, layout: KVLayout) -> None:
        self.window = window
        self.layout = layout
        self.has_shared = False
        self.surplus: list[Span] = []
        self.own = self._committed()
        self._all = boundary.pages_of(layout, [layout.max_tokens] * layout.n_layers)

    def make_ready(self, ranges: Sequence[Range]) -> None:
        """Commit and make private the pages of tokens [start, end) of each layer, or of none.

        Raises
        ------
        OutOfMemoryError
            The budget or the kernel refused; what holds rows is as it was.
        """
        pages = self._pages(ranges)
        self.surplus = boundary.subtract(self.surplus, pages)
        if self.surplus:
            self._release(())
        wanted = boundary.subtract(pages, self.own)
        before = self._committed()
        try:
            for span in wanted:
                self.window.commit(span.start, span.nbytes)
            if self.has_shared:
                for span in wanted:
                    self.window.make_private(span.start, span.nbytes)
        except BaseException:
            self._release(boundary.subtract(wanted, before))
            raise
        self.own = boundary.page_spans(self.layout, [*self.own, *wanted])

    def ready_end(self, layer: int, end: int) -> int | None:
        """Return up to which token of a layer pages are ready if those before `end` are.

        None: all are, however many come.
        """
        if self.own == self._all:
            return None
        slot = end % self.layout.max_tokens
        if not slot:
            return end
        return end + boundary.covered_end(self.layout, layer, slot) - slot

    def cut(self, ranges: Sequence[Range]) -> None:
        """Release the pages that hold none of the tokens [start, end) of each layer."""
        kept = self._pages(ranges)
        self._release(boundary.subtract(self._committed(), kept))
        self.own = boundary.overlap(self.own, kept)

    def share(self, other: RingPages, ranges: Sequence[Range]) -> None:
        """Map the pages of tokens [start, end) of each layer of another ring; this one is empty."""
        wanted = self._pages(ranges)
        self._release(boundary.overlap(self._committed(), wanted))
        self.has_shared = other.has_shared = True
        self.own = boundary.subtract(self.own, wanted)
        other.own = boundary.subtract(other.own, wanted)
        self.surplus = boundary.subtract(self.surplus, wanted)
        for span in wanted:
            self.window.share_from(other.window, span.start, span.nbytes)

    def check(self, ranges: Sequence[Range]) -> None:
        """Raise InvariantError if what the module says must hold does not."""
        self.window.check()
        missing = boundary.subtract(self._pages(ranges), self._committed())
        if missing:
            raise InvariantError(f"{missing} hold rows of {ranges} and are not committed")
        if boundary.overlap(self.surplus, [*self._pages(ranges), *self.own]):
            raise InvariantError(f"surplus {self.surplus} holds rows of {ranges}, or is {self.own}")
        for span in self.own:
            if not self.window.is_private(span.start, span.nbytes):
                raise InvariantError(f"{span} is not private")

    def _pages(self, ranges: Sequence[Range]) -> list[Span]:
        spans = [
            span
            for layer, (start, end) in enumerate(ranges)
            for first, last in self._pieces(start, end)
            for span in boundary.pages_of_rows(self.layout, layer, first, last)
        ]
        return boundary.page_spans(self.layout, spans)

    def _pieces(self, start: int, end: int) -> list[Range]:
        ring_tokens = self.layout.max_tokens
        if start >= end:
            return []
        first = start % ring_tokens
        last = first + end - start
        if last <= ring_tokens:
            return [(first, last)]
        return [(first, ring_tokens), (0, last - ring_tokens)]

    def _committed(self) -> list[Span]:
        runs = self.window.runs()
        spans = [Span(run.offset, run.offset + run.nbytes) for run in runs]
        return boundary.page_spans(self.layout, spans)

    def _release(self, spans: Sequence[Span]) -> None:
        """Release pages without rows; what the kernel refuses to let go becomes surplus."""
        left = []
        for span in boundary.page_spans(self.layout, [*self.surplus, *spans]):
            try:
                self.window.release(span.start, span.nbytes)
            except (OutOfMemoryError, OSError, BufferError):
                left.append(span)
        self.surplus = left
