"""The doctor: says what is wrong with the use of memory, and what to do, from evidence.

Purpose
    Find what costs memory or time, name the figure it was seen by, and the command that helps.
    Nothing that was not seen is found.
Structure
    ::

        Evidence --each of RULES--> Findings
          of this process: `examine_process`, or `Watch` around what it does
          of another that has a feed: `examine_pid`
          of whatever: snapshots that somebody took, see `Evidence`
          of the machine alone: `examine_machine`
"""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import TYPE_CHECKING

from pagealloc.observe.backing_trial import BACKINGS, try_backing
from pagealloc.observe.doctor_evidence import Evidence, read_numa_counts, read_process_facts
from pagealloc.observe.doctor_finding import Finding
from pagealloc.observe.doctor_machine_rules import (
    cgroup_limit,
    huge_pages_not_achieved,
    max_map_count,
    numa_misses,
    thp_disabled,
)
from pagealloc.observe.doctor_use_rules import (
    HELD_FOR_S,
    budget_pressure,
    contention,
    fragmentation,
    is_fragmented,
    kv_row_straddling,
    steady_faults,
)
from pagealloc.observe.doctor_watch import Watch
from pagealloc.observe.feed_reader import read_feed
from pagealloc.observe.system_report import read_system_report

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "RULES",
    "Finding",
    "examine",
    "examine_machine",
    "examine_pid",
    "examine_process",
    "settle",
]

SETTLE_S = 0.5
"""`purge_after_s` by default: what was freed in the last moment has as long, and `HELD_FOR_S`."""

FEED_INTERVAL_S = 0.25
"""Each look costs the other process a snapshot, a tenth of a millisecond."""

RULES: dict[str, Callable[[Evidence], Finding | None]] = {
    "huge-pages-not-achieved": huge_pages_not_achieved,
    "thp-disabled": thp_disabled,
    "max-map-count": max_map_count,
    "cgroup-limit": cgroup_limit,
    "budget-pressure": budget_pressure,
    "fragmentation": fragmentation,
    "numa-misses": numa_misses,
    "contention": contention,
    "steady-faults": steady_faults,
    "kv-row-straddling": kv_row_straddling,
}
"""All rules by the names their findings have."""


def examine(evidence: Evidence) -> list[Finding]:
    """Return what the rules find in evidence, whoever gathered it.

    Parameters
    ----------
    evidence : Evidence
        Of a machine and, if it has snapshots, of one process.
    """
    found = (rule(evidence) for rule in RULES.values())
    return [finding for finding in found if finding is not None]


def examine_process(seconds: float = 2.0, root: Path = Path("/")) -> list[Finding]:
    """Watch this process for a while, and return what is wrong with its use of memory.

    Thread-safe.  Takes `seconds`; other threads work on, and what they do is what is seen.

    Parameters
    ----------
    seconds : float
        How long.  Fragmentation takes a second to tell from memory that is about to go back.
    root : Path
        Where /proc and /sys lie; another folder for a machine of a test's own.

    Raises
    ------
    ValueError
        `seconds` is not above 0.
    """
    _check_seconds(seconds)
    with Watch(root) as watch:
        time.sleep(seconds)
    return examine(watch.evidence())


def examine_pid(pid: int, seconds: float = 5.0, root: Path = Path("/")) -> list[Finding]:
    """Watch another process of this user's for a while, and return what is wrong with it.

    Thread-safe.  Takes `seconds`, less if the process ends meanwhile.

    Parameters
    ----------
    pid : int
        A process that has a feed, see `pagealloc.observe.start_feed`.
    seconds, root
        As for `examine_process`.

    Raises
    ------
    ValueError
        `seconds` is not above 0, or what answers is no pagealloc of this version.
    FileNotFoundError, ConnectionError, TimeoutError, PermissionError
        The process has no feed, is gone, does not answer, or is another user's.
    """
    _check_seconds(seconds)
    watch = Watch(root, pid=pid, read=functools.partial(read_feed, pid))
    end_s = time.monotonic() + seconds
    watch.look()
    while (left_s := end_s - time.monotonic()) > 0:
        time.sleep(min(left_s, FEED_INTERVAL_S))
        try:
            watch.look()
        except (ConnectionError, FileNotFoundError):  # it ended: what was seen will do
            break
    return examine(watch.evidence())


def _check_seconds(seconds: float) -> None:
    if not seconds > 0:
        raise ValueError(f"seconds={seconds!r}: a number above 0 is possible")


def examine_machine(root: Path = Path("/")) -> list[Finding]:
    """Return what is wrong with the machine, as far as a process that does nothing can tell.

    Each backing is tried with a few MiB.
    """
    return examine(
        Evidence(
            machine=read_system_report(root),
            process=read_process_facts(root=root),
            trials=tuple(try_backing(name) for name in BACKINGS),
            numa_after=read_numa_counts(root),
        )
    )


def settle(watch: Watch) -> None:
    """Wait at the end of a program, if what it still holds looks fragmented.

    Free memory goes back by itself; only what is still there a moment later is held.
    """
    watch.look()
    newest = watch.evidence().snapshots[-1]
    if any(is_fragmented(reading.stats) for reading in newest.allocators):
        time.sleep(HELD_FOR_S + SETTLE_S)
