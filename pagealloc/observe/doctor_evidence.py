"""Evidence: all that the doctor's rules look at.

Purpose
    What the kernel says of the machine and of one process, beside what the process counts itself.
    Rules read this and nothing else, so a test brings evidence of its own, and whoever has
    snapshots of another process can have it examined.
Structure
    ::

        SystemReport, ProcessFacts, NumaCounts, Snapshots, Trials --> Evidence --> rules
Units
    Bytes, nanoseconds, pages and counts, as the names say.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pagealloc.observe.backing_trial import Trial
    from pagealloc.observe.snapshot import AllocatorReading, CacheReading, Snapshot
    from pagealloc.observe.system_report import SystemReport

__all__ = [
    "Evidence",
    "NumaCounts",
    "ProcessFacts",
    "parse_cpus",
    "read_numa_counts",
    "read_process_facts",
]

NODE_FOLDER = "sys/devices/system/node"


class ProcessFacts(NamedTuple):
    """What the kernel says of one process; None where it does not."""

    n_mappings: int | None = None
    """Lines of its maps, of which there may be ``vm.max_map_count``."""
    allows_thp: bool | None = None
    """False: prctl(PR_SET_THP_DISABLE), its own or its parent's, forbids it huge pages."""
    cpus: frozenset[int] | None = None
    """The CPUs it may run on."""


NOTHING_KNOWN = ProcessFacts()


class NumaCounts(NamedTuple):
    """Pages that the kernel placed since it started, of all nodes and processes."""

    n_hit_pages: int = 0
    """On the node they were meant for."""
    n_miss_pages: int = 0
    """On another one, for theirs had no memory left."""
    n_remote_pages: int = 0
    """On another one than that whose CPU asked, wanted or not."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What is known of a machine, and of a process on it.

    Parameters
    ----------
    machine : SystemReport
        At the worst moment, where it was read several times.
    snapshots : tuple of Snapshot
        Of one process, oldest first.  Two some seconds apart do; the more there are, the more is
        seen of what passes.  None: only the machine is examined.
    process : ProcessFacts
        At the moment of most mappings.
    trials : tuple of Trial
        What came of asking for backings here.
    unavailable : tuple of str
        What `BackingUnavailableError` said that nobody caught: an allocator or cache of which
        nothing is left to be seen.
    numa_before, numa_after : NumaCounts or None
        Around the snapshots.
    """

    machine: SystemReport
    snapshots: tuple[Snapshot, ...] = ()
    process: ProcessFacts = NOTHING_KNOWN
    trials: tuple[Trial, ...] = ()
    unavailable: tuple[str, ...] = ()
    numa_before: NumaCounts | None = None
    numa_after: NumaCounts | None = None

    @property
    def span_s(self) -> float:
        """How long the snapshots reach; 0 with fewer than two."""
        return self.snapshots[-1].time_s - self.snapshots[0].time_s if self.snapshots else 0.0

    def allocator_series(self) -> dict[str, list[tuple[float, AllocatorReading]]]:
        """Return all readings of each allocator by its name, each behind its time."""
        series: dict[str, list[tuple[float, AllocatorReading]]] = {}
        for snapshot in self.snapshots:
            for reading in snapshot.allocators:
                series.setdefault(reading.name, []).append((snapshot.time_s, reading))
        return series

    def cache_series(self) -> dict[str, list[CacheReading]]:
        """Return all readings of each cache by its name."""
        series: dict[str, list[CacheReading]] = {}
        for snapshot in self.snapshots:
            for reading in snapshot.caches:
                series.setdefault(reading.name, []).append(reading)
        return series


def read_process_facts(pid: int | None = None, root: Path = Path("/")) -> ProcessFacts:
    """Read what /proc says of a process; by default of this one.

    Parameters
    ----------
    pid : int, optional
    root : Path
        Another folder than ``/`` for a machine of a test's own.
    """
    folder = root / "proc" / ("self" if pid is None else str(pid))
    try:
        with (folder / "maps").open("rb") as file:
            n_mappings = sum(1 for _ in file)
    except OSError:
        n_mappings = None
    try:
        status = (folder / "status").read_text(encoding="utf-8", errors="replace")
    except OSError:
        status = ""
    allowed = re.search(r"^THP_enabled:\s+([01])$", status, re.MULTILINE)
    cpus = re.search(r"^Cpus_allowed_list:\s+(\S+)$", status, re.MULTILINE)
    return ProcessFacts(
        n_mappings=n_mappings,
        allows_thp=None if allowed is None else allowed[1] == "1",
        cpus=None if cpus is None else parse_cpus(cpus[1]),
    )


def read_numa_counts(root: Path = Path("/")) -> NumaCounts | None:
    """Read the nodes' counters, see numastat(8); None where there are none."""
    totals: dict[str, int] = {}
    for path in (root / NODE_FOLDER).glob("node*/numastat"):
        try:
            text = path.read_text(encoding="ascii", errors="replace")
        except OSError:
            continue
        for name, count in re.findall(r"^(\w+) (\d+)$", text, re.MULTILINE):
            totals[name] = totals.get(name, 0) + int(count)
    if not totals:
        return None
    return NumaCounts(
        totals.get("numa_hit", 0), totals.get("numa_miss", 0), totals.get("other_node", 0)
    )


def parse_cpus(text: str) -> frozenset[int]:
    """Return the CPUs of a list as the kernel writes it: ``0-3,8``.

    What is no such list is no CPU.
    """
    cpus: set[int] = set()
    for first, last in re.findall(r"(?:^|,)(\d{1,6})(?:-(\d{1,6}))?(?=,|$)", text.strip()):
        cpus.update(range(int(first), int(last or first) + 1))
    return frozenset(cpus)
