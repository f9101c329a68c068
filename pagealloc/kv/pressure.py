"""Pressure: what a cache does when its memory runs short.

Purpose
    Keep the hard budget without failing where something can be given up.
Structure
    ::

        committed > high_watermark * budget   on_pressure(cache), once until it is below again
        a request is refused                  give something up, try again:
                                                1. the warm window that lay idle longest
                                                2. published blocks that no open sequence has
                                                3. the evictable sequence used longest ago
                                                4. whatever on_pressure(cache) gives up
                                              nothing left: OutOfMemoryError
Invariants
    the sequences a request is for are never given up for it
Locking
    None: whoever grows a sequence is its one writer; evicting is a close, with the same rule.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from pagealloc.errors import OutOfMemoryError, PageallocError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from pagealloc.kv.cache import KVCache
    from pagealloc.kv.sequence import Sequence

__all__ = ["Pressure"]

# ruff: noqa: SLF001  a part of the cache


class Pressure:
    """How one cache gives way.

    Parameters
    ----------
    high_watermark : float
        Share of the budget above which `on_pressure` is called.
    on_pressure : callable, optional
        Called with the cache.

    Raises
    ------
    TypeError, ValueError
        `on_pressure` cannot be called, or the watermark is not above 0 and at most 1.
    """

    __slots__ = ("_is_above", "_is_calling", "high_watermark", "on_pressure")

    def __init__(self, high_watermark: float, on_pressure: Callable[[KVCache], Any] | None) -> None:
        if not 0 < high_watermark <= 1:
            raise ValueError(f"high_watermark={high_watermark!r}: above 0, at most 1 is possible")
        if on_pressure is not None and not callable(on_pressure):
            raise TypeError(
                f"on_pressure must be callable with the cache, not {type(on_pressure).__name__}"
            )
        self.high_watermark = high_watermark
        self.on_pressure = on_pressure
        self._is_above = False
        self._is_calling = False

    def make_room(self, cache: KVCache, keep: Collection[Sequence]) -> bool:
        """Give something up; False if there is nothing."""
        if cache._warm.close_oldest() or cache._prefixes.evict() or self._evict(cache, keep):
            return True
        before_bytes = cache._store.committed_bytes
        self._call(cache)
        return cache._store.committed_bytes < before_bytes

    def notice(self, cache: KVCache) -> None:
        """Look whether the watermark was passed; called after the cache grew."""
        budget_bytes = cache._store.budget_bytes
        if self.on_pressure is None or budget_bytes is None:
            return
        is_above = cache._store.committed_bytes > self.high_watermark * budget_bytes
        was_above, self._is_above = self._is_above, is_above
        if is_above and not was_above:
            self._call(cache)

    def _call(self, cache: KVCache) -> None:
        if self.on_pressure is None or self._is_calling:
            return
        self._is_calling = True
        try:
            self.on_pressure(cache)
        finally:
            self._is_calling = False

    def _evict(self, cache: KVCache, keep: Collection[Sequence]) -> bool:
        """Close the evictable sequence used longest ago, that no array keeps open."""
        candidates = [
            seq
            for seq in cache.sequences
            if seq.evictable and not seq._is_growing and not any(seq is kept for kept in keep)
        ]
        for sequence in sorted(candidates, key=lambda seq: seq._last_use):
            with suppress(BufferError, PageallocError):
                sequence._evict()
                return True
        return False


def with_room(cache: KVCache, keep: Collection[Sequence], request: Callable[[], None]) -> None:
    """Carry out a request that changes nothing if it is refused; give way until it is not.

    Raises
    ------
    OutOfMemoryError
        It was refused, and nothing is left to give up.
    """
    while True:
        try:
            request()
        except OutOfMemoryError:
            if not cache._pressure.make_room(cache, keep):
                raise
        else:
            cache._pressure.notice(cache)
            return
