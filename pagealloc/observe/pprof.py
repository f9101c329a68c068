"""pprof files: profiles as ``go tool pprof`` reads them, written and read.

Purpose
    A gzipped protocol buffer of some messages; of these the fields that a profile needs.
Source
    github.com/google/pprof, proto/profile.proto.
"""

from __future__ import annotations

import gzip
import zlib
from typing import TYPE_CHECKING

from pagealloc.observe.profiles import Frame, Profile, ValueType

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["from_pprof", "to_pprof"]

MAX_BYTES = 1 << 30
"""Of a profile that is read, once it is not compressed any more."""

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


def to_pprof(profile: Profile) -> bytes:
    """Return a profile as the bytes of a ``.pb.gz`` file."""
    return gzip.compress(_Writer(profile).message(), compresslevel=6, mtime=0)


def from_pprof(data: bytes) -> Profile:
    """Return the profile of a file's bytes, compressed or not.

    Raises
    ------
    ValueError
        It is no profile, or a damaged one.
    """
    try:
        return _read_profile(_inflated(data))
    except (IndexError, KeyError, UnicodeDecodeError, zlib.error, EOFError, OSError) as error:
        raise ValueError(f"not a pprof profile, or a damaged one: {error}") from error


# --- writing --------------------------------------------------------------------------------------


class _Writer:
    """Numbers strings, functions and locations as they come."""

    def __init__(self, profile: Profile) -> None:
        self._profile = profile
        self._strings: dict[str, int] = {"": 0}
        self._functions: dict[tuple[str, str], int] = {}
        self._locations: dict[Frame, int] = {}

    def message(self) -> bytes:
        profile = self._profile
        parts = [_field(1, self._value_type(each)) for each in profile.value_types]
        for stack, values in profile.samples.items():
            at = b"".join(_varint(self._location(frame)) for frame in stack)
            counted = b"".join(_varint(value) for value in values)
            parts.append(_field(2, _field(1, at) + _field(2, counted)))
        parts.append(_number(9, profile.time_ns) + _number(10, profile.duration_ns))
        parts.append(_field(11, self._value_type(profile.period_type)))
        parts.append(_number(12, profile.period))
        parts.append(_number(14, self._string(profile.value_types[-1].name)))
        for frame, number in self._locations.items():
            function = self._functions[frame.function, frame.file]
            line = _number(1, function) + _number(2, frame.line)
            parts.append(_field(4, _number(1, number) + _field(4, line)))
        for (name, file), number in self._functions.items():
            text = self._string(name)
            parts.append(
                _field(
                    5,
                    _number(1, number)
                    + _number(2, text)
                    + _number(3, text)
                    + _number(4, self._string(file)),
                )
            )
        parts += [_field(6, text.encode()) for text in self._strings]
        return b"".join(parts)

    def _string(self, text: str) -> int:
        return self._strings.setdefault(text, len(self._strings))

    def _value_type(self, value_type: ValueType) -> bytes:
        return _number(1, self._string(value_type.name)) + _number(2, self._string(value_type.unit))

    def _location(self, frame: Frame) -> int:
        self._functions.setdefault((frame.function, frame.file), len(self._functions) + 1)
        return self._locations.setdefault(frame, len(self._locations) + 1)


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1
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


# --- reading --------------------------------------------------------------------------------------


def _inflated(data: bytes) -> bytes:
    if data[:2] != b"\x1f\x8b":
        return data
    inflater = zlib.decompressobj(wbits=31)
    found = inflater.decompress(data, MAX_BYTES)
    if inflater.unconsumed_tail:
        raise ValueError(f"a profile of more than {MAX_BYTES} bytes")
    if not inflater.eof:
        raise ValueError("the profile is truncated")
    return found


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
            length, at = _read_varint(data, at)
        elif kind in (FIXED64, FIXED32):
            length = 8 if kind == FIXED64 else 4
        else:
            raise ValueError(f"a field of kind {kind}")
        if length > len(data) - at:
            raise ValueError(f"a field of {length} bytes, of which {len(data) - at} are there")
        yield field, data[at : at + length]
        at += length


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at += 1
        if byte < 128:
            return value & (1 << 64) - 1, at
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def _numbers(values: list[int | bytes]) -> list[int]:
    """Return repeated numbers, packed or not."""
    found: list[int] = []
    for value in values:
        if isinstance(value, int):
            found.append(value)
            continue
        at = 0
        while at < len(value):
            number, at = _read_varint(value, at)
            found.append(number)
    return found


def _message(data: int | bytes) -> dict[int, list[int | bytes]]:
    if isinstance(data, int):
        raise ValueError("a number where a message belongs")  # noqa: TRY004  # damaged data
    fields: dict[int, list[int | bytes]] = {}
    for field, value in _fields(data):
        fields.setdefault(field, []).append(value)
    return fields


def _one(fields: dict[int, list[int | bytes]], field: int) -> int:
    value = fields.get(field, [0])[-1]
    if not isinstance(value, int):
        raise ValueError("bytes where a number belongs")  # noqa: TRY004  # damaged data
    return value


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _read_profile(data: bytes) -> Profile:
    fields = _message(data)
    strings = []
    for text in fields.get(6, []):
        if isinstance(text, int):
            raise ValueError("a number where a string belongs")  # noqa: TRY004  # damaged data
        strings.append(text.decode())

    def value_type(message: int | bytes) -> ValueType:
        parts = _message(message)
        return ValueType(strings[_one(parts, 1)], strings[_one(parts, 2)])

    functions = {}
    for message in fields.get(5, []):
        parts = _message(message)
        functions[_one(parts, 1)] = strings[_one(parts, 2)], strings[_one(parts, 4)]
    locations = {}
    for message in fields.get(4, []):
        parts = _message(message)
        lines = [_message(line) for line in parts.get(4, [])]
        locations[_one(parts, 1)] = [
            Frame(*functions[_one(line, 1)], _signed(_one(line, 2))) for line in lines
        ] or [Frame(f"{_one(parts, 3):#x}", "")]
    value_types = tuple(value_type(each) for each in fields.get(1, []))
    if not value_types:
        raise ValueError("it says of no value what it is")
    period = fields.get(11)
    profile = Profile(
        value_types,
        value_type(period[-1]) if period else value_types[-1],
        _signed(_one(fields, 12)),
    )
    profile.time_ns, profile.duration_ns = _signed(_one(fields, 9)), _signed(_one(fields, 10))
    for message in fields.get(2, []):
        parts = _message(message)
        stack = tuple(frame for number in _numbers(parts.get(1, [])) for frame in locations[number])
        values = [_signed(value) for value in _numbers(parts.get(2, []))]
        if len(values) != len(value_types):
            raise ValueError(f"{len(values)} values where {len(value_types)} belong")
        profile.add(stack, values)
    return profile
