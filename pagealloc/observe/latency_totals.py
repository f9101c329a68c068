"""LatencyTotals: the latency histograms of a process, those of closed allocators included.

Purpose
    A histogram that falls looks to Prometheus like a process that was started anew, and its rate
    jumps.  So what an allocator had counted when it was last seen stays in the total.
Invariants
    what `update` returns for a size class and node never falls
Locking
    A lock of its own, held while the snapshot is taken: snapshots come in the order of time.
Units
    Nanoseconds; counts are samples.
"""

from __future__ import annotations

import os
from threading import Lock
from typing import TYPE_CHECKING

from pagealloc import LatencyHistogram
from pagealloc.observe.snapshot import take_snapshot

if TYPE_CHECKING:
    from pagealloc.observe.snapshot import Snapshot

__all__ = ["LATENCY_EDGES", "LatencyTotals"]

LATENCY_EDGES = (
    *(f"{edge_ns / 1e9:.9g}" for edge_ns in LatencyHistogram.factor_two_edges_ns),
    "+Inf",
)
"""Where buckets end, in seconds, as text.  They are a factor of two wide, from 16 ns to 67 ms: no
quantile is off by more than that."""

_Groups = dict[tuple[str, int | None], LatencyHistogram]


class LatencyTotals:
    """What was counted so far, by size class and NUMA node.  Thread-safe.

    Notes
    -----
    What an allocator counts between the last `update` and its end is not in it.
    """

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._lock = Lock()
        # Of closed allocators, and last seen of open ones, by name.  One tuple: a fork may come
        # amid an update, and no histogram may be in both.
        self._state: tuple[_Groups, dict[str, tuple[LatencyHistogram, ...]]] = ({}, {})

    def update(self) -> tuple[Snapshot, list[LatencyHistogram]]:
        """Take a snapshot, and return it with the histograms up to it, one a size and node."""
        with self._guard():
            snapshot = take_snapshot()
            now = {one.name: one.latencies for one in snapshot.allocators}
            retired, seen = self._state
            for name in seen.keys() - now.keys():
                retired = _merged([*retired.values(), *seen[name]])
            self._state = retired, now
            histograms = [one for found in now.values() for one in found]
            return snapshot, list(_merged([*retired.values(), *histograms]).values())

    def _guard(self) -> Lock:
        """Return the lock; a new one in the child of a fork, which may have come amid an update."""
        if os.getpid() != self._pid:
            self._pid, self._lock = os.getpid(), Lock()
        return self._lock


def _merged(histograms: list[LatencyHistogram]) -> _Groups:
    groups: dict[tuple[str, int | None], list[LatencyHistogram]] = {}
    for histogram in histograms:
        groups.setdefault((histogram.size_class, histogram.numa_node), []).append(histogram)
    return {key: LatencyHistogram.total(found) for key, found in groups.items()}
