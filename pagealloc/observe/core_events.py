"""Slow events of the core: arenas that came, and memory that went back to the kernel.

Purpose
    The core keeps them, for it calls no Python; a thread tells the listeners of them.
Structure
    ::

        core/event_ring --take_events(), once a second--> tell_slow_event --> every listener
Invariants
    the core is watched <=> the thread runs <=> somebody follows
    a forked child has no such thread: who followed in the parent does not follow there
Locking
    `_lock` for who follows.
Units
    The core's CLOCK_MONOTONIC becomes nanoseconds since 1970.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from typing import TYPE_CHECKING

from pagealloc.core.event_ring import take_events, unwatch_events, watch_events
from pagealloc.slow_events import SlowEvent, tell_slow_event

if TYPE_CHECKING:
    from collections.abc import Callable

    from pagealloc.slow_events import Attribute

__all__ = ["follow_core_events"]

INTERVAL_S = 1.0

_lock = threading.Lock()
_teller: _Teller | None = None


def follow_core_events() -> Callable[[], None]:
    """Have all listeners of `pagealloc.slow_events` told of what the core does slowly.

    ``arena_growth`` is an arena that was reserved, ``purge`` memory that went back.  Attributes are
    ``heap``, the heap's number; ``nbytes``; of a purge ``cause``, which is ``idle`` (the purger's)
    or ``trim``; and ``n_lost`` if events before this one were lost, as too many came in a second.

    Returns
    -------
    callable
        Ends it when it is called, without arguments, once the listeners know of all until then; so
        does the end of the process.

    Notes
    -----
    Thread-safe.  However many follow, one daemon thread tells each event once, within a second.
    """
    global _teller  # noqa: PLW0603
    with _lock:
        if _teller is None:
            _teller = _Teller()
        teller = _teller
        teller.n_followers += 1
    is_following = True

    def stop() -> None:
        nonlocal is_following
        global _teller  # noqa: PLW0603
        atexit.unregister(stop)
        with _lock:
            if not is_following or teller is not _teller:
                return
            is_following = False
            teller.n_followers -= 1
            if teller.n_followers:
                _tell()
            else:
                teller.stop()
                _teller = None

    # An SDK that was configured before is shut down after this.
    atexit.register(stop)
    return stop


class _Teller:
    """The thread that tells."""

    def __init__(self) -> None:
        self.n_followers = 0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pagealloc-events", daemon=True)
        self._thread.start()
        watch_events()

    def stop(self) -> None:
        """Tell the rest, and no more."""
        self._is_over.set()
        self._thread.join()
        unwatch_events()
        _tell()

    def _run(self) -> None:
        while not self._is_over.wait(INTERVAL_S):
            _tell()


def _tell() -> None:
    events, n_lost = take_events()
    since_1970_ns = time.time_ns() - time.monotonic_ns()
    for kind, heap, begun_at_ns, ended_at_ns, nbytes in events:
        attributes: dict[str, Attribute] = {"heap": heap, "nbytes": nbytes}
        name = "arena_growth" if kind == "arena_growth" else "purge"
        if name == "purge":
            attributes["cause"] = "trim" if kind == "trim" else "idle"
        if n_lost:
            attributes["n_lost"], n_lost = n_lost, 0
        tell_slow_event(
            SlowEvent(name, begun_at_ns + since_1970_ns, ended_at_ns + since_1970_ns, attributes)
        )


def _forget_in_child() -> None:
    global _lock, _teller  # noqa: PLW0603
    _lock = threading.Lock()  # another thread of the parent may have had it
    _teller = None


os.register_at_fork(after_in_child=_forget_in_child)
