"""QuantisedPages: the pages of a sequence in two windows, cold rows and the ring of the newest.

Purpose
    What `row_pages` is to other sequences.
Structure
    ::

        QuantisedPages -- RowPages  -- cold window   tokens [0, n_cold) of a layer, packed
                       `- RingPages -- ring          tokens [n_cold, length), as given
Invariants
    rows up to `ready` need no page: neither in the ring, nor in the cold window for what becomes
    cold until then
Locking
    None: one writer a sequence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pagealloc.errors import InvariantError
from pagealloc.kv import boundary, row_moves
from pagealloc.kv.ring_pages import RingPages
from pagealloc.kv.row_pages import RowPages

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pagealloc import Window
    from pagealloc.kv.cold_rows import ColdRows
    from pagealloc.kv.quantisation import Quantisation
    from pagealloc.kv.row_moves import GiveWay, Range
    from pagealloc.kv.sequence import Sequence as Rows

__all__ = ["QuantisedPages"]

# ruff: noqa: SLF001  the rows of a sequence and the pages behind them are one unit


class QuantisedPages:
    """The pages of one quantised sequence.

    Parameters
    ----------
    rows : Sequence
        The sequence, with a ring and cold rows.
    quantisation : Quantisation
        Where rows lie in the one and in the other.
    """

    __slots__ = ("cold", "ring")

    def __init__(self, rows: Rows, quantisation: Quantisation) -> None:
        self.ring = RingPages(rows._window, quantisation.ring_layout)
        self.cold = RowPages(_cold(rows)._window, quantisation.cold_layout)

    @property
    def windows(self) -> tuple[Window, ...]:
        """The windows of the sequence."""
        return self.ring.window, self.cold.window

    @property
    def stored(self) -> RowPages:
        """As `RowPages.stored`: the packed ones."""
        return self.cold

    def n_stored(self, rows: Rows) -> int:
        """As `RowPages.n_stored`."""
        return len(_cold(rows))

    def make_stored_ready(self, rows: Rows, end: int, give_way: GiveWay) -> None:
        """As `RowPages.make_stored_ready`."""
        self._make_packed_ready(_cold(rows), end, give_way)

    def set_stored(self, rows: Rows, n_tokens: int) -> None:
        """As `RowPages.set_stored`."""
        lengths = [n_tokens] * self.cold.layout.n_layers
        _cold(rows)._set_lengths(lengths)
        rows._ready = lengths

    def lend(self, rows: Rows) -> None:
        """As `RowPages.lend`, of packed rows."""
        self.cold.lend(_cold(rows))
        rows._ready = list(rows.layer_lengths)

    def take(self, rows: Rows, lengths: list[int], share: Callable[[Window], None]) -> None:
        """As `RowPages.take`; all these rows are packed."""
        cold = _cold(rows)
        self.cut(rows, [0] * len(lengths))
        self.cold.take(cold, list(lengths), share)
        cold._set_lengths(lengths)
        rows._ready = lengths

    def make_ready(self, rows: Rows, layers: Sequence[int], end: int) -> None:
        """As `RowPages.make_ready`."""
        cold, lengths, layout = _cold(rows), rows.layer_lengths, self.cold.layout
        for layer in layers:
            boundary.check_room(layout, layer, lengths[layer], end)
        ready_before = cold._ready
        ends = {layer: cold._due(layer, end) for layer in layers}
        self.cold.release([])  # what the kernel refused to let go: try again
        self._make_cold_ready(cold, ends)
        # Also for rows that are cold at once: they may come one by one, and then pass the ring.
        first = end - self.ring.layout.max_tokens
        ranges = [
            (max(lengths[layer], first), end) if layer in ends else (0, 0)
            for layer in range(layout.n_layers)
        ]
        try:
            self.ring.make_ready(ranges)
        except BaseException:
            pages = boundary.pages_of(layout, cold._ready)
            cold._ready = ready_before
            self.cold.release(boundary.subtract(pages, boundary.pages_of(layout, ready_before)))
            raise
        ready, cold_ready = rows._ready, cold._ready
        step, residual = cold.step_tokens, cold.residual_tokens
        for layer in layers:
            # the longest length of which no more is cold than pages are ready for
            most = residual + (cold_ready[layer] // step + 1) * step - 1
            in_ring = self.ring.ready_end(layer, end)
            most = min(most, layout.max_tokens) if in_ring is None else min(most, in_ring)
            ready[layer] = max(end, min(most, layout.max_tokens))
        rows._ready = ready

    def _make_cold_ready(self, cold: ColdRows, ends: dict[int, int]) -> None:
        """Pages for the rows that become cold; layers that are alike at once."""
        ready, lengths = cold._ready, cold.layer_lengths
        short = [layer for layer in ends if ends[layer] > ready[layer]]
        short.sort(key=lengths.__getitem__)
        for end in sorted({ends[layer] for layer in short}):
            self.cold.make_ready(cold, [layer for layer in short if ends[layer] == end], end)

    @property
    def remap_tokens(self) -> int:
        """As `RowPages.remap_tokens`; the ring's rows are few, and copied."""
        return self.cold.remap_tokens

    def cut(self, rows: Rows, lengths: Sequence[int]) -> None:
        """As `RowPages.cut`."""
        cold = _cold(rows)
        n_cold = [min(pair) for pair in zip(cold.layer_lengths, lengths, strict=True)]
        cold._set_lengths(n_cold)
        self.cold.cut(cold, n_cold)
        rows._ready = list(lengths)
        self.ring.cut(list(zip(n_cold, lengths, strict=True)))
        rows._look_at_cold()

    def share(
        self, rows: Rows, other: QuantisedPages, other_rows: Rows, lengths: list[int]
    ) -> None:
        """As `RowPages.share`."""
        cold, other_cold = _cold(rows), _cold(other_rows)
        self.cut(rows, [0] * len(lengths))
        n_cold = [min(pair) for pair in zip(other_cold.layer_lengths, lengths, strict=True)]
        self.cold.share(cold, other.cold, other_cold, n_cold)
        cold._set_lengths(n_cold)
        other_rows._ready = list(other_rows.layer_lengths)
        rows._ready = lengths
        self.ring.share(other.ring, list(zip(n_cold, lengths, strict=True)))

    def settle(self, rows: Rows, give_way: GiveWay) -> None:
        """Have as many cold rows in every layer, after `rollback` left some behind."""
        cold = _cold(rows)
        n_cold = max(cold.layer_lengths)
        if min(cold.layer_lengths) < n_cold:
            self._make_packed_ready(cold, n_cold, give_way)
            rows._pack_up_to(n_cold)

    def _make_packed_ready(self, cold: ColdRows, n_tokens: int, give_way: GiveWay) -> None:
        ends = dict.fromkeys(range(self.cold.layout.n_layers), n_tokens)
        give_way(lambda: self._make_cold_ready(cold, ends))

    def compact(self, rows: Rows, ranges: Sequence[Range], give_way: GiveWay) -> None:
        """See `row_moves.compact`; all layers have as many cold rows."""
        cold, n_layers = _cold(rows), self.cold.layout.n_layers
        n_cold = len(cold)
        packed = row_moves.clip(ranges, 0, n_cold)
        recent = row_moves.clip(ranges, n_cold, self.cold.layout.max_tokens)
        n_packed, n_recent = (sum(end - start for start, end in part) for part in (packed, recent))
        copies = []
        if n_packed != n_cold or recent[1:] or (recent and recent[0][0] != n_cold):
            copies = [rows._copies_of_rows(start, end) for start, end in recent]
            give_way(lambda: self.ring.make_ready([(n_packed, n_packed + n_recent)] * n_layers))
        row_moves.compact(cold, self.cold, packed, give_way)
        cold._set_lengths([n_packed] * n_layers)
        for (start, end), copy in zip(recent, copies, strict=False):
            rows._restore_rows(n_packed, copy)
            n_packed += end - start

    def make_private(self, rows: Rows, ranges: Sequence[Range], give_way: GiveWay) -> None:
        """See `row_moves.make_private`; all layers have as many cold rows."""
        n_cold, layout = len(_cold(rows)), self.cold.layout
        row_moves.make_private(self.cold, row_moves.clip(ranges, 0, n_cold), give_way)
        for recent in row_moves.clip(ranges, n_cold, layout.max_tokens):
            give_way(lambda recent=recent: self.ring.make_ready([recent] * layout.n_layers))  # type: ignore[misc]

    def append_from(
        self, rows: Rows, other: Rows, ranges: Sequence[Range], give_way: GiveWay
    ) -> None:
        """As `RowPages.append_from`; packed rows are copied as they are.

        For that all rows before them are packed first.
        """
        cold, other_cold, n_layers = _cold(rows), _cold(other), self.cold.layout.n_layers
        at, n_cold = len(rows), len(other_cold)
        packed = row_moves.clip(ranges, 0, n_cold)
        recent = row_moves.clip(ranges, n_cold, self.cold.layout.max_tokens)
        n_packed = sum(end - start for start, end in packed)
        rows._make_ready(list(range(n_layers)), at + sum(end - start for start, end in ranges))
        give_way(lambda: self.ring.make_ready([(0, self.ring.layout.max_tokens)] * n_layers))
        if packed:
            self._make_packed_ready(cold, at + n_packed, give_way)
            rows._pack_up_to(at)
        for start, end in packed:
            cold._restore_rows(at, other_cold._copies_of_rows(start, end))
            at += end - start
            cold._set_lengths([at] * n_layers)
        for start, end in recent:
            for layer, (k, v) in enumerate(other._copies_of_rows(start, end)):
                rows._write_rows(layer, at, k, v)
            at += end - start

    def check(self, rows: Rows) -> None:
        """Raise InvariantError if what the module says must hold does not."""
        cold, lengths, ready = _cold(rows), rows.layer_lengths, rows._ready
        cold._check_lengths()
        self.cold.check(cold)
        ranges = list(zip(cold.layer_lengths, lengths, strict=True))
        for layer, (n_cold, length) in enumerate(ranges):
            if not 0 <= length - n_cold < cold.residual_tokens + cold.step_tokens:
                raise InvariantError(f"layer {layer}: {n_cold} of {length} tokens are cold")
            if ready[layer] > length and cold._due(layer, ready[layer]) > cold._ready[layer]:
                raise InvariantError(f"layer {layer}: ready up to {ready}, cold {cold._ready}")
        self.ring.check(ranges)


def _cold(rows: Rows) -> ColdRows:
    cold = rows._cold
    if cold is None:
        raise InvariantError("the sequence has no cold rows")
    return cold
