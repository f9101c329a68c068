"""Report: what was measured, on which machine, and whether it is good enough."""

from __future__ import annotations

import datetime as dt
import json
import os
import platform
import statistics
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import pagealloc

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Bar", "Report", "Timing", "interleave"]


@dataclass(frozen=True)
class Timing:
    """The times of one case."""

    name: str
    median_ns: float
    best_ns: float
    n_rounds: int


@dataclass(frozen=True)
class Bar:
    """A figure that must not be missed."""

    name: str
    value: float
    limit: float
    unit: str
    at_least: bool

    @property
    def holds(self) -> bool:
        """Whether the figure is good enough."""
        return self.value >= self.limit if self.at_least else self.value < self.limit

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<"
        verdict = "holds" if self.holds else "MISSED"
        return (
            f"{self.name}: {self.value:.3g}{self.unit} ({sign} {self.limit:g}{self.unit}) {verdict}"
        )


@dataclass(frozen=True)
class Report:
    """One benchmark's result.

    Parameters
    ----------
    title : str
        What was measured.
    timings : list of Timing
        All cases; the table shows each as a multiple of the first.
    bars : list of Bar
        What must hold.
    notes : list of str
        Printed below the table.
    """

    title: str
    timings: list[Timing]
    bars: list[Bar] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """Whether every bar holds."""
        return all(bar.holds for bar in self.bars)

    def __str__(self) -> str:
        width = max(len(timing.name) for timing in self.timings)
        first = self.timings[0]
        lines = [self.title, *(f"  {name}: {value}" for name, value in machine().items()), ""]
        lines.append(f"{'':{width}}  {'median':>11}  {'best':>11}  {'to first':>9}")
        lines += [
            f"{timing.name:{width}}  {timing.median_ns / 1000:>8.1f} us  "
            f"{timing.best_ns / 1000:>8.1f} us  {timing.median_ns / first.median_ns:>8.2f}x"
            for timing in self.timings
        ]
        return "\n".join([*lines, "", *self.notes, *(str(bar) for bar in self.bars)])

    def write_json(self, path: Path) -> None:
        """Write everything the table shows, and the machine, to a file."""
        content = {
            "title": self.title,
            "machine": machine(),
            "timings": [asdict(timing) for timing in self.timings],
            "bars": [{**asdict(bar), "holds": bar.holds} for bar in self.bars],
            "notes": self.notes,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n")


def interleave(cases: dict[str, Callable[[], int]], rounds: int) -> list[Timing]:
    """Run all cases in turn, `rounds` times; each measures itself and returns nanoseconds."""
    times_ns: dict[str, list[int]] = {name: [] for name in cases}
    for case in cases.values():
        case()  # warms code and allocator, not the memory a cold case is about
    for _ in range(rounds):
        for name, case in cases.items():
            times_ns[name].append(case())
    return [Timing(name, statistics.median(ns), min(ns), rounds) for name, ns in times_ns.items()]


def machine() -> dict[str, Any]:
    """Return what the figures depend on."""
    return {
        "date": dt.datetime.now(dt.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": f"{_cpu_name()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        "kernel": f"{platform.system()} {platform.release()}, {platform.machine()}, "
        f"pages of {pagealloc.page_size_bytes()} bytes, THP {_thp_state()}",
        "versions": f"pagealloc {pagealloc.__version__}, NumPy {np.__version__}, "
        f"Python {sys.version.split()[0]}",
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown CPU"


def _thp_state() -> str:
    try:
        text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return "unknown"
    return text.partition("[")[2].partition("]")[0]
