"""pprof files: profiles as ``go tool pprof`` reads them, written and read.

Purpose
    A gzipped protocol buffer of a few kinds of messages; of these the fields that a profile needs.
Structure
    ::

        Profile --_Writer: numbers strings, functions, locations--> message --gzip--> file
        file --_inflated--> message --_fields--> tables by number --_Reader--> Profile
Invariants
    Strings are numbered from 0, which is the empty one; functions and locations from 1.  Whatever
    bytes are read, the answer is a profile or a ValueError, and takes memory within the bounds
    below: a short file may not claim a long one's.
Source
    github.com/google/pprof, proto/profile.proto.
"""

from __future__ import annotations

import gzip
import zlib
from itertools import islice
from typing import TYPE_CHECKING

from pagealloc.observe.profiles import Frame, Profile, ValueType

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["from_pprof", "to_pprof"]

LAST_FIELD = 14
"""Of those known here, in any message; newer ones are passed over."""
MAX_BYTES = 64 << 20
"""Of a profile that is read, once it is not compressed any more."""
MAX_REPEATS = 1 << 20
"""Stacks in it, or strings, functions, lines."""
MAX_FRAMES = 1 << 24
"""In all its stacks together: a location of many lines may be in many of them."""

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
WITHOUT_END = "a number without an end"
TOO_LONG = "a number of more than 64 bits"
MASK_64 = (1 << 64) - 1

Fields = dict[int, list[int | bytes]]
"""A message's values by field number: numbers, or the bytes of texts and inner messages."""


def to_pprof(profile: Profile) -> bytes:
    """Return a profile as the bytes of a ``.pb.gz`` file.

    Raises
    ------
    ValueError
        A value does not fit into 64 bits.
    """
    return gzip.compress(_Writer(profile).message(), compresslevel=6, mtime=0)


def from_pprof(data: bytes) -> Profile:
    """Return the profile of a file's bytes, compressed or not.

    Labels and mappings are not kept; stacks that differ in nothing else become one.  If the file
    names a value as its default, that one becomes the last.

    Raises
    ------
    ValueError
        It is no profile, a damaged one, or too large a one.
    """
    try:
        return _Reader(_message(_inflated(data))).profile()
    except (ValueError, zlib.error) as error:
        raise ValueError(f"not a pprof profile, or a damaged one: {error}") from error


# --- writing --------------------------------------------------------------------------------------


class _Writer:
    """Numbers strings, functions and locations as they come."""

    def __init__(self, profile: Profile) -> None:
        self._profile = profile
        self._strings: dict[str, int] = {"": 0}
        self._functions: dict[tuple[str, str], int] = {}
        self._locations: dict[Frame, bytes] = {}  # as stacks name them

    def message(self) -> bytes:
        profile = self._profile
        parts = [_field(1, self._value_type(each)) for each in profile.value_types]
        for stack, values in profile.samples.items():
            at = b"".join(map(self._location, stack))
            counted = b"".join(_varint(value) for value in values)
            parts.append(_field(2, _field(1, at) + _field(2, counted)))
        # One mapping, which says that names and lines are there: else pprof looks for a binary.
        parts.append(_field(3, b"".join(_number(field, 1) for field in (1, 7, 8, 9))))
        for number, frame in enumerate(self._locations, 1):
            function = self._functions[frame.function, frame.file]
            line = _number(1, function) + _number(2, frame.line)
            parts.append(_field(4, _number(1, number) + _number(2, 1) + _field(4, line)))
        for (name, file), number in self._functions.items():
            # No system name: were it the same, pprof would unmangle it, as C++, and lose <module>.
            names = _number(2, self._string(name)) + _number(4, self._string(file))
            parts.append(_field(5, _number(1, number) + names))
        parts.append(_number(9, profile.time_ns) + _number(10, profile.duration_ns))
        parts.append(_field(11, self._value_type(profile.period_type)))
        parts.append(_number(12, profile.period))
        parts.append(_number(14, self._string(profile.value_types[-1].name)))
        # A file name may hold bytes that are no text, as os.fsdecode keeps them.
        parts += [_field(6, text.encode(errors="backslashreplace")) for text in self._strings]
        return b"".join(parts)

    def _string(self, text: str) -> int:
        return self._strings.setdefault(text, len(self._strings))

    def _value_type(self, value_type: ValueType) -> bytes:
        return _number(1, self._string(value_type.name)) + _number(2, self._string(value_type.unit))

    def _location(self, frame: Frame) -> bytes:
        known = self._locations.get(frame)
        if known is None:
            self._functions.setdefault((frame.function, frame.file), len(self._functions) + 1)
            known = self._locations[frame] = _varint(len(self._locations) + 1)
        return known


def _varint(value: int) -> bytes:
    if not -(1 << 63) <= value < 1 << 63:
        raise ValueError(f"{value} does not fit into the 64 bits of a pprof file")
    value &= MASK_64
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3 | VARINT) + _varint(value)


def _field(field: int, data: bytes) -> bytes:
    return _varint(field << 3 | BYTES) + _varint(len(data)) + data


# --- reading: bytes -> fields ---------------------------------------------------------------------


def _inflated(data: bytes) -> bytes:
    if data[:2] == b"\x1f\x8b":
        inflater = zlib.decompressobj(wbits=31)  # with gzip's header and checksum
        data = inflater.decompress(data, MAX_BYTES + 1)
        if len(data) <= MAX_BYTES and not inflater.eof:
            raise ValueError("its end is missing")
        if inflater.unused_data:
            raise ValueError("more bytes follow its end")
    if len(data) > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES:,} bytes")
    return data


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield the number and value of each field of a message."""
    at = 0
    while at < len(data):
        key, at = _read_varint(data, at)
        field, kind = key >> 3, key & 7
        if kind == VARINT:
            value, at = _read_varint(data, at)
            yield field, value
            continue
        if kind == BYTES:
            n_bytes, at = _read_varint(data, at)
        elif kind in (FIXED64, FIXED32):
            n_bytes = 8 if kind == FIXED64 else 4
        else:
            raise ValueError(f"a field of kind {kind}")
        if n_bytes > len(data) - at:
            raise ValueError(f"a field of {n_bytes} bytes, of which {len(data) - at} are there")
        yield field, data[at : at + n_bytes]
        at += n_bytes


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 64, 7):
        if at == len(data):
            raise ValueError(WITHOUT_END)
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value & MASK_64, at
    raise ValueError(TOO_LONG)


def _message(data: int | bytes) -> Fields:
    fields: Fields = {}
    for field, value in _fields(_bytes(data)):
        if field > LAST_FIELD:
            continue
        values = fields.setdefault(field, [])
        values.append(value)
        if len(values) > MAX_REPEATS:
            raise ValueError(f"more than {MAX_REPEATS:,} of field {field}")
    return fields


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number where bytes belong")  # noqa: TRY004  # damaged data
    return value


def _one(fields: Fields, field: int) -> int:
    """Return a field's number, which is 0 if it is not there."""
    value = fields.get(field, [0])[-1]
    if not isinstance(value, int):
        raise ValueError("bytes where a number belongs")  # noqa: TRY004  # damaged data
    return value


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _numbers(fields: Fields, field: int) -> Iterator[int]:
    """Yield repeated numbers, packed or not: most of a file, so not by _read_varint."""
    for value in fields.get(field, []):
        if isinstance(value, int):
            yield value
            continue
        number = shift = 0
        for byte in value:
            number |= (byte & 127) << shift
            if byte < 128:
                yield number & MASK_64
                number = shift = 0
                continue
            shift += 7
            if shift > 63:
                raise ValueError(TOO_LONG)
        if shift:
            raise ValueError(WITHOUT_END)


# --- reading: fields -> profile -------------------------------------------------------------------


class _Reader:
    """Looks up what messages name by number: strings, functions, locations."""

    def __init__(self, fields: Fields) -> None:
        self._fields = fields
        self._n_frames_left = MAX_FRAMES
        self._strings = [_bytes(text).decode() for text in fields.get(6, [])]
        if self._strings[:1] != [""]:
            raise ValueError("its first string is not the empty one")
        self._functions: dict[int, tuple[str, str]] = {}
        n_lines = 0
        for number, parts in self._numbered(5):
            name = self._string(parts, 2) or self._string(parts, 3)
            self._functions[number] = name, self._string(parts, 4)
        self._locations: dict[int, tuple[Frame, ...]] = {}
        for number, parts in self._numbered(4):
            n_lines += len(parts.get(4, []))
            if n_lines > MAX_REPEATS:
                raise ValueError(f"its locations have more than {MAX_REPEATS:,} lines")
            self._locations[number] = self._frames(parts)

    def profile(self) -> Profile:
        fields = self._fields
        types = [self._value_type(message) for message in fields.get(1, [])]
        if not types:
            raise ValueError("it does not say what its values are")
        period_type = self._value_type(fields[11][-1]) if 11 in fields else types[-1]
        default = self._default(types)
        types.append(types.pop(default))
        profile = Profile(
            tuple(types),
            period_type,
            _signed(_one(fields, 12)),
            time_ns=_signed(_one(fields, 9)),
            duration_ns=_signed(_one(fields, 10)),
        )
        for message in fields.get(2, []):
            parts = _message(message)
            values = [_signed(value) for value in islice(_numbers(parts, 2), len(types) + 1)]
            if len(values) != len(types):
                raise ValueError(f"a stack has not {len(types)} values")
            values.append(values.pop(default))
            profile.add(self._stack(parts), values)
        return profile

    def _numbered(self, field: int) -> Iterator[tuple[int, Fields]]:
        """Yield messages with their numbers."""
        numbers = set()
        for message in self._fields.get(field, []):
            parts = _message(message)
            number = _one(parts, 1)
            if number == 0 or number in numbers:
                raise ValueError(f"number {number} is not one entry's own in field {field}")
            numbers.add(number)
            yield number, parts

    def _string(self, fields: Fields, field: int) -> str:
        number = _one(fields, field)
        if number >= len(self._strings):
            raise ValueError(f"string {number} of {len(self._strings)}")
        return self._strings[number]

    def _value_type(self, message: int | bytes) -> ValueType:
        parts = _message(message)
        return ValueType(self._string(parts, 1), self._string(parts, 2))

    def _default(self, types: list[ValueType]) -> int:
        """Return which value is shown by default: the one that the file names, or the last."""
        name = self._string(self._fields, 14)
        named = [which for which, each in enumerate(types) if name and each.name == name]
        return named[-1] if named else len(types) - 1

    def _frames(self, location: Fields) -> tuple[Frame, ...]:
        """Return a location's calls: more than one where the compiler put them into each other."""
        frames = []
        for message in location.get(4, []):
            line = _message(message)
            function = self._functions.get(_one(line, 1))
            if function is None:
                raise ValueError(f"function {_one(line, 1)} is missing")
            frames.append(Frame(*function, _signed(_one(line, 2))))
        return tuple(frames) or (Frame(f"{_one(location, 3):#x}", ""),)

    def _stack(self, sample: Fields) -> tuple[Frame, ...]:
        frames: list[Frame] = []
        for number in _numbers(sample, 1):
            location = self._locations.get(number)
            if location is None:
                raise ValueError(f"location {number} is missing")
            self._n_frames_left -= len(location)
            if self._n_frames_left < 0:
                raise ValueError(f"its stacks have more than {MAX_FRAMES:,} calls")
            frames += location
        return tuple(frames)
