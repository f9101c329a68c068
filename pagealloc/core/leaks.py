"""Blocks that are live when the process ends, and where they were allocated.

For ``PAGEALLOC_LEAKS=N``: of one allocation in N, the Python stack is kept until the Buffer or
Batch is gone; what is left at exit, after a garbage collection, is reported on stderr by stack.
Blocks of native code, which have no Python object, are not seen.

Thread-safe: one dict, each change of which is one step.
"""

from __future__ import annotations

import atexit
import gc
import os
import sys
import weakref
from collections import Counter
from itertools import count
from typing import TYPE_CHECKING, Protocol

from pagealloc.options import OPTIONS, option_value
from pagealloc.units import format_bytes

if TYPE_CHECKING:
    from types import FrameType

__all__ = ["LEAK_EVERY", "note_allocation", "report"]

MAX_FRAMES = 12
"""How many calls of a stack are kept, the innermost ones."""
MAX_STACKS = 20
"""How many stacks are reported, those with the most bytes."""


class Block(Protocol):
    """A Buffer or a Batch."""

    @property
    def nbytes(self) -> int:
        """Of one part."""

    @property
    def closed(self) -> bool:
        """Whether its memory was given back."""


Stack = tuple[tuple[str, int, str], ...]


def read_every() -> int:
    """Return the option: one allocation in how many; 0: none."""
    text = option_value("leaks") or "0"
    if not text.isdecimal():
        option = OPTIONS["leaks"]
        raise ValueError(f"{option.env}={text!r}: expected {option.unit}")
    return int(text)


LEAK_EVERY = read_every()

_counter = count(1)
_noted: dict[int, tuple[weakref.ref[Block], int, Stack]] = {}


def stack_of(frame: FrameType | None) -> Stack:
    """Return (file, line, function) of a frame and its callers, the innermost first."""
    calls: list[tuple[str, int, str]] = []
    while frame is not None and len(calls) < MAX_FRAMES:
        code = frame.f_code
        calls.append((code.co_filename, frame.f_lineno, code.co_qualname))
        frame = frame.f_back
    return tuple(calls)


def note_allocation(block: Block, n_parts: int) -> None:
    """Keep the caller's stack for one block in `LEAK_EVERY`; a Batch has several parts."""
    if next(_counter) % LEAK_EVERY:
        return
    key = id(block)

    def forget(_: object) -> None:
        _noted.pop(key, None)

    caller = sys._getframe().f_back  # noqa: SLF001  # None in a thread of native code alone
    _noted[key] = (weakref.ref(block, forget), n_parts, stack_of(caller))


def report() -> str:
    """Return what is live and was noted, in lines; empty: nothing."""
    n_blocks: Counter[Stack] = Counter()
    n_bytes: Counter[Stack] = Counter()
    for reference, n_parts, stack in _noted.copy().values():
        block = reference()
        if block is not None and not block.closed:
            n_blocks[stack] += 1
            n_bytes[stack] += block.nbytes * n_parts
    if not n_blocks:
        return ""
    head = (
        f"pagealloc: live at exit: {n_blocks.total()} of the blocks whose allocation was noted "
        f"(one in {LEAK_EVERY}), {format_bytes(n_bytes.total())}"
    )
    lines = [head]
    for stack, nbytes in n_bytes.most_common(MAX_STACKS):
        lines.append(f"  {n_blocks[stack]}, {format_bytes(nbytes)}, allocated at")
        lines += [f"    {file}:{line} in {function}" for file, line, function in stack]
    if len(n_bytes) > MAX_STACKS:
        lines.append(f"  and at {len(n_bytes) - MAX_STACKS} more places")
    return "\n".join(lines) + "\n"


def report_at_exit() -> None:
    gc.collect()
    sys.stderr.write(report())
    sys.stderr.flush()


if LEAK_EVERY:
    atexit.register(report_at_exit)
    os.register_at_fork(after_in_child=_noted.clear)  # what a child inherits is its parent's
