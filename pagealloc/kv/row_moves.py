"""Moving the rows of a window together, by mapping pages elsewhere or by moving bytes.

Structure
    Removing tokens keeps the others as *runs*, each of which moves towards the start::

        kept       [0, 4)            [20, 90)                 rm of 16 tokens
        target     [0, 4)  [4, 74)

    One run that moves by whole pages of every layer is mapped there (`_remap`), but for the rows
    before the first whole page; otherwise rows are moved.
Invariants
    whatever fails leaves rows and pages as they were
Units
    Tokens by their place in storage.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pagealloc.errors import OutOfMemoryError
from pagealloc.kv import boundary

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pagealloc.kv.row_pages import RowPages
    from pagealloc.kv.window_rows import WindowRows

    GiveWay = Callable[[Callable[[], None]], None]

__all__ = ["clip", "compact", "make_private"]

# ruff: noqa: SLF001  rows and the pages behind them are one unit

Range = tuple[int, int]


def clip(ranges: Sequence[Range], start: int, end: int) -> list[Range]:
    """Return what of ascending ranges lies in [start, end)."""
    clipped = [(max(first, start), min(last, end)) for first, last in ranges]
    return [(first, last) for first, last in clipped if first < last]


def compact(rows: WindowRows, pages: RowPages, ranges: Sequence[Range], give_way: GiveWay) -> None:
    """Move the rows of ascending ranges together, all or nothing.

    `give_way` carries out a request for memory, see `pressure.with_room`.
    """
    moves, target = [], 0
    for start, end in ranges:
        if start != target:
            moves.append((start, end, target))
        target += end - start
    if not moves:
        return
    if len(moves) == 1 and _remap(rows, pages, moves[0], give_way):
        return
    make_private(pages, [(moves[0][2], target)], give_way)
    for start, end, to in moves:  # nothing fails from here on
        rows._move_rows(start, end, to)


def _remap(
    rows: WindowRows, pages: RowPages, move: tuple[int, int, int], give_way: GiveWay
) -> bool:
    """Bring tokens [start, end) to `target` by mapping their pages there; False if that can't be.

    The rows before the first whole page are copied: fewer than `remap_tokens` tokens, to where
    rows were dropped, and put back if the kernel refuses.
    """
    start, end, target = move
    layout = pages.layout
    unit = layout.remap_tokens
    n_head = -target % unit
    if (start - target) % unit or n_head >= end - start or not layout.can_remap:
        return False
    moves = []
    for layer in [0] if layout.order == "block" else range(layout.n_layers):
        for source, to in boundary.pages_to_shift(
            layout, layer, (start + n_head, end), target + n_head
        ):
            moves.append((source.start, to, source.nbytes))
    saved = []
    if n_head:
        make_private(pages, [(target, target + n_head)], give_way)
        saved = rows._copies_of_rows(target, target + n_head)
        rows._move_rows(start, start + n_head, target)
    try:
        pages.window.move_pages(moves)
    except (OutOfMemoryError, OSError):
        if n_head:
            rows._restore_rows(target, saved)
        return False
    return True


def make_private(pages: RowPages, ranges: Sequence[Range], give_way: GiveWay) -> None:
    """Copy the shared pages of these tokens; their rows stay the same."""
    layout = pages.layout
    spans = [
        span
        for layer in ([0] if layout.order == "block" else range(layout.n_layers))
        for start, end in ranges
        for span in boundary.pages_of_rows(layout, layer, start, end)
    ]

    def request() -> None:
        for span in spans:
            pages.window.make_private(span.start, span.nbytes)

    give_way(request)
