"""Blobs of llama.cpp's states, written and parsed: no llama.cpp needed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagealloc import LlamaStateError
from pagealloc.llama.state_blob import (
    LayerType,
    RecordFormat,
    StateFormat,
    parse_state,
    transpose,
    write_state,
)

SEQUENCE_HEADER = b"\xd8\x3c\x14\xaf\x00\x00\x00\x00"
CONTEXT_HEADER = b"\x05\x00\x00\x00llama"


@st.composite
def records(draw):
    is_transposed = draw(st.booleans())
    n_layers = draw(st.integers(1, 4))
    rows = st.integers(1, 40).map(lambda n: 2 * n)
    n_streams = draw(st.integers(1, 4))
    return RecordFormat(
        n_streams,
        draw(st.integers(0, n_streams - 1)),
        is_transposed,
        tuple(LayerType(draw(st.integers(0, 40)), draw(rows)) for _ in range(n_layers)),
        tuple(LayerType(1, draw(rows), 2 if is_transposed else 0) for _ in range(n_layers)),
    )


@st.composite
def states(draw):
    """A blob with rows of any bytes, its format, and where these lie."""
    header = draw(st.sampled_from((SEQUENCE_HEADER, CONTEXT_HEADER)))
    state_format = StateFormat(
        header, tuple(draw(records()) for _ in range(draw(st.integers(1, 2))))
    )
    positions = [
        np.array(draw(st.permutations(range(n))), np.int32)
        for n in (draw(st.integers(1, 20)) for _ in state_format.records)
    ]
    n_bytes = state_format.nbytes([len(each) for each in positions])
    blob = np.random.default_rng(draw(st.integers(0, 99))).integers(0, 256, n_bytes, np.uint8)
    places = write_state(state_format, blob, positions)
    return blob, state_format, places


@given(states())
def test_what_was_written_is_parsed(state):
    blob, state_format, places = state
    parsed_format, parsed_places = parse_state(blob)
    assert parsed_format == state_format
    for parsed, place in zip(parsed_places, places, strict=True):
        assert (parsed.k, parsed.v) == (place.k, place.v)
        assert parsed.positions.tolist() == place.positions.tolist()


@given(states())
def test_rows_lie_apart_and_fill_the_blob(state):
    blob, state_format, places = state
    owners = np.zeros(len(blob), np.uint8)
    n_rows_bytes = 0
    for record, place in zip(state_format.records, places, strict=True):
        for kind, at in zip((*record.k, *record.v), (*place.k, *place.v), strict=True):
            owners[at : at + kind.row_bytes * len(place.positions)] += 1
            n_rows_bytes += kind.row_bytes * len(place.positions)
    assert owners.max() == 1
    assert owners.sum() == n_rows_bytes


@given(states(), st.data())
def test_a_truncated_state_is_refused(state, data):
    blob, state_format, _ = state
    n_bytes = data.draw(st.integers(0, len(blob) - 1))
    if len(state_format.records) == 2:  # cut between the records it would be a state of one
        first = StateFormat(state_format.header, state_format.records[:1])
        n_cells = len(parse_state(blob)[1][0].positions)
        if n_bytes == first.nbytes([n_cells]):
            return
    with pytest.raises(LlamaStateError):
        parse_state(blob[:n_bytes])
    with pytest.raises(LlamaStateError):
        parse_state(blob[:n_bytes].tobytes(), any_sequences=True)


@given(states(), st.data())
def test_flipped_bits_are_refused_or_in_rows(state, data):
    blob, _, _ = state
    at = data.draw(st.integers(0, len(blob) - 1))
    blob[at] ^= 1 << data.draw(st.integers(0, 7))
    try:
        parsed, places = parse_state(blob)
    except LlamaStateError:
        return
    n_cells = [len(place.positions) for place in places]
    assert parsed.nbytes(n_cells) == len(blob)


@given(st.binary(max_size=200))
def test_any_bytes(blob):
    with pytest.raises(LlamaStateError):
        parse_state(blob)


@pytest.mark.parametrize(
    ("blob", "reason"),
    [
        (b"", "truncated"),
        (b"ggml" + bytes(40), "neither"),
        (SEQUENCE_HEADER, "no record"),
        (SEQUENCE_HEADER + bytes(4), "no tokens"),
        (SEQUENCE_HEADER + b"\x01" + bytes(7), "no tokens"),
        (SEQUENCE_HEADER + b"\x01\0\0\0\xff\xff\xff\xff", "the cells"),
        (SEQUENCE_HEADER + b"\xff\xff\0\0", "streams"),
    ],
)
def test_reasons(blob, reason):
    with pytest.raises(LlamaStateError, match=reason):
        parse_state(blob)


def test_cells_of_several_sequences():
    record = RecordFormat(1, 0, False, (LayerType(1, 4),), (LayerType(1, 4),))
    state_format = StateFormat(SEQUENCE_HEADER, (record,))
    blob = bytearray(state_format.nbytes([2]))
    write_state(state_format, blob, [np.arange(2, dtype=np.int32)])
    second = 8 + 4 + 4 + 12
    assert blob[second : second + 12] == b"\x01\0\0\0\x01\0\0\0\0\0\0\0"
    blob[second + 4] = 2
    blob[second + 12 : second + 12] = b"\x05\0\0\0"  # its other sequence
    with pytest.raises(LlamaStateError, match="of 2 sequences"):
        parse_state(blob)
    _, places = parse_state(blob, any_sequences=True)
    assert places[0].positions.tolist() == [0, 1]
    assert places[0].k[0] == state_format.nbytes([2]) - 16 - 12 + 4


def test_a_buffer_of_another_length():
    record = RecordFormat(1, 0, False, (LayerType(1, 4),), (LayerType(1, 4),))
    state_format = StateFormat(SEQUENCE_HEADER, (record,))
    with pytest.raises(ValueError, match="a buffer of 10 bytes"):
        write_state(state_format, bytearray(10), [np.arange(2, dtype=np.int32)])


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
@given(
    shape=st.tuples(st.integers(0, 40), st.integers(0, 40)), first=st.integers(0, 9), pad=st.just(3)
)
def test_transposing(dtype, shape, first, pad):
    n_rows, n_columns = shape
    random = np.random.default_rng(0)
    source = random.integers(0, 60000, (n_rows, first + n_columns + pad)).astype(dtype)
    part = source[:, first : first + n_columns]
    target = np.full((n_columns, n_rows + pad), 7, dtype)
    transpose(part, target[:, :n_rows])
    assert np.array_equal(target[:, :n_rows], part.T)
    assert (target[:, n_rows:] == 7).all()


def test_what_cannot_be_transposed():
    values = np.zeros((4, 6), np.uint16)
    with pytest.raises(ValueError, match="is not the transpose"):
        transpose(values, np.zeros((4, 6), np.uint16))
    with pytest.raises(ValueError, match="neighbours"):
        transpose(values[:, ::2], np.zeros((3, 4), np.uint16))
