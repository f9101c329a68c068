"""WaitProfiler: which lines wait for the mutexes that threads share.

Purpose
    Note how long each call waited for a central list's or a page heap's mutex, by Python stack.
Structure
    core/lock_waits adds up what a thread waits --> core/noted, at the end of the call --> _note()
Invariants
    what the profile adds up to is what the core has counted since the start
Locking
    stacks.lock
Units
    Nanoseconds.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from pagealloc.core import noted
from pagealloc.core.lock_waits import lock_wait_counts
from pagealloc.observe.profiles import Frame, Profile, ValueType
from pagealloc.observe.stacks import frames_of, lock, stack_of

if TYPE_CHECKING:
    from pagealloc.observe.stacks import Calls

__all__ = ["WaitProfiler"]

VALUE_TYPES = (ValueType("contentions", "count"), ValueType("delay", "nanoseconds"))

ELSEWHERE = (Frame("(threads without a Python stack)", "pagealloc"),)
"""Native threads, the purger's among them; NumPy's handler and the C API in any thread."""


class WaitProfiler:
    """Notes every wait from `start` to `stop`.

    Notes
    -----
    Thread-safe.  Time is taken only where a thread has to wait, so this costs nothing else.
    """

    def __init__(self) -> None:
        self._waits: dict[Calls, list[int]] = {}
        self._started_ns = 0
        self._before = (0, 0)
        self._after: tuple[int, int] | None = None

    def start(self) -> None:
        """Begin.

        Raises
        ------
        RuntimeError
            Another one is running.
        """
        noted.start_wait_profile(self._note)
        self._before = lock_wait_counts()
        self._after = None
        self._started_ns = time.monotonic_ns()

    def stop(self) -> None:
        """Note nothing more."""
        if noted.stop_wait_profile(self._note):
            self._after = lock_wait_counts()

    def _note(self, n_waits: int, waited_ns: int) -> None:
        # There is no other way to it; a thread that runs native code alone has no caller's frame.
        calls = stack_of(sys._getframe().f_back)  # noqa: SLF001
        with lock:
            values = self._waits.setdefault(calls, [0, 0])
            values[0] += n_waits
            values[1] += waited_ns

    def profile(self) -> Profile:
        """Return the waits so far; what threads without a Python stack waited, too."""
        found = Profile(VALUE_TYPES, ValueType("contentions", "count"), 1)
        found.time_ns = time.time_ns()
        found.duration_ns = time.monotonic_ns() - self._started_ns
        with lock:
            for calls, values in self._waits.copy().items():
                found.add(frames_of(calls) or ELSEWHERE, list(values))
        counted = self._after or lock_wait_counts()
        rest = [counted[at] - self._before[at] - found.total(at) for at in range(2)]
        if rest[1] > 0:
            found.add(ELSEWHERE, [max(rest[0], 1), rest[1]])
        return found
