"""Which bytes and which pages an access touches, known before memory is touched.

Purpose
    Resolve (layer, token range, K or V) to byte spans and page spans, and refuse what would leave
    the layers, the window, or the committed rows.  Every access of a sequence passes here.
Structure
    ::

        (layer, tokens, kv) --row_spans()--> bytes --page_spans()--> pages
        committed pages == pages_of(lengths);  to release == pages_of(now) - pages_of(then)
Invariants
    A row that crosses into the next page of its window is legal; a page belongs to a sequence as
    long as one row of any layer touches it (in `split` order the last K rows and the first V rows
    of a layer may share one).
    In block order a KV block is committed, made private and released whole: its last rows may
    hold no token yet, but its pages exist, so an array over whole blocks never meets a hole.
Units
    Spans are half-open byte offsets from the window's start.
"""

from __future__ import annotations

import operator
from bisect import bisect_right
from typing import TYPE_CHECKING, NamedTuple

from pagealloc.errors import PageBoundaryError
from pagealloc.kv.layer_rows import round_up

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pagealloc.kv.layout import KVLayout

__all__ = [
    "Span",
    "check_layer",
    "check_room",
    "check_rows",
    "covered_end",
    "overlap",
    "page_spans",
    "pages_of",
    "pages_of_rows",
    "pages_to_shift",
    "row_spans",
    "span_of_rows",
    "subtract",
]


class Span(NamedTuple):
    """Bytes ``[start, end)`` of a window."""

    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Length of the span."""
        return self.end - self.start


# --- refusing ---------------------------------------------------------------------------------


def check_layer(layout: KVLayout, layer: int) -> None:
    """Raise PageBoundaryError unless the window has this layer; TypeError for no integer."""
    try:
        layer = operator.index(layer)
    except TypeError:
        raise TypeError(f"layer must be an integer, not {type(layer).__name__}") from None
    if not 0 <= layer < layout.n_layers:
        raise PageBoundaryError(
            f"layer {layer} is outside this window of {layout.n_layers} layers, which ends at "
            f"offset {layout.window_bytes} (page {layout.window_bytes // layout.page_bytes})"
        )


def check_rows(layout: KVLayout, layer: int, start: int, end: int, n_tokens: int) -> None:
    """Raise PageBoundaryError unless tokens [start, end) of a layer lie within its `n_tokens`."""
    check_layer(layout, layer)
    if 0 <= start <= end <= n_tokens:
        return
    if 0 <= end < start:
        raise PageBoundaryError(f"layer {layer}: start {start} lies behind end {end}")
    token = start if start < 0 or start > n_tokens else end - 1
    where = "before the window's first row"
    if token >= 0:
        offset = layout.row_offset(layer, token, 0)
        where = f"at offset {offset} (page {offset // layout.page_bytes})"
    last_end = _end_of_row(layout, layer, n_tokens - 1, 1) if n_tokens else 0
    raise PageBoundaryError(
        f"layer {layer}, token {token} {where} is outside the {n_tokens} committed rows of the "
        f"layer, which end at {last_end if n_tokens else layout.row_offset(layer, 0, 0)}"
    )


def check_room(layout: KVLayout, layer: int, start: int, end: int) -> None:
    """Raise PageBoundaryError unless the window has room for tokens [start, end) of a layer."""
    check_layer(layout, layer)
    if end > layout.max_tokens:
        offset = _end_of_row(layout, layer, layout.max_tokens - 1, 1)
        raise PageBoundaryError(
            f"layer {layer}, token {layout.max_tokens} would lie past the window: {end - start} "
            f"tokens after token {start} were asked, max_tokens={layout.max_tokens} leaves room "
            f"for {layout.max_tokens - start}; the layer ends at offset {offset} "
            f"(page {(offset - 1) // layout.page_bytes})"
        )


# --- resolving --------------------------------------------------------------------------------


def row_spans(layout: KVLayout, layer: int, start: int, end: int, kv: int) -> list[Span]:
    """Return the byte spans from the first to the last row of tokens [start, end).

    One span in layer-major orders, one a KV block in block order.  Between the rows of an
    `interleaved` or `block` span lie the rows of the other kind.
    """
    unit_tokens = layout.block_tokens if layout.order == "block" else layout.max_tokens
    spans = []
    while start < end:
        stop = min(end, (start // unit_tokens + 1) * unit_tokens)
        spans.append(span_of_rows(layout, (layer, kv), start, stop))
        start = stop
    return spans


def span_of_rows(layout: KVLayout, place: tuple[int, int], start: int, end: int) -> Span:
    """Return the bytes from the first to the last row of tokens [start, end) of a (layer, kv)."""
    layer, kv = place
    if start >= end:
        return Span(0, 0)
    return Span(layout.row_offset(layer, start, kv), _end_of_row(layout, layer, end - 1, kv))


def _end_of_row(layout: KVLayout, layer: int, token: int, kv: int) -> int:
    return layout.row_offset(layer, token, kv) + layout.row_bytes(layer, kv)


def page_spans(layout: KVLayout, spans: Iterable[Span]) -> list[Span]:
    """Return the pages that cover `spans`, in ascending order, neighbours merged."""
    page_bytes = layout.page_bytes
    merged: list[Span] = []
    for start, end in sorted(spans):
        first, last = start & -page_bytes, round_up(end, page_bytes)
        if merged and first <= merged[-1].end:
            merged[-1] = Span(merged[-1].start, max(merged[-1].end, last))
        else:
            merged.append(Span(first, last))
    return merged


def pages_of_rows(layout: KVLayout, layer: int, start: int, end: int) -> list[Span]:
    """Return the pages to commit for K and V of tokens [start, end) of a layer."""
    if start >= end:
        return []
    if layout.order == "block":
        first, last = start // layout.block_tokens, layout.n_blocks(end)
        return [Span(first * layout.block_bytes, last * layout.block_bytes)]
    if layout.order == "interleaved":  # K and V lie in one piece
        first = layout.row_offset(layer, start, 0) & -layout.page_bytes
        last = _end_of_row(layout, layer, end - 1, 1)
        return [Span(first, round_up(last, layout.page_bytes))]
    return page_spans(
        layout, [span for kv in (0, 1) for span in row_spans(layout, layer, start, end, kv)]
    )


def pages_of(layout: KVLayout, layer_lengths: Sequence[int]) -> list[Span]:
    """Return all pages that belong to a sequence whose layers have these lengths."""
    if layout.order == "block":
        return pages_of_rows(layout, 0, 0, max(layer_lengths))
    return page_spans(
        layout,
        [
            span
            for layer, n_tokens in enumerate(layer_lengths)
            for span in pages_of_rows(layout, layer, 0, n_tokens)
        ],
    )


def pages_to_shift(
    layout: KVLayout, layer: int, tokens: tuple[int, int], target: int
) -> list[tuple[Span, int]]:
    """Return which pages to map where, so that tokens [start, end) of a layer come to `target`.

    All three lie where a multiple of ``layout.remap_tokens`` does, but for the end, whose last page
    or block moves as a whole.
    """
    start, end = tokens
    if layout.order != "split":
        pages = pages_of_rows(layout, layer, start, end)
        return [(span, layout.row_offset(layer, target, 0)) for span in pages]
    spans = (span_of_rows(layout, (layer, kv), start, end) for kv in (0, 1))
    return [
        (page_spans(layout, [span])[0], layout.row_offset(layer, target, kv))
        for kv, span in enumerate(spans)
    ]


def subtract(spans: Sequence[Span], kept: Sequence[Span]) -> list[Span]:
    """Return what of `spans` lies outside `kept`; both ascending and without overlap."""
    left = []
    position = 0
    for span in spans:
        while position < len(kept) and kept[position].end <= span.start:
            position += 1
        start = span.start
        for index in range(position, len(kept)):
            if kept[index].start >= span.end:
                break
            if kept[index].start > start:
                left.append(Span(start, kept[index].start))
            start = kept[index].end
        if start < span.end:
            left.append(Span(start, span.end))
    return left


def overlap(spans: Sequence[Span], others: Sequence[Span]) -> list[Span]:
    """Return what of `spans` lies in `others`; both ascending and without overlap."""
    return subtract(spans, subtract(spans, others))


def covered_end(layout: KVLayout, layer: int, end: int, spare: Sequence[Span] = ()) -> int:
    """Return up to which token of a layer the pages of its row ``end - 1`` reach.

    Rows up to there need no further page: they fit behind the last one on its page or block, and
    on the pages of `spare` that follow.
    """
    if layout.order == "block":
        reach = _reach(layout.n_blocks(end) * layout.block_bytes, spare)
        covered = reach // layout.block_bytes * layout.block_tokens
    else:
        covered = layout.max_tokens
        rows = layout.layers[layer]
        for kv in (0, 1) if layout.order == "split" else (1,):
            row_end = _end_of_row(layout, layer, end - 1, kv)
            free_bytes = _reach(round_up(row_end, layout.page_bytes), spare) - row_end
            covered = min(covered, end + free_bytes // (rows.v_stride if kv else rows.k_stride))
    return min(covered, layout.max_tokens)


def _reach(offset: int, spare: Sequence[Span]) -> int:
    """Return where the span of `spare` ends that `offset` lies in or at; else `offset`."""
    after = bisect_right(spare, offset, key=_start)
    return max(offset, spare[after - 1].end) if after else offset


def _start(span: Span) -> int:
    return span.start
