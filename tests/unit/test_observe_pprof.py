"""pprof files, written and read: what is kept, what is refused.  Go's own are in tests/servers."""

import gzip
import tracemalloc
import zlib

import pytest

from pagealloc.observe import pprof
from pagealloc.observe.pprof import from_pprof, to_pprof
from pagealloc.observe.profiles import Frame, Profile, ValueType

SPACE = ValueType("inuse_space", "bytes")
OBJECTS = ValueType("inuse_objects", "count")
MAIN = Frame("main", "app.py", 10)
LOAD = Frame("load", "app.py", 20)


def varint(number):
    out = b""
    while number > 127:
        out += bytes([number & 127 | 128])
        number >>= 7
    return out + bytes([number])


def number(field, value):
    return varint(field << 3) + varint(value)


def field(at, data):
    return varint(at << 3 | 2) + varint(len(data)) + data


def peak_bytes(work):
    """Return the most that Python holds at a time during some work."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


STRINGS = b"".join(field(6, text) for text in (b"", b"space", b"bytes", b"f", b"a.py", b"objects"))
TYPE = field(1, number(1, 1) + number(2, 2))
FUNCTION = field(5, number(1, 1) + number(2, 3) + number(4, 4))
LINE = field(4, number(1, 1) + number(2, 7))
LOCATION = field(4, number(1, 1) + LINE)
SAMPLE = field(2, number(1, 1) + number(2, 42))
WHOLE = TYPE + SAMPLE + LOCATION + FUNCTION + STRINGS


def test_a_profile_comes_back():
    profile = Profile((OBJECTS, SPACE), SPACE, 524288, time_ns=1 << 60, duration_ns=3)
    profile.add((LOAD, MAIN), [2, 1 << 40])
    profile.add((MAIN, MAIN), [-1, -(1 << 63)])
    profile.add((), [0, 1])
    data = to_pprof(profile)
    assert from_pprof(data) == profile
    assert from_pprof(gzip.decompress(data)) == profile
    assert to_pprof(profile) == data  # nothing in it depends on when it is written


def test_a_profile_of_nothing_comes_back():
    profile = Profile((SPACE,), SPACE, 1)
    assert from_pprof(to_pprof(profile)) == profile


def test_a_file_name_that_is_no_text_is_written_readably():
    profile = Profile((SPACE,), SPACE, 1)
    profile.add((Frame("f", "caf\udce9.py", 1),), [1])
    assert list(from_pprof(to_pprof(profile)).samples) == [(Frame("f", "caf\\udce9.py", 1),)]


@pytest.mark.parametrize("value", [1 << 63, -(1 << 63) - 1])
def test_a_value_of_more_than_64_bits_is_refused(value):
    profile = Profile((SPACE,), SPACE, 1)
    profile.add((MAIN,), [value])
    with pytest.raises(ValueError, match="64 bits"):
        to_pprof(profile)


def test_a_file_as_others_write_it():
    assert from_pprof(WHOLE).samples == {(Frame("f", "a.py", 7),): [42]}


def test_stacks_that_differ_in_labels_alone_become_one():
    label = field(3, number(1, 1) + number(3, 5))
    sample = field(2, number(1, 1) + number(2, 1) + label)
    assert list(from_pprof(WHOLE + sample).samples.values()) == [[43]]


def test_calls_that_the_compiler_put_into_each_other():
    inner = field(5, number(1, 2) + number(2, 5) + number(4, 4))
    location = field(4, number(1, 9) + field(4, number(1, 2) + number(2, 3)) + LINE)
    sample = field(2, field(1, varint(9) + varint(1)) + field(2, varint(8)))
    outer = Frame("f", "a.py", 7)
    assert from_pprof(WHOLE + inner + location + sample).samples == {
        (outer,): [42],
        (Frame("objects", "a.py", 3), outer, outer): [8],
    }


def test_a_location_without_lines_is_its_address():
    location = field(4, number(1, 2) + number(3, 0xBEEF))
    sample = field(2, number(1, 2) + number(2, 1))
    assert (Frame("0xbeef", ""),) in from_pprof(WHOLE + location + sample).samples


def test_the_default_value_becomes_the_last():
    types = TYPE + field(1, number(1, 5) + number(2, 3))
    sample = field(2, number(1, 1) + field(2, varint(42) + varint(3)))
    last, first = from_pprof(types + sample + LOCATION + FUNCTION + STRINGS).value_types
    assert (last.name, first.name) == ("space", "objects")
    profile = from_pprof(types + sample + LOCATION + FUNCTION + STRINGS + number(14, 1))
    assert [each.name for each in profile.value_types] == ["objects", "space"]
    assert list(profile.samples.values()) == [[3, 42]]


def test_fields_that_are_not_known_are_passed_over():
    strange = number(99, 5) + field(98, b"abc") + varint(97 << 3 | 1) + bytes(8)
    strange += varint(96 << 3 | 5) + bytes(4)
    assert from_pprof(strange + WHOLE).samples == from_pprof(WHOLE).samples


def test_fields_that_are_not_known_are_not_kept():
    data = WHOLE + b"".join(number(at, 5) for at in range(100, 30_000))
    assert peak_bytes(lambda: from_pprof(data)) < 1 << 20


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "first string"),
        (b"hello, world", "not a pprof profile"),
        (STRINGS, "what its values are"),
        (TYPE + STRINGS[2:], "first string"),
        (WHOLE + field(2, number(1, 1)), "has not 1 values"),
        (WHOLE + field(2, number(1, 1) + field(2, b"\1\1")), "has not 1 values"),
        (WHOLE + field(2, number(1, 7) + number(2, 1)), "location 7 is missing"),
        (WHOLE + field(2, number(1, 0) + number(2, 1)), "location 0 is missing"),
        (WHOLE + field(2, field(1, b"\x80") + number(2, 1)), "without an end"),
        (WHOLE + number(2, 1), "a number where bytes belong"),
        (WHOLE + number(6, 1), "a number where bytes belong"),
        (WHOLE + field(9, b"1"), "bytes where a number belongs"),
        (WHOLE + field(4, number(1, 2) + field(4, number(1, 7))), "function 7 is missing"),
        (WHOLE + LOCATION, "number 1 is not one entry's own"),
        (WHOLE + FUNCTION, "number 1 is not one entry's own"),
        (WHOLE + field(5, number(2, 3)), "number 0 is not one entry's own"),
        (WHOLE + field(5, number(1, 2) + number(2, 99)), "string 99 of 6"),
        (WHOLE + field(1, number(1, (1 << 64) - 1)), "string 18446744073709551615 of 6"),
        (WHOLE + field(6, b"\xff"), "decode"),
        (WHOLE + b"\x0b", "kind 3"),
        (WHOLE + b"\x12\x7f\x00", "a field of 127 bytes, of which 1 are there"),
        (WHOLE + b"\x12" + b"\xff" * 9 + b"\x01", "of which 0 are there"),
        (WHOLE + b"\x48" + b"\xff" * 10, "64 bits"),
        (WHOLE + b"\x48\xff", "without an end"),
        (WHOLE + field(2, field(1, b"\xff" * 10 + b"\1") + number(2, 1)), "64 bits"),
    ],
)
def test_damaged_bytes(data, message):
    with pytest.raises(ValueError, match=message):
        from_pprof(data)


def test_damaged_gzip():
    data = gzip.compress(WHOLE)
    for end in range(2, len(data)):
        with pytest.raises(ValueError, match="damaged"):
            from_pprof(data[:end])
    with pytest.raises(ValueError, match="more bytes follow"):
        from_pprof(data + b"\0")
    with pytest.raises(ValueError, match="damaged"):
        from_pprof(data[:-6] + bytes(2) + data[-4:])  # the checksum


def bomb(n_bytes):
    """Gzip of so many bytes of zero."""
    deflater = zlib.compressobj(9, wbits=31)
    piece = bytes(1 << 20)
    pieces = [deflater.compress(piece) for _ in range(n_bytes >> 20)]
    return b"".join(pieces) + deflater.flush()


def test_a_small_file_does_not_become_a_large_one(monkeypatch):
    monkeypatch.setattr(pprof, "MAX_BYTES", 4 << 20)
    data = bomb(64 << 20)

    def read():
        with pytest.raises(ValueError, match="more than 4,194,304 bytes"):
            from_pprof(data)

    assert peak_bytes(read) < 16 << 20
    with pytest.raises(ValueError, match="more than 4,194,304 bytes"):
        from_pprof(bytes((4 << 20) + 1))


def test_a_location_of_many_lines_in_many_stacks_is_refused(monkeypatch):
    monkeypatch.setattr(pprof, "MAX_FRAMES", 1000)
    location = field(4, number(1, 2) + LINE * 100)
    data = TYPE + LOCATION + location + FUNCTION + STRINGS
    stack = field(2, field(1, varint(2) * 10) + number(2, 1))
    assert len(*from_pprof(data + stack).samples) == 1000
    with pytest.raises(ValueError, match="more than 1,000 calls"):
        from_pprof(data + stack + SAMPLE)


@pytest.mark.parametrize(
    ("many", "message"),
    [
        (field(6, b"") * 101, "of field 6"),
        (SAMPLE * 101, "of field 2"),
        (b"".join(field(4, number(1, at) + LINE * 20) for at in range(2, 8)), "100 lines"),
    ],
)
def test_too_many_of_anything(monkeypatch, many, message):
    monkeypatch.setattr(pprof, "MAX_REPEATS", 100)
    with pytest.raises(ValueError, match=message):
        from_pprof(WHOLE + many)
