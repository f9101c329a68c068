"""Operations on the tokens of a sequence by position, with llama.cpp's meaning.

Purpose
    rm, cp, add, div and the sliding window: which tokens they mean, and how storage, positions,
    pages and lineage follow, or none of them.
Structure
    A range of positions selects tokens, which may lie anywhere in storage.  Removing keeps the
    others as *runs* of tokens, each of which moves towards the start::

        kept       [0, 4)            [20, 90)                 rm of 16 tokens
        target     [0, 4)  [4, 74)

    One run that moves by whole pages of every layer is mapped there (`remap_rows`), but for the
    rows before the first whole page; otherwise rows are moved (`move_rows`).
Invariants
    while rows are on the move the sequence shows none of them, so no reader meets half of it
    whatever fails leaves the sequence as it was
Source
    llama.cpp, ``llama_memory_seq_rm`` and its siblings: a negative p0 is 0, a negative p1 no end,
    an empty range does nothing.
Units
    Tokens by their place in storage, unless called positions.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import numpy as np

from pagealloc.errors import OutOfMemoryError
from pagealloc.kv import boundary
from pagealloc.kv.pressure import with_room

if TYPE_CHECKING:
    from collections.abc import Sequence as List

    import numpy.typing as npt

    from pagealloc.kv.rope import Rope
    from pagealloc.kv.sequence import Sequence

__all__ = ["add", "copy", "divide", "remove", "slide"]

# ruff: noqa: SLF001  these are methods of Sequence, in a room of their own

Range = tuple[int, int]

MAX_POSITION = 2**31 - 1


# --- which tokens -----------------------------------------------------------------------------


def _selected(seq: Sequence, p0: int, p1: int) -> npt.NDArray[np.bool_]:
    """Return which tokens lie at positions [p0, p1): shape (T,)."""
    first, end = operator.index(p0), operator.index(p1)
    positions = seq.positions
    found = positions >= max(first, 0)
    return found if end < 0 else found & (positions < end)


def _ranges(mask: npt.NDArray[np.bool_]) -> list[Range]:
    """Return the runs of True in a mask, as ascending ranges of tokens."""
    edges = np.flatnonzero(np.diff(mask, prepend=False, append=False))
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]


# --- removing ---------------------------------------------------------------------------------


def remove(seq: Sequence, p0: int, p1: int) -> bool:
    """See `Sequence.rm`."""
    seq._check_writable()
    seq._equal_length("remove tokens")
    _keep(seq, ~_selected(seq, p0, p1))
    return True


def slide(seq: Sequence, window_tokens: int, sink_tokens: int) -> int:
    """See `Sequence.slide`."""
    seq._check_writable()
    window_tokens, sink_tokens = operator.index(window_tokens), operator.index(sink_tokens)
    if window_tokens < 0 or sink_tokens < 0:
        raise ValueError(
            f"window_tokens={window_tokens}, sink_tokens={sink_tokens}: neither may be negative"
        )
    n_over = seq._equal_length("slide") - sink_tokens - window_tokens
    n_dropped = n_over - n_over % seq.cache.layout.remap_tokens
    if n_dropped <= 0:
        return 0
    kept = np.ones(len(seq), np.bool_)
    kept[sink_tokens : sink_tokens + n_dropped] = False
    _keep(seq, kept)
    return n_dropped


def _keep(seq: Sequence, kept: npt.NDArray[np.bool_]) -> None:
    """Drop all tokens but some, and close the gaps."""
    if kept.all():
        return
    n_before, ranges = len(seq), _ranges(kept)
    first_dropped = int(kept.argmin())
    positions = seq.positions
    seq._hide_rows(first_dropped)
    try:
        _compact(seq, ranges)
    except BaseException:
        seq._set_lengths([n_before] * seq.cache.layout.n_layers)
        raise
    n_kept = int(kept.sum())
    seq._lineage.keep(n_before, ranges)
    seq._set_positions(positions[kept])
    seq._set_lengths([n_kept] * seq.cache.layout.n_layers)
    seq._pages.cut(seq, n_kept)


def _compact(seq: Sequence, ranges: List[Range]) -> None:
    """Move the rows of ascending ranges together, all or nothing."""
    moves, target = [], 0
    for start, end in ranges:
        if start != target:
            moves.append((start, end, target))
        target += end - start
    if not moves:
        return
    if len(moves) == 1 and _remap(seq, *moves[0]):
        return
    _make_private(seq, [(moves[0][2], target)])
    for start, end, to in moves:  # nothing fails from here on
        seq._move_rows(start, end, to)


def _remap(seq: Sequence, start: int, end: int, target: int) -> bool:
    """Bring tokens [start, end) to `target` by mapping their pages there; False if that can't be.

    The rows before the first whole page are copied: fewer than `remap_tokens` tokens, to where
    rows were dropped, and put back if the kernel refuses.
    """
    layout = seq.cache.layout
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
        _make_private(seq, [(target, target + n_head)])
        saved = seq._copies_of_rows(target, target + n_head)
        seq._move_rows(start, start + n_head, target)
    try:
        seq._window.move_pages(moves)
    except (OutOfMemoryError, OSError):
        if n_head:
            seq._restore_rows(target, saved)
        return False
    return True


# --- copying ----------------------------------------------------------------------------------


def copy(seq: Sequence, target: Sequence, p0: int, p1: int) -> None:
    """See `Sequence.cp`."""
    if not isinstance(target, type(seq)):
        raise TypeError(f"target must be a Sequence, not {type(target).__name__}")
    if target.cache is not seq.cache:
        raise ValueError("target belongs to another cache: nothing is shared across caches")
    seq._check_writable()
    target._check_writable()
    if target is seq:
        return
    n_tokens = seq._equal_length("copy tokens")
    n_there = target._equal_length("copy tokens to it")
    chosen = _selected(seq, p0, p1)
    if not chosen.any():
        return
    if n_there == 0:
        _share_chosen(seq, target, chosen)
        return
    seq._lineage.settle(n_tokens)
    target._lineage.settle(n_there)
    chosen &= ~_known(seq, target)
    _append_chosen(seq, target, chosen)


def _share_chosen(seq: Sequence, target: Sequence, chosen: npt.NDArray[np.bool_]) -> None:
    """Give an empty sequence some tokens: share all up to the last, and drop the others."""
    end = int(np.flatnonzero(chosen)[-1]) + 1
    try:
        seq._share_into(target, end)
        _keep(target, chosen[:end])
    except BaseException:
        target._cut(0)
        raise


def _known(seq: Sequence, target: Sequence) -> npt.NDArray[np.bool_]:
    """Return which tokens of `seq` are tokens of `target` as well; both are settled."""
    known = np.zeros(len(seq), np.bool_)
    position = 0
    for run in seq._lineage.runs:
        for other in target._lineage.runs:
            if other.origin == run.origin:
                start = max(other.first - run.first, 0)
                end = min(other.first + other.n_tokens - run.first, run.n_tokens)
                if start < end:
                    known[position + start : position + end] = True
        position += run.n_tokens
    return known


def _append_chosen(seq: Sequence, target: Sequence, chosen: npt.NDArray[np.bool_]) -> None:
    n_there, n_new = len(target), int(chosen.sum())
    if not n_new:
        return
    layout = seq.cache.layout
    target._make_ready(list(range(layout.n_layers)), n_there + n_new)
    at = n_there
    for start, end in _ranges(chosen):
        target._restore_rows(at, seq._copies_of_rows(start, end))
        at += end - start
    parts = [run for start, end in _ranges(chosen) for run in seq._lineage.part(start, end)]
    target._lineage.runs += parts
    target._lineage.n_settled += n_new
    target._set_positions(np.concatenate([target.positions, seq.positions[chosen]]))
    target._set_lengths([n_there + n_new] * layout.n_layers)


# --- moving positions -------------------------------------------------------------------------


def add(seq: Sequence, p0: int, p1: int, delta: int) -> None:
    """See `Sequence.add`."""
    delta = operator.index(delta)
    _shift(seq, p0, p1, lambda positions: positions + delta, "add")


def divide(seq: Sequence, p0: int, p1: int, d: int) -> None:
    """See `Sequence.div`."""
    d = operator.index(d)
    if d < 1:
        raise ValueError(f"d={d}: at least 1 is possible")
    _shift(seq, p0, p1, lambda positions: positions // d, "div")


def _shift(seq: Sequence, p0: int, p1: int, change: Any, name: str) -> None:
    """Give the tokens at positions [p0, p1) others, and rotate K by as much."""
    seq._check_writable()
    seq._equal_length("change positions")
    before = seq.positions.astype(np.int64)
    after = np.where(_selected(seq, p0, p1), change(before), before)
    if (after == before).all():
        return
    rope = seq.cache.layout.rope
    if rope is None:
        raise ValueError(
            f"{name}() rotates K to its new positions, and the layout does not say how: give "
            "KVLayout(..., rope=Rope(n_dims=..., base=...))"
        )
    if after.max() > MAX_POSITION:
        raise ValueError(f"position {after.max()} is too large: at most {MAX_POSITION}")
    stays = after >= 0
    changes = stays & (after != before)
    _make_private(seq, _ranges(changes))
    _keep(seq, stays)
    _rotate(seq, rope, (after - before)[stays])
    seq._set_positions(after[stays].astype(np.int32))


def _make_private(seq: Sequence, ranges: List[Range]) -> None:
    """Copy the shared pages of these tokens; their rows stay the same."""
    layout = seq.cache.layout
    spans = [
        span
        for layer in ([0] if layout.order == "block" else range(layout.n_layers))
        for start, end in ranges
        for span in boundary.pages_of_rows(layout, layer, start, end)
    ]

    def request() -> None:
        for span in spans:
            seq._window.make_private(span.start, span.nbytes)

    with_room(seq.cache, [seq], request)


def _rotate(seq: Sequence, rope: Rope, deltas: npt.NDArray[np.int64]) -> None:
    """Rotate K of each token by its delta, in place; all is computed before any is written."""
    ranges = _ranges(deltas != 0)
    if not ranges:
        return
    layout, n_tokens = seq.cache.layout, len(seq)
    dtype = str(layout.k_dtype)
    seq._hide_rows(ranges[0][0])
    try:
        _make_private(seq, ranges)
        rotated = []
        for layer in range(layout.n_layers):
            for start, end in ranges:
                rows = _as_float32(seq._copy_of_rows(layer, 0, start, end), dtype)  # (T, H, D)
                rows = rope.rotate(rows, deltas[start:end])
                rotated.append((layer, start, _as_stored(rows, dtype)))
        for layer, start, stored in rotated:
            seq._restore(layer, 0, start, stored)
        seq._lineage.renew(n_tokens, ranges)
    finally:
        seq._set_lengths([n_tokens] * layout.n_layers)


def _as_float32(rows: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.float32]:
    if dtype == "bfloat16":
        return (rows.astype(np.uint32) << 16).view(np.float32)
    return rows.astype(np.float32)


def _as_stored(rows: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[Any]:
    if dtype == "bfloat16":  # to nearest, ties to even
        bits = np.ascontiguousarray(rows).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return rows.astype(dtype)
