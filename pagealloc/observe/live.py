"""What a process did between two snapshots, and over the last minute.

Purpose
    What `pagealloc top` and the page of `pagealloc serve` show beside the snapshot itself: rates,
    and the percentiles of an interval, out of the differences of counters.
    Nothing is counted here.
Invariants
    an allocator that is in the later snapshot alone started at zero; one that is gone is left out
    no rate is negative: a process that was replaced by another one starts a new history
Locking
    None: a history belongs to who made it.
Units
    In the names; rates are per second.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from pagealloc import LatencyHistogram
from pagealloc.units import parse_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from pagealloc.observe.snapshot import Snapshot

__all__ = ["N_POINTS", "History", "Latency", "Point", "latencies_between"]

N_POINTS = 60
"""How many intervals a history keeps."""
ALL_SIZES = "all"


class Latency(NamedTuple):
    """How long allocations took, of those whose time was taken."""

    n_samples: int
    p50_ns: float | None
    """None without samples."""
    p99_ns: float | None


NOT_TIMED = Latency(0, None, None)


@dataclass(frozen=True)
class Point:
    """What a process held at a moment, and what it did since the point before.

    Attributes
    ----------
    time_s : float
        Seconds since 1970.
    resident_bytes, live_bytes, committed_bytes, held_bytes : int
        Of the process; of all allocators together.
    kv_held_bytes, kv_needed_bytes : int
        Of all KV caches together.
    faults_per_s, allocs_per_s, purged_bytes_per_s : float or None
        None at the first point.
    latencies : mapping of str to Latency
        Of allocations since the point before, by size class, and ``"all"``.
    """

    time_s: float
    resident_bytes: int
    live_bytes: int
    committed_bytes: int
    held_bytes: int
    kv_held_bytes: int
    kv_needed_bytes: int
    faults_per_s: float | None
    allocs_per_s: float | None
    purged_bytes_per_s: float | None
    latencies: Mapping[str, Latency]


class History:
    """The last points of one process, and what they have in common.

    Parameters
    ----------
    n_points : int
        How many are kept.
    """

    def __init__(self, n_points: int = N_POINTS) -> None:
        # One more than there are points: the first of them is a difference, too.
        self._snapshots: deque[Snapshot] = deque(maxlen=n_points + 1)
        self._points: deque[Point] = deque(maxlen=n_points)

    @property
    def points(self) -> tuple[Point, ...]:
        """The points, the latest last."""
        return tuple(self._points)

    @property
    def latest(self) -> Snapshot | None:
        """The snapshot that was added last."""
        return self._snapshots[-1] if self._snapshots else None

    @property
    def duration_s(self) -> float:
        """How long the history is."""
        return self._snapshots[-1].time_s - self._snapshots[0].time_s if self._snapshots else 0.0

    def add(self, snapshot: Snapshot) -> Point | None:
        """Add a snapshot, and return its point; None, and nothing, if no time passed.

        A snapshot of another process, or one whose counters or clock went back, starts anew.
        """
        before = self.latest
        if before is not None and snapshot == before:
            return None
        if before is not None and not _follows(before, snapshot):
            self._snapshots.clear()
            self._points.clear()
            before = None
        self._snapshots.append(snapshot)
        self._points.append(_point(before, snapshot))
        return self._points[-1]

    def latencies(self) -> dict[str, Latency]:
        """Return percentiles by size class of the history's time, or, of one snapshot, since ever.

        The smallest size comes first; ``"all"``, the last, is all of them together.
        """
        if not self._snapshots:
            return {}
        before = self._snapshots[0] if len(self._snapshots) > 1 else None
        return latencies_between(before, self._snapshots[-1])

    def series(self, size_class: str) -> list[Latency]:
        """Return what each point says of a size class, or of ``"all"``."""
        return [point.latencies.get(size_class, NOT_TIMED) for point in self._points]


def latencies_between(before: Snapshot | None, after: Snapshot) -> dict[str, Latency]:
    """Return percentiles by size class of what was timed between two snapshots.

    Classes of which nothing was timed are left out; the smallest comes first, and ``"all"`` last.
    """
    earlier = {} if before is None else _by_allocator(before)
    found: dict[str, list[LatencyHistogram]] = {}
    for key, histogram in _by_allocator(after).items():
        grown = _difference(earlier.get(key), histogram)
        if grown.n_samples:
            found.setdefault(histogram.size_class, []).append(grown)
    latencies = {name: _latency(found[name]) for name in sorted(found, key=_size_order)}
    if found:
        latencies[ALL_SIZES] = _latency(each for group in found.values() for each in group)
    return latencies


# --- differences ---


def _follows(before: Snapshot, after: Snapshot) -> bool:
    """Whether both are of one process, in order."""
    return (
        before.pid == after.pid
        and before.time_s < after.time_s
        and before.n_minor_faults <= after.n_minor_faults
        and before.n_major_faults <= after.n_major_faults
    )


def _point(before: Snapshot | None, after: Snapshot) -> Point:
    stats = [each.stats for each in after.allocators]
    faults_per_s = allocs_per_s = purged_bytes_per_s = None
    latencies: dict[str, Latency] = {}
    if before is not None:
        duration_s = after.time_s - before.time_s
        faults_per_s = (_n_faults(after) - _n_faults(before)) / duration_s
        allocs_per_s = _growth(before, after, "n_allocs") / duration_s
        purged_bytes_per_s = _growth(before, after, "purged_bytes") / duration_s
        latencies = latencies_between(before, after)
    return Point(
        time_s=after.time_s,
        resident_bytes=after.resident_bytes,
        live_bytes=sum(each.live_bytes for each in stats),
        committed_bytes=sum(each.committed_bytes for each in stats),
        held_bytes=sum(each.held_bytes for each in stats),
        kv_held_bytes=sum(each.stats.held_bytes for each in after.caches),
        kv_needed_bytes=sum(each.stats.needed_bytes for each in after.caches),
        faults_per_s=faults_per_s,
        allocs_per_s=allocs_per_s,
        purged_bytes_per_s=purged_bytes_per_s,
        latencies=latencies,
    )


def _n_faults(snapshot: Snapshot) -> int:
    return snapshot.n_minor_faults + snapshot.n_major_faults


def _growth(before: Snapshot, after: Snapshot, counter: str) -> int:
    """Return how much a counter of the later snapshot's allocators grew, in all."""
    earlier = {each.name: getattr(each.stats, counter) for each in before.allocators}
    # Read while threads count, a counter may lag behind itself for a moment.
    return sum(
        max(0, getattr(each.stats, counter) - earlier.get(each.name, 0))
        for each in after.allocators
    )


def _by_allocator(
    snapshot: Snapshot,
) -> dict[tuple[str, str, int | None], LatencyHistogram]:
    return {
        (allocator.name, each.size_class, each.numa_node): each
        for allocator in snapshot.allocators
        for each in allocator.latencies
    }


def _difference(before: LatencyHistogram | None, after: LatencyHistogram) -> LatencyHistogram:
    if before is None:
        return after
    return LatencyHistogram(
        size_class=after.size_class,
        numa_node=after.numa_node,
        sum_ns=max(0, after.sum_ns - before.sum_ns),
        counts=tuple(
            max(0, late - early) for early, late in zip(before.counts, after.counts, strict=True)
        ),
    )


def _latency(histograms: Iterable[LatencyHistogram]) -> Latency:
    total = LatencyHistogram.total(histograms)
    if not total.n_samples:
        return NOT_TIMED
    return Latency(total.n_samples, total.percentile_ns(50), total.percentile_ns(99))


def _size_order(label: str) -> tuple[int, str]:
    """Sort labels by size: "64 B", "4 KiB", "> 1 GiB"; what is no size comes last."""
    try:
        return parse_bytes(label.removeprefix("> ")) + label.startswith("> "), label
    except ValueError:
        return 1 << 62, label
