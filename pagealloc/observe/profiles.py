"""Profile: values by stack, whatever was counted.

Purpose
    What samplers fill, and what pprof files, folded stacks and flame graphs are made of.
Invariants
    Each stack has as many values as the profile has value types.
Locking
    None: a profile belongs to whoever fills or reads it.
Units
    As each value's type says: bytes, nanoseconds, or a count.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Frame", "Profile", "Stack", "ValueType"]


class Frame(NamedTuple):
    """A call: where it was, in the source."""

    function: str
    file: str
    line: int = 0
    """0 if it is not known."""

    @property
    def place(self) -> str:
        """File and line, as far as they are known."""
        return f"{self.file}:{self.line}" if self.file and self.line else self.file


Stack = tuple[Frame, ...]
"""Calls, the innermost first."""


class ValueType(NamedTuple):
    """What a value counts, such as ``("alloc_space", "bytes")``."""

    name: str
    unit: str


@dataclass
class Profile:
    """Values by stack.

    Attributes
    ----------
    value_types : tuple of ValueType
        What each stack's values are; the last one is what is shown by default.
    samples : dict of Stack to list of int
        A value of each type.
    period_type, period : ValueType, int
        What was sampled how often: one sample in so many units.
    time_ns, duration_ns : int
        When it ended, since 1970; how long it took.
    """

    value_types: tuple[ValueType, ...]
    period_type: ValueType
    period: int
    samples: dict[Stack, list[int]] = field(default_factory=dict)
    time_ns: int = 0
    duration_ns: int = 0

    def add(self, stack: Stack, values: Sequence[int]) -> None:
        """Add values, one of each type, to a stack's.

        Raises
        ------
        ValueError
            There are more or fewer values than types.
        """
        if len(values) != len(self.value_types):
            raise ValueError(f"{len(values)} values where {len(self.value_types)} belong")
        known = self.samples.get(stack)
        if known is None:
            self.samples[stack] = list(values)
            return
        for at, value in enumerate(values):
            known[at] += value

    def total(self, which: int = -1) -> int:
        """Return the sum of a value over all stacks."""
        return sum(values[which] for values in self.samples.values())

    def hottest(self, n: int, which: int = -1) -> list[tuple[Frame, int]]:
        """Return the lines with most of a value of their own, and how much.

        What calls do counts for the line called, not for the calling one.  In a difference, those
        come first that changed most, whether up or down.
        """
        own: dict[Frame, int] = {}
        for stack, values in self.samples.items():
            if stack:
                own[stack[0]] = own.get(stack[0], 0) + values[which]
        changed = (item for item in own.items() if item[1])
        return sorted(changed, key=lambda item: (-abs(item[1]), item[0]))[:n]

    def folded(self, which: int = -1) -> str:
        """Return the stacks as lines, "outer;inner value", as flame graph tools read them.

        A value may be negative in a difference; few tools read that.
        """
        name_of = cache(_folded_name)  # a call is part of many stacks
        by_name: dict[str, int] = {}
        for stack, values in self.samples.items():
            name = ";".join(map(name_of, reversed(stack))) or "(no stack)"
            by_name[name] = by_name.get(name, 0) + values[which]
        return "".join(f"{name} {value}\n" for name, value in sorted(by_name.items()) if value)

    def minus(self, other: Profile) -> Profile:
        """Return what this one has more than another; less is negative, as much is left out.

        Raises
        ------
        ValueError
            They count other things.
        """
        if self.value_types != other.value_types:
            raise ValueError(
                f"profiles of {_names(self)} and of {_names(other)} cannot be compared: take two "
                "of a kind"
            )
        difference = Profile(self.value_types, self.period_type, self.period)
        difference.time_ns = self.time_ns
        difference.duration_ns = self.duration_ns - other.duration_ns
        for stack, values in self.samples.items():
            difference.add(stack, values)
        for stack, values in other.samples.items():
            difference.add(stack, [-value for value in values])
        difference.samples = {
            stack: values for stack, values in difference.samples.items() if any(values)
        }
        return difference


def _names(profile: Profile) -> str:
    return ", ".join(f"{name} ({unit})" for name, unit in profile.value_types)


def _folded_name(frame: Frame) -> str:
    """Return a frame without what would end it, or its line."""
    name = f"{frame.function} ({frame.place})" if frame.place else frame.function
    return " ".join(name.replace(";", ",").split()) or "(no name)"
