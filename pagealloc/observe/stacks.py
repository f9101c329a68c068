"""Stacks of Python calls, as samplers note them, and the lock that guards what they note.

Locking
    lock: reentrant, for a garbage collection in the middle of a note may run callbacks that take
    it.  fork() waits for it, so that a child finds everything noted or not begun.
Units
    Lines.
"""

from __future__ import annotations

import os
import threading
from pathlib import PurePath
from typing import TYPE_CHECKING

from pagealloc.observe.profiles import Frame

if TYPE_CHECKING:
    from types import CodeType, FrameType

    from pagealloc.observe.profiles import Stack

__all__ = ["Calls", "frames_of", "lock", "stack_of"]

MAX_CALLS = 128
"""Of a deeper stack, the innermost ones are kept."""
SCRIPT_RUNNER = "<frozen runpy>"
"""Who called a script is nobody the script's author wants to see."""

Calls = tuple[tuple["CodeType", int], ...]
"""Code and line of each call, the innermost first: what costs least to note."""

lock = threading.RLock()
os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)


def stack_of(frame: FrameType | None) -> Calls:
    """Return a frame and its callers."""
    calls: list[tuple[CodeType, int]] = []
    while frame is not None and len(calls) < MAX_CALLS:
        code = frame.f_code
        if code.co_filename == SCRIPT_RUNNER:
            break
        calls.append((code, frame.f_lineno or code.co_firstlineno))
        frame = frame.f_back
    return tuple(calls)


def frames_of(calls: Calls) -> Stack:
    """Return calls as a profile has them."""
    return tuple(Frame(_name(code), code.co_filename, line) for code, line in calls)


def _name(code: CodeType) -> str:
    """Return a function's name; pprof would drop what stands in angle brackets only."""
    if code.co_qualname == "<module>":
        return f"{PurePath(code.co_filename).stem} (module)"
    return code.co_qualname
