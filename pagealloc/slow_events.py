"""Slow events: what takes long enough that someone may want to see each, such as a span of a trace.

Purpose
    Lower rooms say when such a thing begins and ends, and know nobody who listens.
Structure
    ::

        with slow_event(name) as attributes: ...  --SlowEvent-->  every listener, in this thread
Locking
    None: the listeners are a tuple that is replaced as a whole.
Units
    Nanoseconds since 1970.

Without a listener an event costs about two microseconds, and no clock is read.
"""

from __future__ import annotations

import time
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

__all__ = ["Attribute", "SlowEvent", "on_slow_event", "slow_event", "tell_slow_event"]

Attribute = str | int | float | bool


class SlowEvent(NamedTuple):
    """Something slow that ended."""

    name: str
    begun_at_ns: int
    ended_at_ns: int
    attributes: Mapping[str, Attribute]
    error: BaseException | None = None
    """With what it failed."""


_listeners: tuple[Callable[[SlowEvent], object], ...] = ()


def on_slow_event(listener: Callable[[SlowEvent], object]) -> Callable[[], None]:
    """Have `listener` called with every slow event, in the thread that was slow, once it ended.

    What it raises becomes a warning: nobody's work fails because it is watched.

    Returns
    -------
    callable
        Takes the listener back when it is called, without arguments.
    """
    global _listeners  # noqa: PLW0603  the one list of the process
    _listeners = (*_listeners, listener)

    def remove() -> None:
        global _listeners  # noqa: PLW0603
        _listeners = tuple(one for one in _listeners if one is not listener)

    return remove


@contextmanager
def slow_event(name: str) -> Iterator[dict[str, Attribute]]:
    """Tell the listeners what the body did, and how long; it adds attributes to what it is given.

    Thread-safe.  An event that nobody listened to when it began is not told.
    """
    attributes: dict[str, Attribute] = {}
    if not _listeners:
        yield attributes
        return
    begun_at_ns, monotonic_ns = time.time_ns(), time.monotonic_ns()
    error: BaseException | None = None
    try:
        yield attributes
    except BaseException as problem:
        error = problem
        raise
    finally:
        # The wall clock may be set meanwhile.
        ended_at_ns = begun_at_ns + time.monotonic_ns() - monotonic_ns
        tell_slow_event(SlowEvent(name, begun_at_ns, ended_at_ns, attributes, error))


def tell_slow_event(event: SlowEvent) -> None:
    """Tell the listeners of something that was timed elsewhere.  Thread-safe."""
    for listener in _listeners:
        try:
            listener(event)
        except Exception as problem:  # noqa: BLE001  a listener's, whatever it is
            warnings.warn(
                f"{listener!r} failed with {problem!r} on the slow event {event.name!r}",
                RuntimeWarning,
                stacklevel=2,
            )
