"""The spans of `boundary` against a byte-by-byte model."""

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagealloc.errors import PageBoundaryError
from pagealloc.kv import KVLayout, boundary
from pagealloc.kv.boundary import Span

ORDERS = ("interleaved", "split", "block")


def per_layer(numbers):
    """One number, or one a layer."""
    return st.one_of(numbers, st.lists(numbers, min_size=3, max_size=3))


layouts = st.builds(
    KVLayout,
    n_layers=st.just(3),
    n_kv_heads=per_layer(st.integers(1, 3)),
    head_dim=per_layer(st.integers(1, 200)),
    v_head_dim=st.none() | st.integers(1, 200),
    max_tokens=st.integers(1, 60),
    k_dtype=st.sampled_from(("float16", "float32")),
    v_dtype=st.sampled_from(("float16", "float32")),
    order=st.sampled_from(ORDERS),
    block_tokens=st.integers(1, 9),
    page_bytes=st.sampled_from((512, 4096, 16384, 65536)),
    pad_rows=st.booleans(),
)


def row_bytes_of(layout, layer, tokens):
    """Every byte of the rows of some tokens, K and V, one by one."""
    return {
        layout.offset(layer, token, kv) + byte
        for token in tokens
        for kv in (0, 1)
        for byte in range(layout.row_bytes(layer, kv))
    }


def model_pages(layout, layer_lengths):
    """The pages that belong to a sequence, counted row by row."""
    page_bytes = layout.page_bytes
    if layout.order == "block":
        n_blocks = layout.n_blocks(max(layer_lengths))
        return set(range(n_blocks * layout.block_bytes // page_bytes))
    pages = set()
    for layer, n_tokens in enumerate(layer_lengths):
        for token in range(n_tokens):
            for kv in (0, 1):
                first = layout.offset(layer, token, kv)
                last = first + layout.row_bytes(layer, kv) - 1
                pages |= set(range(first // page_bytes, last // page_bytes + 1))
    return pages


def pages_in(layout, spans):
    pages = [
        page
        for span in spans
        for page in range(span.start // layout.page_bytes, span.end // layout.page_bytes)
    ]
    assert len(pages) == len(set(pages))
    assert all(
        span.start % layout.page_bytes == span.end % layout.page_bytes == 0 for span in spans
    )
    assert all(a.end < b.start for a, b in pairwise(spans))
    return set(pages)


@st.composite
def layouts_and_lengths(draw):
    layout = draw(layouts)
    lengths = st.lists(
        st.integers(0, layout.max_tokens), min_size=layout.n_layers, max_size=layout.n_layers
    )
    return layout, draw(lengths), draw(lengths)


@given(layouts_and_lengths())
def test_pages_of_a_sequence(case):
    layout, lengths, _ = case
    assert pages_in(layout, boundary.pages_of(layout, lengths)) == model_pages(layout, lengths)


@given(layouts_and_lengths())
def test_pages_to_release(case):
    layout, lengths, others = case
    kept = [min(pair) for pair in zip(lengths, others, strict=True)]
    released = boundary.subtract(
        boundary.pages_of(layout, lengths), boundary.pages_of(layout, kept)
    )
    expected = model_pages(layout, lengths) - model_pages(layout, kept)
    assert pages_in(layout, released) == expected


@given(layouts_and_lengths(), st.data())
def test_row_spans_are_the_rows(case, data):
    layout, _, _ = case
    layer = data.draw(st.integers(0, layout.n_layers - 1))
    start = data.draw(st.integers(0, layout.max_tokens))
    end = data.draw(st.integers(start, layout.max_tokens))
    spans = [boundary.row_spans(layout, layer, start, end, kv) for kv in (0, 1)]
    covered = {byte for both in spans for span in both for byte in range(*span)}
    rows = row_bytes_of(layout, layer, range(start, end))
    assert covered >= rows
    assert layout.pad_rows or covered == rows
    for kv, of_kind in enumerate(spans):
        if of_kind:
            assert of_kind[0].start == layout.offset(layer, start, kv)
            assert of_kind[-1].end == layout.offset(layer, end - 1, kv) + layout.row_bytes(
                layer, kv
            )
    pages = pages_in(layout, boundary.page_spans(layout, spans[0] + spans[1]))
    assert pages == {byte // layout.page_bytes for byte in rows}
    assert pages <= pages_in(layout, boundary.pages_of_rows(layout, layer, start, end))


@given(layouts_and_lengths(), st.data())
def test_covered_end_needs_no_further_page(case, data):
    layout, _, _ = case
    layer = data.draw(st.integers(0, layout.n_layers - 1))
    end = data.draw(st.integers(1, layout.max_tokens))
    pages = pages_in(layout, boundary.pages_of_rows(layout, layer, 0, end))
    covered = boundary.covered_end(layout, layer, end)
    assert end <= covered <= layout.max_tokens
    assert pages_in(layout, boundary.pages_of_rows(layout, layer, 0, covered)) == pages
    if covered < layout.max_tokens and layout.order != "split":
        assert pages_in(layout, boundary.pages_of_rows(layout, layer, 0, covered + 1)) != pages


def test_no_rows_are_no_pages():
    layout = KVLayout(2, 1, 8, 64)
    assert boundary.pages_of(layout, [0, 0]) == []
    assert boundary.row_spans(layout, 0, 5, 5, 0) == []
    assert boundary.pages_of_rows(layout, 1, 5, 5) == []


def test_split_halves_may_share_a_page():
    """100 K rows of 384 bytes end within a page, and the first V row starts right there."""
    layout = KVLayout(1, 3, 64, 100, order="split", page_bytes=4096)
    assert layout.offset(0, 0, 1) == 38400  # page 9 holds K rows 96 to 99 and V rows 0 to 6
    now, then = boundary.pages_of(layout, [100]), boundary.pages_of(layout, [5])
    assert then == [Span(0, 4096), Span(36864, 40960)]
    assert boundary.subtract(now, then) == [Span(4096, 36864), Span(40960, 77824)]


def test_a_row_may_cross_into_the_next_page():
    layout = KVLayout(1, 3, 64, 100, page_bytes=4096)
    row = boundary.row_spans(layout, 0, 5, 6, 0)
    assert row == [Span(3840, 4224)]
    assert boundary.page_spans(layout, row) == [Span(0, 8192)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("layer", "start", "end"), [(0, 0, 11), (0, 11, 12), (0, -1, 3), (2, 0, 1), (-1, 0, 1)]
)
def test_rows_outside_are_refused(order, layer, start, end):
    layout = KVLayout(2, 3, 64, 100, order=order)
    with pytest.raises(PageBoundaryError, match=rf"layer {layer}\b"):
        boundary.check_rows(layout, layer, start, end, 10)


def test_the_message_names_layer_token_offset_page_and_end():
    layout = KVLayout(2, 3, 64, 100, page_bytes=4096)
    with pytest.raises(PageBoundaryError) as info:
        boundary.check_rows(layout, 1, 0, 21, 10)
    base = layout.layers[1].base
    offset = base + 20 * 768
    numbers = [int(number) for number in re.findall(r"\d+", str(info.value))]
    assert numbers == [1, 20, offset, offset // 4096, 10, base + 10 * 768]
    assert isinstance(info.value, IndexError)


@pytest.mark.parametrize("order", ORDERS)
def test_a_full_window_is_refused(order):
    layout = KVLayout(2, 3, 64, 100, order=order)
    boundary.check_room(layout, 1, 90, 100)
    with pytest.raises(PageBoundaryError, match=r"11 tokens after token 90 .* room for 10"):
        boundary.check_room(layout, 1, 90, 101)
    with pytest.raises(PageBoundaryError, match="layer 2"):
        boundary.check_room(layout, 2, 0, 1)


@pytest.mark.parametrize("order", ORDERS)
def test_rows_inside_are_not_refused(order):
    layout = KVLayout(2, 3, 64, 100, order=order)
    for start, end in ((0, 10), (10, 10), (0, 0), (3, 4)):
        boundary.check_rows(layout, 1, start, end, 10)
