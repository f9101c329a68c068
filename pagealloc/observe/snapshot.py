"""Snapshot: everything the process counts, read once.

Purpose
    What is shown anywhere, out of ``stats()`` and ``latencies()`` of all that is open: nothing is
    counted here.
Locking
    None: each ``stats()`` is a reading of its own.
Units
    As the statistics have them.
"""

from __future__ import annotations

import os
import resource
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import psutil

from pagealloc import AllocatorStats, ClosedError, LatencyHistogram, PageAllocator
from pagealloc.core.heap_owner import open_heaps
from pagealloc.core.lock_waits import lock_wait_counts
from pagealloc.kv.open_caches import open_caches
from pagealloc.observe.straddling import NO_ROWS, StraddlingRows, straddling_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pagealloc.kv import KVCache, KVStats, PrefixStats

__all__ = ["AllocatorReading", "CacheReading", "Snapshot", "take_snapshot"]

_Reading = TypeVar("_Reading")


@dataclass(frozen=True)
class AllocatorReading:
    """One open allocator."""

    name: str
    """A number, in the order they were made."""
    stats: AllocatorStats
    latencies: tuple[LatencyHistogram, ...]
    backing: str = "auto"
    """What was asked for, also if nothing of it could be had."""


@dataclass(frozen=True)
class CacheReading:
    """One open KV cache."""

    name: str
    stats: KVStats
    prefixes: PrefixStats
    layout: str
    """Its layout, as it shows itself."""
    straddling: StraddlingRows = NO_ROWS
    """Which of its rows reach into one page more than they need, as they come."""


@dataclass(frozen=True)
class Snapshot:
    """What a process held at a moment.

    Attributes
    ----------
    pid : int
    time_s : float
        Seconds since 1970.
    n_minor_faults, n_major_faults : int
        Page faults of the whole process since it started.
    resident_bytes : int
        Resident memory of the whole process, in which a page that is mapped twice counts twice.
    n_lock_waits : int
        How often threads had to wait for a mutex of the core that they share.
    lock_wait_ns : int
        How long they waited together.
    allocators : tuple of AllocatorReading
    caches : tuple of CacheReading
    """

    pid: int
    time_s: float
    n_minor_faults: int
    n_major_faults: int
    resident_bytes: int
    n_lock_waits: int
    lock_wait_ns: int
    allocators: tuple[AllocatorReading, ...]
    caches: tuple[CacheReading, ...]

    @property
    def lock_wait_s(self) -> float:
        """Seconds that threads waited for mutexes of the core that they share."""
        return self.lock_wait_ns / 1e9


def take_snapshot() -> Snapshot:
    """Read all that is open.

    Thread-safe.  What another thread closes meanwhile is left out.
    """
    usage = resource.getrusage(resource.RUSAGE_SELF)
    n_lock_waits, lock_wait_ns = lock_wait_counts()
    return Snapshot(
        pid=os.getpid(),
        time_s=time.time(),
        n_minor_faults=usage.ru_minflt,
        n_major_faults=usage.ru_majflt,
        resident_bytes=_resident_bytes(),
        n_lock_waits=n_lock_waits,
        lock_wait_ns=lock_wait_ns,
        allocators=tuple(_open_only(_read_allocator, open_heaps())),
        caches=tuple(_open_only(_read_cache, open_caches())),
    )


def _open_only(read: Callable[[str, Any], _Reading], found: list[Any]) -> Iterator[_Reading]:
    for number, each in found:
        try:
            yield read(str(number), each)
        except ClosedError:
            continue


def _read_allocator(name: str, allocator: PageAllocator) -> AllocatorReading:
    return AllocatorReading(name, allocator.stats(), allocator.latencies(), allocator.backing)


def _read_cache(name: str, cache: KVCache) -> CacheReading:
    return CacheReading(
        name,
        cache.stats(),
        cache.prefixes.stats(),
        repr(cache.layout),
        straddling_rows(cache.layout),
    )


def _resident_bytes() -> int:
    return int(psutil.Process().memory_info().rss)
