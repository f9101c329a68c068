"""What comes of asking for a backing here: tried, not concluded from settings."""

from __future__ import annotations

from dataclasses import dataclass

from pagealloc import PageAllocator
from pagealloc.errors import BackingUnavailableError

__all__ = ["BACKINGS", "PROBE_BYTES", "Trial", "try_backing"]

BACKINGS = ("auto", "hugetlb", "thp", "base")
PROBE_BYTES = 4 << 20


@dataclass(frozen=True)
class Trial:
    """What came of asking for a backing: the achieved one, or why it cannot be had."""

    requested: str
    achieved: str | None
    reason: str | None


def try_backing(requested: str) -> Trial:
    """Allocate and touch a few MiB, and return what stands behind them."""
    try:
        with PageAllocator(backing=requested) as allocator, allocator.alloc(PROBE_BYTES) as buffer:
            with memoryview(buffer) as view:
                view[:] = bytes(PROBE_BYTES)
            achieved = {arena.achieved_backing for arena in allocator.stats().arenas}
    except BackingUnavailableError as error:
        return Trial(requested, None, str(error))
    return Trial(requested, ", ".join(sorted(achieved)), None)
