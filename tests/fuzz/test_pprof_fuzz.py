"""pprof files: any profile comes back, any bytes are a profile or a ValueError."""

import contextlib
import gzip

from hypothesis import example, given
from hypothesis import strategies as st

from pagealloc.observe.pprof import from_pprof, to_pprof
from pagealloc.observe.profiles import Frame, Profile, ValueType

INT64 = st.integers(-(1 << 63), (1 << 63) - 1)
TEXT = st.text(max_size=8)
FRAMES = st.builds(Frame, TEXT, TEXT, st.integers(0, 1 << 40))
VALUE_TYPES = st.lists(st.builds(ValueType, TEXT, TEXT), min_size=1, max_size=4)


@st.composite
def profiles(draw):
    types = tuple(draw(VALUE_TYPES))
    profile = Profile(types, draw(st.builds(ValueType, TEXT, TEXT)), draw(INT64))
    profile.time_ns, profile.duration_ns = draw(INT64), draw(INT64)
    values = st.lists(INT64, min_size=len(types), max_size=len(types))
    stacks = st.lists(FRAMES, max_size=6).map(tuple)
    profile.samples = draw(st.dictionaries(stacks, values, max_size=6))
    return profile


@given(profiles())
def test_any_profile_comes_back(profile):
    assert from_pprof(to_pprof(profile)) == profile


def read(data):
    """Read bytes, which may be refused, in one way only; what is read can be written again."""
    with contextlib.suppress(ValueError):
        profile = from_pprof(data)
        assert from_pprof(to_pprof(profile)).samples == profile.samples


@given(st.binary(max_size=200))
@example(b"\x1f\x8b")
@example(b"\x1f\x8b\x08\x00" + bytes(16))
def test_any_bytes(data):
    read(data)


@given(profiles(), st.data())
def test_mutated_profiles(profile, data):
    """Without gzip, whose checksum would hide what is behind it."""
    message = bytearray(gzip.decompress(to_pprof(profile)))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(message)))
        to = data.draw(st.integers(at, min(at + 12, len(message))))
        message[at:to] = data.draw(st.binary(max_size=12))
    read(bytes(message))
    read(gzip.compress(message))


@given(profiles(), st.data())
def test_mutated_files(profile, data):
    written = bytearray(to_pprof(profile))
    at = data.draw(st.integers(0, len(written) - 1))
    written[at] ^= data.draw(st.integers(1, 255))
    read(bytes(written))


def test_any_prefix_of_a_file():
    profile = Profile((ValueType("space", "bytes"),), ValueType("space", "bytes"), 1)
    profile.add((Frame("f", "a.py", 1), Frame("main", "a.py", 2)), [300])
    message = gzip.decompress(to_pprof(profile))
    for end in range(len(message)):
        read(message[:end])
