"""Byte counts as people write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagealloc.units import MAX_BYTES, format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("1", 1),
        ("64KiB", 65536),
        (" 1.5 GiB ", 3 << 29),
        ("500MB", 500_000_000),
        ("2gib", 2 << 30),
        ("0.1KiB", 102),
        ("128TiB", 1 << 47),
    ],
)
def test_texts(text, nbytes):
    assert parse_bytes(text) == nbytes


@given(st.integers(1, MAX_BYTES))
def test_integers_pass_unchanged(nbytes):
    assert parse_bytes(nbytes) == parse_bytes(str(nbytes)) == nbytes


@pytest.mark.parametrize("bad", ["", "x", "64 KiBs", "-1", "1e3", "KiB", "1,5GiB", "0", 0, -5])
def test_no_size_is_a_value_error_that_names_the_argument(bad):
    with pytest.raises(ValueError, match="budget_bytes="):
        parse_bytes(bad, name="budget_bytes")


@pytest.mark.parametrize("bad", [1.5, None, True, b"1", [1]])
def test_other_types_are_type_errors(bad):
    with pytest.raises(TypeError, match="nbytes must be"):
        parse_bytes(bad)


@pytest.mark.parametrize("bad", [MAX_BYTES + 1, 2**64, 2**200, "129TiB"])
def test_what_no_address_space_holds_is_refused_with_the_limit(bad):
    with pytest.raises(ValueError, match="128 TiB"):
        parse_bytes(bad)


@given(st.integers(0, MAX_BYTES))
def test_formatted_sizes_read_back_within_a_percent(nbytes):
    assert abs(parse_bytes(format_bytes(nbytes), minimum=0) - nbytes) <= nbytes * 0.01
