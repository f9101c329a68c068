"""Watch: evidence of a process, gathered while it works.

Purpose
    Take snapshots in a thread of its own, few enough to be kept and cheap enough to be left out of
    what they show.
Structure
    ::

        thread: every so often  Snapshot, ProcessFacts, SystemReport --> kept, thinned out
        evidence()              all of it, and what the kernel counted meanwhile
Invariants
    len(kept) <= MOST_SNAPSHOTS; the first and the newest are among them
    the thread sleeps at least SLEEP_FACTOR times as long as it looks
Locking
    One lock around what is kept.
Units
    Seconds.
"""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

from pagealloc.observe.doctor_evidence import (
    Evidence,
    ProcessFacts,
    read_numa_counts,
    read_process_facts,
)
from pagealloc.observe.snapshot import take_snapshot
from pagealloc.observe.system_report import read_system_report

if TYPE_CHECKING:
    from collections.abc import Callable

    from pagealloc.observe.snapshot import Snapshot
    from pagealloc.observe.system_report import SystemReport

__all__ = ["Watch"]

FIRST_INTERVAL_S = 0.02
"""Short at first: a short program is over soon."""

MOST_SNAPSHOTS = 128
"""When there are more, every other one goes, and the interval doubles."""

SLEEP_FACTOR = 20
"""So looking takes at most a twentieth of one core, however many arenas there are."""


class Watch:
    """Watches a process: by a thread from ``with`` on, until its end or `stop`; or by `look` alone.

    Thread-safe.

    Parameters
    ----------
    root : Path
        Where the machine's /proc and /sys lie; another folder for a machine of a test's own.
    pid : int, optional
        Another process than this one.
    read : callable
        Takes a snapshot of that process.
    """

    def __init__(
        self,
        root: Path = Path("/"),
        *,
        pid: int | None = None,
        read: Callable[[], Snapshot] = take_snapshot,
    ) -> None:
        self._root = root
        self._pid = pid
        self._read = read
        self._lock = threading.Lock()
        self._is_over = threading.Event()
        self._interval_s = FIRST_INTERVAL_S
        self._snapshots: list[Snapshot] = []
        self._process = ProcessFacts()
        self._machine: SystemReport | None = None
        self._numa_before = read_numa_counts(root)
        self._thread = threading.Thread(target=self._watch, name="pagealloc-doctor", daemon=True)

    def __enter__(self) -> Self:
        self.look()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Look a last time, and no more.  A second call does nothing."""
        if not self._is_over.is_set():
            self._is_over.set()
            self._thread.join()
            self.look()

    def look(self) -> None:
        """Take one snapshot, and read what the kernel says.

        Raises
        ------
        OSError, ValueError
            As `read`.
        """
        snapshot = self._read()
        process = read_process_facts(self._pid, self._root)
        machine = self._read_machine()
        with self._lock:
            self._snapshots.append(snapshot)
            if len(self._snapshots) > MOST_SNAPSHOTS:
                newest = self._snapshots.pop()
                self._snapshots = [*self._snapshots[::2], newest]
                self._interval_s *= 2
            self._process = _worse_process(self._process, process)
            self._machine = _worse_machine(self._machine, machine)

    def evidence(self) -> Evidence:
        """Return what was seen so far."""
        with self._lock:
            return Evidence(
                machine=self._machine or self._read_machine(),
                snapshots=tuple(self._snapshots),
                process=self._process,
                numa_before=self._numa_before,
                numa_after=read_numa_counts(self._root),
            )

    def _read_machine(self) -> SystemReport:
        """Read the report; without a control group that is ours and not the other process's."""
        machine = read_system_report(self._root)
        if self._pid is None or _is_in_our_group(self._root, self._pid):
            return machine
        return replace(machine, cgroup=None)

    def _watch(self) -> None:
        interval_s = self._interval_s
        while not self._is_over.wait(interval_s):
            started_s = time.thread_time()  # not waiting for the GIL, which takes nobody's time
            self.look()
            interval_s = max(self._interval_s, SLEEP_FACTOR * (time.thread_time() - started_s))


def _is_in_our_group(root: Path, pid: int) -> bool:
    try:
        ours, its = ((root / f"proc/{each}/cgroup").read_bytes() for each in ("self", pid))
    except OSError:
        return False
    return ours == its


def _worse_process(before: ProcessFacts, now: ProcessFacts) -> ProcessFacts:
    """Return what is true now, with the most mappings there were."""
    counts = [each.n_mappings for each in (before, now) if each.n_mappings is not None]
    return now._replace(
        n_mappings=max(counts, default=None),
        allows_thp=False if before.allows_thp is False else now.allows_thp,
    )


def _worse_machine(before: SystemReport | None, now: SystemReport) -> SystemReport:
    """Return the report of the moment at which the control group had least left."""
    if before is None or before.cgroup is None or now.cgroup is None:
        return now
    rest_bytes, rest_before = now.cgroup.available_bytes, before.cgroup.available_bytes
    is_before_worse = (
        rest_before is not None and rest_bytes is not None and rest_before < rest_bytes
    )
    return before if is_before_worse else now
