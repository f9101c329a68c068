"""Snapshots as one line of JSON, and back.

Purpose
    What `pagealloc top` reads from another process.  Nothing that comes from there is trusted:
    every field must be there, once, with a value of its type, and no other.
Structure
    The fields of `Snapshot` and of what is in it, by name, behind a version; tuples are lists.
Units
    As the snapshot has them.
"""

from __future__ import annotations

import json
import math
from dataclasses import fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from pagealloc import LatencyHistogram
from pagealloc.kv import KVStats, PrefixStats
from pagealloc.observe.snapshot import Snapshot

__all__ = ["MOST_BYTES", "as_plain", "snapshot_from_json", "snapshot_to_json"]

VERSION = 1
"""Of the text; it changes with any field."""
MOST_BYTES = 1 << 24
"""Longest text that is read: room for about 50,000 arenas."""
MOST_CHARACTERS = 1000
"""Longest text in it."""
LEAST_INT, MOST_INT = -(1 << 63), (1 << 64) - 1


def snapshot_to_json(snapshot: Snapshot) -> str:
    """Return a snapshot as one line of JSON, without the line's end.  Thread-safe."""
    plain = {"version": VERSION, "snapshot": as_plain(snapshot)}
    return json.dumps(plain, allow_nan=False, separators=(",", ":"))


def snapshot_from_json(text: str | bytes) -> Snapshot:
    """Return the snapshot that a text of `snapshot_to_json` is about.  Thread-safe.

    Raises
    ------
    ValueError
        It is longer than `MOST_BYTES`, no JSON, of another version, or has other fields or values
        than a snapshot can have.  Texts in it are printable, so they may go to a terminal.
    """
    if len(text) > MOST_BYTES:
        raise ValueError(f"a snapshot of more than {MOST_BYTES} bytes is not read")
    try:
        plain = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("this is no snapshot: it is nested too deep") from None
    except ValueError as error:  # UnicodeDecodeError is one
        raise ValueError(f"this is no snapshot: {error}") from None
    if not isinstance(plain, dict) or "version" not in plain:
        raise ValueError("this is no snapshot: it has no version")
    if plain["version"] != VERSION:
        raise ValueError(
            f"the snapshot is of version {str(plain['version'])[:20]!r}, and {VERSION} is read "
            "here: use the same pagealloc on both sides"
        )
    snapshot: Snapshot = _read(Snapshot, plain.get("snapshot"), "snapshot")
    return snapshot


def as_plain(value: Any) -> Any:
    """Return statistics as dicts, lists and scalars."""
    if is_dataclass(value) or _is_named_tuple(type(value)):
        return {name: as_plain(getattr(value, name)) for name in _names(type(value))}
    if isinstance(value, tuple):
        return [as_plain(each) for each in value]
    return value


# --- reading ---


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is there twice")
    return found


def _read(kind: Any, value: Any, where: str) -> Any:
    """Return `value` as a `kind`: a class of fields, a tuple of any length, or a scalar."""
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where} is no list")
        (item_kind, _) = get_args(kind)
        return tuple(_read(item_kind, each, where) for each in value)
    if is_dataclass(kind) or _is_named_tuple(kind):
        return _read_fields(kind, value, where)
    return _read_scalar(kind, value, where)


def _read_fields(kind: Any, value: Any, where: str) -> Any:
    kinds = _fields(kind)
    if not isinstance(value, dict) or value.keys() != kinds.keys():
        raise ValueError(f"{where} has not the fields of {kind.__name__}")
    found = {name: _read(each, value[name], f"{where}.{name}") for name, each in kinds.items()}
    if kind is LatencyHistogram and min(found["counts"], default=0) < 0:
        raise ValueError(f"{where} counts fewer than no samples")
    return kind(**found)


def _read_scalar(kind: Any, value: Any, where: str) -> Any:
    kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    if float in kinds and type(value) is int and LEAST_INT <= value <= MOST_INT:
        value = float(value)
    if type(value) not in kinds:  # a bool is no int here
        raise ValueError(f"{where} is of another type")
    match value:
        case int() if not LEAST_INT <= value <= MOST_INT:
            raise ValueError(f"{where} is out of range")
        case float() if not math.isfinite(value):
            raise ValueError(f"{where} is out of range")
        case str() if len(value) > MOST_CHARACTERS or not value.isprintable():
            raise ValueError(f"{where} is no short printable text")
    return value


def _names(kind: Any) -> list[str]:
    """Return the names of what a class is made of."""
    if is_dataclass(kind):
        return [each.name for each in fields(kind) if each.init]
    return list(kind._fields)


@cache
def _fields(kind: Any) -> dict[str, Any]:
    """Return what a class is made of, and the type of each."""
    # `snapshot` imports these two for type checkers only.
    hints = get_type_hints(kind, localns={"KVStats": KVStats, "PrefixStats": PrefixStats})
    return {name: hints[name] for name in _names(kind)}


def _is_named_tuple(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, tuple) and hasattr(kind, "_fields")
