"""Allocating and freeing against glibc, jemalloc, mimalloc and tcmalloc, with its bars.

A set of processes for each line, one for each allocator; every round, each does the line's work
once, in turn, starting with another one every time.  ``driver.c`` says what the works are.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import statistics
from dataclasses import dataclass
from functools import partial
from typing import Any

from bench import python_side, soak
from bench.peers import PEERS, how_to_install, missing_peers
from bench.report import machine
from bench.rows import Row, RowsReport, compare, guarded, limit_row
from bench.workers import (
    OURS,
    Drivers,
    Worker,
    compile_drivers,
    peer_versions,
    require_compiler,
    workers,
)

__all__ = ["Line", "run"]

KIB, MIB = 1 << 10, 1 << 20
TITLE = "The core, measured"
PEER_NAMES = tuple(peer.name for peer in PEERS)


@dataclass(frozen=True)
class Effort:
    """How long everything takes."""

    n_rounds: int
    work_ns: int
    """What one work of one round takes, at least."""
    n_latency_periods: int
    """A period of KV churn is 16,384 allocations."""
    python: python_side.Effort
    soak: soak.Plan


def full_effort(n_rounds: int) -> Effort:
    return Effort(n_rounds, 20_000_000, 8, python_side.Effort(n_rounds, 20_000), soak.Plan(120))


def quick_effort(n_rounds: int) -> Effort:
    """Many short rounds: what disturbs then hits some of them, and no median."""
    plan = soak.Plan(18, window_s=0.125, switch_s=1)
    return Effort(n_rounds, 2_500_000, 3, python_side.Effort(n_rounds, 3_000), plan)


def size_name(nbytes: int) -> str:
    return f"{nbytes // MIB} MiB" if nbytes >= MIB else f"{nbytes // KIB} KiB"


@dataclass(frozen=True)
class Line:
    """A work of the driver, and the bar that it is judged by."""

    bar: str
    to_reach: float
    work: str
    """As the driver names it."""
    nbytes: int
    align_bytes: int = 0
    touched: bool = False

    @property
    def text(self) -> str:
        """What the table calls it."""
        size = size_name(self.nbytes)
        return {
            "hot": f"hot {size}",
            "random": f"1,000 random live blocks of {size}",
            "kv": f"KV churn {size}",
            "cross": f"batched cross-thread free {size}",
            "kv_latency": f"P99.9 of one allocation, KV churn {size}",
        }[self.work] + (
            (f", aligned to {size_name(self.align_bytes)}" if self.align_bytes else "")
            + (", touched, one byte a page" if self.touched else "")
        )

    def numbers(self, effort: Effort) -> tuple[int, ...]:
        """Return the work's numbers for the driver."""
        if self.work == "cross":
            return (self.nbytes, 0, effort.work_ns)
        if self.work == "kv_latency":
            return (self.nbytes, effort.n_latency_periods)
        second = int(self.touched) if self.work == "kv" else self.align_bytes
        return (self.nbytes, second, effort.work_ns)

    @property
    def field(self) -> str:
        """Which figure of the driver's answer is compared."""
        return "p999" if self.work == "kv_latency" else "ns"


SMALL_BYTES = (4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB)
LARGE_BYTES = (1 * MIB, 2 * MIB, 16 * MIB)
FLAT_BYTES = tuple(4 * KIB << shift for shift in range(15))  # 4 KiB … 64 MiB

LINES = (
    *(Line("1", 1.25, work, nbytes) for work in ("hot", "random") for nbytes in SMALL_BYTES),
    *(Line("2", 0.4, work, nbytes) for work in ("hot", "random") for nbytes in LARGE_BYTES),
    Line("3.64KiB", 0.5, "kv", 64 * KIB),
    Line("3.2MiB", 0.17, "kv", 2 * MIB),
    Line("4", 0.125, "hot", 2 * MIB, align_bytes=2 * MIB),
    *(Line("5.small", 0.67, "cross", nbytes) for nbytes in (4 * KIB, 16 * KIB)),
    *(Line("5.large", 0.4, "cross", nbytes) for nbytes in (64 * KIB, 2 * MIB)),
    Line("6", 1.10, "kv", 64 * KIB, touched=True),
    Line("7", 0.7, "kv_latency", 64 * KIB),
)


def measure_line(line: Line, drivers: Drivers, effort: Effort) -> list[Row]:
    """Measure one line on everyone; bar 6 gives two rows, time and page faults."""
    with workers(drivers) as everyone:
        answers = interleave(everyone, line, effort)
    per_peer = {
        name: [answer[line.field] for answer in answers[name]] if name in answers else None
        for name in PEER_NAMES
    }
    ours = [answer[line.field] for answer in answers[OURS]]
    rows = [compare(line.bar, line.text, line.to_reach, ours, per_peer)]
    if line.touched:
        faults = {
            name: max(answer["faults"] for answer in answers[name]) if name in answers else None
            for name in (OURS, *PEER_NAMES)
        }
        text = "page faults of a round in steady state, the most of all rounds"
        our_faults = faults.pop(OURS)
        rows.append(limit_row(line.bar, text, 0, our_faults, "faults", peers=faults))
    return rows


def interleave(
    everyone: dict[str, Worker], line: Line, effort: Effort
) -> dict[str, list[dict[str, Any]]]:
    """Have everyone do the line's work every round; the first round only warms up."""
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in everyone}
    names = list(everyone)
    numbers = line.numbers(effort)
    for round_ in range(-1, effort.n_rounds):
        first = round_ % len(names)
        for name in names[first:] + names[:first]:
            answer = everyone[name].ask(line.work, *numbers)
            if round_ >= 0:
                answers[name].append(answer)
    return answers


def measure_flatness(drivers: Drivers, effort: Effort) -> Row:
    """Measure our slowest size by our fastest, all sizes in turn every round.

    Medians are compared: the maximum of single rounds would be that of the noise.
    """
    times: dict[int, list[float]] = {nbytes: [] for nbytes in FLAT_BYTES}
    with workers(drivers, peers=()) as everyone:
        for _ in range(effort.n_rounds):
            for nbytes, per_size in times.items():
                numbers = Line("2.flat", 2, "hot", nbytes).numbers(effort)
                per_size.append(everyone[OURS].ask("hot", *numbers)["ns"])
    medians = {nbytes: statistics.median(per_size) for nbytes, per_size in times.items()}
    slowest = max(medians, key=lambda nbytes: medians[nbytes])
    fastest = min(medians, key=lambda nbytes: medians[nbytes])
    ratio = medians[slowest] / medians[fastest]
    text = f"hot, 4 KiB … 64 MiB: slowest ({size_name(slowest)}) ÷ fastest ({size_name(fastest)})"
    reference: dict[str, float | None] = {"our fastest": medians[fastest]}
    return Row("2.flat", text, medians[slowest], reference, "ns", ratio, 2, ratio <= 2)


def measure_sampling(drivers: Drivers, effort: Effort) -> Row:
    """Measure what histograms add to every allocation: as they are, less switched off."""
    line = Line("sampling", 1, "hot", 64 * KIB)
    numbers = line.numbers(effort)
    added, without = [], []
    with (
        contextlib.closing(Worker.of_ours(drivers)) as on,
        contextlib.closing(Worker.of_ours(drivers, settings=("time_every=0",))) as off,
    ):
        for _ in range(effort.n_rounds):
            without.append(off.ask(line.work, *numbers)["ns"])
            added.append(on.ask(line.work, *numbers)["ns"] - without[-1])
    text = f"{line.text}: what the sampled latency histograms add"
    reference: dict[str, float | None] = {"switched off": statistics.median(without)}
    return limit_row(line.bar, text, line.to_reach, statistics.median(added), "ns", peers=reference)


def numpy_rows() -> list[Row]:
    """Return the line on NumPy's own tests, from the module that runs them, if there is one."""
    if importlib.util.find_spec("bench.numpy_tests") is None:
        return []
    entry: dict[str, Any] = importlib.import_module("bench.numpy_tests").entry()
    return [Row(**{name: entry[name] for name in Row.__dataclass_fields__ if name in entry})]


def run(rounds: int, *, quick: bool = False) -> RowsReport:
    """Measure everything: minutes, or about one if `quick`."""
    require_compiler()
    effort = quick_effort(min(rounds, 15)) if quick else full_effort(rounds)
    missing = missing_peers()
    notes = [how_to_install(missing)] if missing else []
    rows: list[Row] = []
    with compile_drivers() as drivers:
        facts = machine() | {
            "peers": ", ".join(
                f"{name} {version}" for name, version in peer_versions(drivers).items()
            ),
            "effort": f"{effort.n_rounds} rounds, {effort.soak.total_s / 60:g} minutes of soak",
        }
        for line in LINES:
            measured = partial(measure_line, line, drivers, effort)
            rows += guarded(line.bar, line.text, line.to_reach, measured)
        rows += guarded("2.flat", "hot, flatness", 2, lambda: [measure_flatness(drivers, effort)])
        sampling = partial(measure_sampling, drivers, effort)
        rows += guarded("sampling", "latency histograms", 1, lambda: [sampling()])
        rows += guarded("11", "Python", 1, lambda: python_side.rows(effort.python))
        rows += guarded("12", "NumPy's array tests", 1, numpy_rows)
        rows += guarded("13", "soak", 1, lambda: soak.rows(effort.soak, drivers))
    order = {row.bar: number for number, row in reversed(list(enumerate(rows)))}
    order["2.flat"] = order["2"]
    rows.sort(key=lambda row: order[row.bar])
    return RowsReport("core", TITLE, rows, facts, PEER_NAMES, notes)
