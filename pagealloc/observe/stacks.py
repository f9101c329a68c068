"""Stacks of Python calls, as samplers note them, and the lock that guards what they note.

Locking
    lock: reentrant, for a garbage collection in the middle of a note may run code that allocates.
    fork() waits for it, so that a child finds everything noted or not begun.
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
    from types import FrameType

    from pagealloc.observe.profiles import Stack

__all__ = ["Calls", "frames_of", "lock", "stack_of"]

MAX_CALLS = 128
"""Of a deeper stack, the innermost ones are kept."""
SCRIPT_RUNNER = "<frozen runpy>"
"""Who called a script is nobody the script's author wants to see."""

Calls = tuple[tuple[str, str, int], ...]
"""Name, file and line of each call, the innermost first.

Code objects would be kept alive, and those of two files may be equal.
"""

lock = threading.RLock()
os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)


def stack_of(frame: FrameType | None) -> Calls:
    """Return a frame and its callers."""
    calls: list[tuple[str, str, int]] = []
    while frame is not None and len(calls) < MAX_CALLS:
        code = frame.f_code
        if code.co_filename == SCRIPT_RUNNER:
            break
        line = frame.f_lineno or code.co_firstlineno
        calls.append((code.co_qualname, code.co_filename, line))
        frame = frame.f_back
    return tuple(calls)


def frames_of(calls: Calls) -> Stack:
    """Return calls as a profile has them."""
    return tuple(Frame(_name(name, file), file, line) for name, file, line in calls)


def _name(name: str, file: str) -> str:
    """Return a function's name; pprof would drop what stands in angle brackets only."""
    return f"{PurePath(file).stem} (module)" if name == "<module>" else name
