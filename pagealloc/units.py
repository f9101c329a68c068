"""Byte counts as people write them: ``"64KiB"``, ``"2GiB"``, ``4096``.

Floor 0.  Only binary units are accepted as binary (KiB, MiB, GiB, TiB); ``KB``, ``MB`` and
``GB`` are decimal, as everywhere else, so that nobody gets 2.4 % more than the budget says.
"""

import operator
import re
from typing import SupportsIndex

__all__ = ["MAX_ALIGN_BYTES", "MAX_BYTES", "format_bytes", "parse_align", "parse_bytes"]

MAX_BYTES = 1 << 47
"""Largest size that is ever accepted: the user half of a 48-bit address space."""

MAX_ALIGN_BYTES = 1 << 30
"""Largest alignment: that of the largest huge page."""

_UNIT_BYTES = {
    "": 1,
    "b": 1,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
    "tib": 1 << 40,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
}
_PATTERN = re.compile(r"\s*(\d{1,40}(?:\.\d{1,40})?)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_bytes(value: SupportsIndex | str, *, name: str = "nbytes", minimum: int = 1) -> int:
    """Return `value` as a number of bytes.

    Parameters
    ----------
    value : int or str
        A count, or a number with a unit: ``"64KiB"``, ``"1.5 GiB"``, ``"500MB"``.
    name : str
        What the value is called in an error message.
    minimum : int
        Smallest value accepted.

    Raises
    ------
    TypeError
        `value` is neither an integer nor a string (a float or a bool, say).
    ValueError
        The text is no size, or the number is below `minimum` or above `MAX_BYTES`.
    """
    if isinstance(value, str):
        match = _PATTERN.fullmatch(value)
        unit_bytes = _UNIT_BYTES.get(match[2].lower()) if match else None
        if match is None or unit_bytes is None:
            raise ValueError(
                f"{name}={value!r} is not a size: write a number of bytes or "
                f"a number with KiB, MiB, GiB or TiB, such as '64KiB'"
            )
        number, point, fraction = match[1].partition(".")
        if point and unit_bytes == 1:
            raise ValueError(f"{name}={value!r}: there is no part of a byte")
        nbytes = int(number) * unit_bytes
        if point:  # exact: a float would round away bytes of a large size
            nbytes += int(fraction) * unit_bytes // 10 ** len(fraction)
    elif isinstance(value, bool):
        raise TypeError(f"{name} must be a number of bytes or a string, not bool")
    else:
        try:
            nbytes = operator.index(value)
        except TypeError:
            raise TypeError(
                f"{name} must be a number of bytes or a string such as '64KiB', "
                f"not {type(value).__name__}"
            ) from None
    if nbytes < minimum:
        raise ValueError(f"{name}={value!r} is too small: at least {minimum} is possible")
    if nbytes > MAX_BYTES:
        shown = f"={value!r}" if nbytes < 1 << 256 else ""  # it may have thousands of digits
        raise ValueError(
            f"{name}{shown} is too large: at most {MAX_BYTES} bytes "
            f"({format_bytes(MAX_BYTES)}) are possible"
        )
    return nbytes


def parse_align(value: SupportsIndex | str, *, name: str = "align") -> int:
    """Return `value`, given as for `parse_bytes`, as an alignment: a power of two up to 1 GiB.

    Raises
    ------
    TypeError, ValueError
        As `parse_bytes`, or it is no such power.
    """
    align_bytes = parse_bytes(value, name=name)
    if align_bytes & (align_bytes - 1) or align_bytes > MAX_ALIGN_BYTES:
        raise ValueError(
            f"{name}={value!r}: an alignment is a power of two of at most "
            f"{format_bytes(MAX_ALIGN_BYTES)}"
        )
    return align_bytes


def format_bytes(nbytes: int) -> str:
    """Return `nbytes` as a short text with three or four digits and a binary unit.

    >>> format_bytes(23040), format_bytes(1536 << 20), format_bytes(-512)
    ('22.5 KiB', '1.50 GiB', '-512 B')
    """
    if nbytes < 0:
        return "-" + format_bytes(-nbytes)
    if nbytes < 1024:
        return f"{nbytes} B"
    amount = float(nbytes)
    for unit in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        amount /= 1024
        if round(amount) < 1024 or unit == "PiB":  # 1023.999 is shown as the next unit's 1.00
            break
    digits = 2 if amount < 10 else 1 if amount < 100 else 0
    return f"{amount:.{digits}f} {unit}"
