"""RowPages: commits, makes private, shares and releases the pages behind a sequence's rows.

Purpose
    Keep the pages of one window in step with the lengths of its layers.
Structure
    ``ready[layer]`` is the token up to which the pages behind the layer's last row are committed
    and private, so that appending there needs no look at any page::

        token   0 ............... length ....... ready ................ max_tokens
        pages   | rows, maybe shared | committed, private | not looked at
Invariants
    committed pages == pages_of(ready) + surplus + spare
    lengths[i] <= ready[i] <= max_tokens
    The one sharing rule: whoever writes makes the pages private first, parent and child alike.
    share() therefore sets `ready` back on both sides.
    surplus: pages without rows that the kernel refused to let go; every later change tries again.
    spare: pages that a warm window brought along, private, behind the rows or between layers.
Locking
    None: one writer a sequence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pagealloc.errors import InvariantError, OutOfMemoryError
from pagealloc.kv import boundary, row_moves
from pagealloc.kv.boundary import Span

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pagealloc import Window
    from pagealloc.kv.layout import KVLayout
    from pagealloc.kv.row_moves import GiveWay, Range
    from pagealloc.kv.sequence import Sequence as Rows
    from pagealloc.kv.window_rows import WindowRows

__all__ = ["RowPages", "share_parts"]

# ruff: noqa: SLF001  the rows of a sequence and the pages behind them are one unit


def share_parts(window: Window, parts: list[tuple[Window, list[Span]]]) -> None:
    """Map spans of other windows in a window."""
    for other, spans in parts:
        for span in spans:
            window.share_from(other, span.start, span.nbytes)


class RowPages:
    """The pages of one sequence.

    Parameters
    ----------
    window : Window
        Where the pages are; a new one, or a warm one with pages that nobody else has.
    layout : KVLayout
        Where the rows lie in it.
    """

    __slots__ = ("has_shared", "layout", "spare", "surplus", "window")

    def __init__(self, window: Window, layout: KVLayout) -> None:
        self.window = window
        self.layout = layout
        self.has_shared = False  # whether any page was ever shared
        self.surplus: list[Span] = []
        # Of a warm window the pages are there already.
        self.spare = [Span(run.offset, run.offset + run.nbytes) for run in window.runs()]

    @property
    def windows(self) -> tuple[Window, ...]:
        """The windows of the sequence."""
        return (self.window,)

    @property
    def stored(self) -> RowPages:
        """The pages of rows as the cache stores them."""
        return self

    def n_stored(self, rows: WindowRows) -> int:
        """Return how many tokens lie in them, in every layer."""
        return len(rows)

    def make_stored_ready(self, rows: WindowRows, end: int, give_way: GiveWay) -> None:
        """Commit and make private the pages of stored rows up to `end`, in every layer."""
        layers = list(range(self.layout.n_layers))
        give_way(lambda: self.make_ready(rows, layers, end))

    def set_stored(self, rows: WindowRows, n_tokens: int) -> None:
        """Stored rows were written up to there; lengths are the caller's."""

    def make_ready(self, rows: WindowRows, layers: Sequence[int], end: int) -> None:
        """Commit and make private the pages of new rows up to `end` of some layers, or of none.

        Parameters
        ----------
        rows : WindowRows
            The sequence's rows, whose `ready` is set.
        layers : sequence of int
            Which layers; several only if they are equally long.
        end : int
            Tokens these layers shall have.

        Raises
        ------
        PageBoundaryError
            The window has no room for the rows.
        OutOfMemoryError
            The budget or the kernel refused; everything is as it was.
        """
        layout, window = self.layout, self.window
        lengths, ready = rows.layer_lengths, rows._ready
        for layer in layers:
            boundary.check_room(layout, layer, lengths[layer], end)
        first = lengths[layers[0]]
        in_blocks = layout.order == "block"
        wanted = [
            span
            for layer in (layers[:1] if in_blocks else layers)  # a block holds all layers
            for span in boundary.pages_of_rows(layout, layer, lengths[layer], end)
        ]
        if self.surplus:
            self._release_surplus()
        self.spare = boundary.subtract(self.spare, wanted)
        try:
            for span in wanted:
                window.commit(span.start, span.nbytes)
            if self.has_shared:
                for span in wanted:
                    window.make_private(span.start, span.nbytes)
            if self.surplus:
                self.surplus = boundary.subtract(self.surplus, wanted)
            if in_blocks:
                block_start = first - first % layout.block_tokens
                layers = [layer for layer, length in enumerate(lengths) if length >= block_start]
            used: list[Span] = []
            for layer in layers:
                covered = boundary.covered_end(layout, layer, end, self.spare)
                ready[layer] = max(ready[layer], covered)
                if self.spare and not (in_blocks and used):
                    used += boundary.pages_of_rows(layout, layer, end, covered)
            rows._ready = ready
            self.spare = boundary.subtract(self.spare, boundary.page_spans(layout, used))
        except BaseException as error:  # an interrupt, too, may come between any two lines
            self.release(boundary.subtract(wanted, boundary.pages_of(layout, rows._ready)))
            if not isinstance(error, OutOfMemoryError):
                raise
            raise OutOfMemoryError(
                f"tokens {first} to {end - 1} of {len(layers)} layers do not fit: {error}; this "
                f"sequence is as it was"
            ) from error

    @property
    def remap_tokens(self) -> int:
        """In steps of how many tokens pages are mapped elsewhere, see `KVLayout.remap_tokens`."""
        return self.layout.remap_tokens

    def cut(self, rows: WindowRows, lengths: Sequence[int]) -> None:
        """Release the pages that hold none of the first tokens of each layer."""
        pages = boundary.pages_of(self.layout, rows._ready)
        rows._ready = list(lengths)
        self.release(boundary.subtract(pages, boundary.pages_of(self.layout, lengths)))

    def release(self, spans: list[Span]) -> None:
        """Release pages that no row needs; what the kernel refuses to let go becomes surplus.

        Releasing a page that is shared maps the window's own, empty one in its place, for which
        the kernel may want memory it has not got.  The page is then unused, not lost.
        """
        self.surplus = [*self.surplus, *spans]
        self._release_surplus()

    def _release_surplus(self) -> None:
        left = []
        for span in self.surplus:
            try:
                self.window.release(span.start, span.nbytes)
            except (OutOfMemoryError, OSError, BufferError):  # BufferError: a reader was quicker
                left.append(span)
        self.surplus = sorted(left)

    def share(
        self, rows: WindowRows, other: RowPages, other_rows: WindowRows, lengths: list[int]
    ) -> None:
        """Map the pages of the first tokens of another's layers, where nothing is committed."""
        other.lend(other_rows)
        spans = boundary.pages_of(self.layout, lengths)
        self.take(rows, lengths, lambda window: share_parts(window, [(other.window, spans)]))

    def lend(self, rows: WindowRows) -> None:
        """Others are about to share the pages of its rows: whoever writes looks at them again."""
        rows_pages = boundary.pages_of(self.layout, rows.layer_lengths)
        beyond = boundary.subtract(boundary.pages_of(self.layout, rows._ready), rows_pages)
        self.spare = boundary.page_spans(self.layout, [*self.spare, *beyond])
        rows._ready = list(rows.layer_lengths)
        self.has_shared = True

    def take(self, rows: WindowRows, lengths: list[int], share: Callable[[Window], None]) -> None:
        """Map others' pages, by `share`, for the first tokens of layers that have none.

        Raises
        ------
        OutOfMemoryError
            The kernel refused; what was mapped is released with the sequence.
        """
        self.cut(rows, [0] * self.layout.n_layers)  # pages made ready for rows that never came
        rows._ready = lengths
        self.has_shared = True
        wanted = boundary.pages_of(self.layout, lengths)
        self.surplus += boundary.overlap(self.spare, wanted)
        self.spare = boundary.subtract(self.spare, wanted)
        self._release_surplus()
        share(self.window)

    def settle(self, rows: WindowRows, give_way: GiveWay) -> None:
        """Nothing is to be done before rows are moved."""

    def compact(self, rows: WindowRows, ranges: Sequence[Range], give_way: GiveWay) -> None:
        """See `row_moves.compact`."""
        row_moves.compact(rows, self, ranges, give_way)

    def make_private(self, rows: WindowRows, ranges: Sequence[Range], give_way: GiveWay) -> None:  # noqa: ARG002
        """See `row_moves.make_private`."""
        row_moves.make_private(self, ranges, give_way)

    def append_from(
        self,
        rows: Rows,
        other: Rows,
        ranges: Sequence[Range],
        give_way: GiveWay,  # noqa: ARG002
    ) -> None:
        """Copy tokens of another sequence behind those of this one; lengths are the caller's.

        Raises
        ------
        OutOfMemoryError
            There is no memory for them; nothing has changed.
        """
        at, layers = len(rows), range(self.layout.n_layers)
        end = at + sum(end - start for start, end in ranges)
        rows._make_ready(list(layers), end)
        for start, stop in ranges:
            rows._restore_rows(at, other._copies_of_rows(start, stop))
            at += stop - start

    def check(self, rows: WindowRows) -> None:
        """Raise InvariantError if what the module says must hold does not."""
        layout, window = self.layout, self.window
        window.check()
        lengths, all_ready = rows.layer_lengths, rows._ready
        for layer, (length, ready) in enumerate(zip(lengths, all_ready, strict=True)):
            if not 0 <= length <= ready <= layout.max_tokens:
                raise InvariantError(f"layer {layer}: length {length}, ready up to {ready}")
            for span in boundary.pages_of_rows(layout, layer, length, ready):
                if not window.is_private(span.start, span.nbytes):
                    raise InvariantError(f"layer {layer}: {span} is ready but not private")
        runs = [Span(run.offset, run.offset + run.nbytes) for run in window.runs()]
        expected = [*boundary.pages_of(layout, all_ready), *self.surplus, *self.spare]
        if boundary.page_spans(layout, runs) != boundary.page_spans(layout, expected):
            raise InvariantError(f"{runs} are committed for rows {lengths}, not {expected}")
