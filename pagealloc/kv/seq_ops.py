"""Operations on the tokens of a sequence by position, with llama.cpp's meaning.

Purpose
    rm, cp, add, div and the sliding window: which tokens they mean, and how storage, positions,
    pages and lineage follow, or none of them.
Structure
    A range of positions selects tokens, which may lie anywhere in storage; `row_moves` closes the
    gaps that removing them leaves.
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

from pagealloc.kv import boundary
from pagealloc.kv.conversions import as_stored

if TYPE_CHECKING:
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
    n_dropped = n_over - n_over % seq._pages.remap_tokens
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
    seq._pages.settle(seq, seq._give_way)
    seq._hide_rows(first_dropped)
    try:
        seq._pages.compact(seq, ranges, seq._give_way)
    except BaseException:
        seq._set_lengths([n_before] * seq.cache.layout.n_layers)
        raise
    lengths = [int(kept.sum())] * seq.cache.layout.n_layers
    seq._lineage.keep(n_before, ranges)
    seq._forget_tokens(first_dropped)
    seq._set_positions(positions[kept])
    seq._set_lengths(lengths)
    seq._pages.cut(seq, lengths)


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
    for each in (seq, target):
        each._pages.settle(each, each._give_way)
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
    boundary.check_room(layout, 0, n_there, n_there + n_new)
    target._pages.append_from(target, seq, _ranges(chosen), target._give_way)
    parts = [run for start, end in _ranges(chosen) for run in seq._lineage.part(start, end)]
    target._forget_tokens(n_there)
    target._lineage.runs += parts
    target._lineage.n_settled += n_new
    target._set_positions(np.concatenate([target.positions, seq.positions[chosen]]))
    target._set_lengths([n_there + n_new] * layout.n_layers)


# --- moving positions -------------------------------------------------------------------------


def add(seq: Sequence, p0: int, p1: int, delta: int, *, lossy: bool) -> None:
    """See `Sequence.add`."""
    delta = operator.index(delta)
    _shift(seq, p0, p1, lambda positions: positions + delta, name="add", lossy=lossy)


def divide(seq: Sequence, p0: int, p1: int, d: int, *, lossy: bool) -> None:
    """See `Sequence.div`."""
    d = operator.index(d)
    if d < 1:
        raise ValueError(f"d={d}: at least 1 is possible")
    _shift(seq, p0, p1, lambda positions: positions // d, name="div", lossy=lossy)


def _shift(seq: Sequence, p0: int, p1: int, change: Any, *, name: str, lossy: bool) -> None:
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
    if not lossy and seq._has_packed_k(_ranges(changes)):
        raise ValueError(
            f"{name}() would unpack quantised K rows, rotate them and quantise them again, which "
            "rounds them once more: say lossy=True to accept that"
        )
    seq._pages.settle(seq, seq._give_way)
    seq._pages.make_private(seq, _ranges(changes), seq._give_way)
    _keep(seq, stays)
    _rotate(seq, rope, (after - before)[stays])
    seq._set_positions(after[stays].astype(np.int32))


def _rotate(seq: Sequence, rope: Rope, deltas: npt.NDArray[np.int64]) -> None:
    """Rotate K of each token by its delta, in place; all is computed before any is written."""
    ranges = _ranges(deltas != 0)
    if not ranges:
        return
    layout, n_tokens = seq.cache.layout, len(seq)
    seq._hide_rows(ranges[0][0])
    try:
        seq._pages.make_private(seq, ranges, seq._give_way)
        rotated = []
        for layer in range(layout.n_layers):
            for start, end in ranges:
                rows = rope.rotate(seq._k_values(layer, start, end), deltas[start:end])
                rotated.append((layer, start, as_stored(rows, str(layout.k_dtype))))
        for layer, start, stored in rotated:
            seq._put_k(layer, start, stored)
        seq._lineage.renew(n_tokens, ranges)
        seq._forget_tokens(ranges[0][0])
    finally:
        seq._set_lengths([n_tokens] * layout.n_layers)
