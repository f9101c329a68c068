"""Memory given back: huge pages, idleness, sparse blocks, limits, and anything at any time.

The works of ``memory_side.py`` run in processes of their own, one after the other.  That of line 9
runs in ``driver.c``, for everyone in turn: this process looks at the machine's memory from outside,
so that nothing is asked of an allocator that is to give memory back by itself.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from bench import physical
from bench.installed import ROOT, environment
from bench.peers import PEERS, how_to_install, missing_peers
from bench.report import machine
from bench.rows import Row, RowsReport, guarded, limit_row, median_ratio
from bench.workers import (
    OURS,
    WorkerError,
    compile_drivers,
    peer_versions,
    require_compiler,
    workers,
)

if TYPE_CHECKING:
    from bench.workers import Worker

__all__ = ["run"]

TITLE = "Memory given back, measured"
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
IDLE_S = 1.0
"""How long nobody calls the allocator."""
PEER_NAMES = tuple(peer.name for peer in PEERS)


@dataclass(frozen=True)
class Effort:
    """How much is done."""

    n_rounds: int
    fill_bytes: int
    retained_bytes: int
    sparse_bytes: int
    n_cycles: int
    n_steps: int


def full_effort(n_rounds: int) -> Effort:
    return Effort(n_rounds, GIB, GIB, 256 * MIB, 1000, 2_000_000)


def quick_effort(n_rounds: int) -> Effort:
    return Effort(min(n_rounds, 3), GIB, 256 * MIB, 64 * MIB, 20, 40_000)


def in_process(work: str, *arguments: object) -> dict[str, Any]:
    """Have a work of ``memory_side.py`` done by the pagealloc imported here."""
    result = subprocess.run(
        [sys.executable, "-P", "-m", "bench.memory_side", work, *map(str, arguments)],
        env=environment(ROOT),
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        raise WorkerError(f"memory_side {work}: code {result.returncode}\n{result.stderr}")
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


# --- the lines ---


def fill_rows(effort: Effort) -> list[Row]:
    """Return lines 8: time and page faults of a first touch."""
    answer = in_process("fill", effort.n_rounds, effort.fill_bytes)
    ours, base = answer["ours"], answer["base pages"]
    work = f"prefault and fill {effort.fill_bytes // MIB} MiB ({answer['backing']})"
    ms, base_ms = ([ns / 1e6 for ns in case["ns"]] for case in (ours, base))
    time_ratio = median_ratio(ms, base_ms)
    faults, base_faults = (statistics.median(case["faults"]) for case in (ours, base))
    fault_ratio = faults / base_faults
    return [
        Row(
            "8.time",
            work,
            statistics.median(ms),
            {"base pages": statistics.median(base_ms)},
            "ms",
            time_ratio,
            0.25,
            time_ratio <= 0.25,
        ),
        Row(
            "8.faults",
            f"{work}, median of the rounds ({max(ours['faults']):,} at most)",
            faults,
            {"base pages": base_faults},
            "faults",
            fault_ratio,
            1 / 500,
            fault_ratio <= 1 / 500,
        ),
    ]


def share_kept(worker: Worker, nbytes: int) -> float:
    """Return which share of what two threads freed is still held after a second of idleness."""
    block_bytes, n_threads = 64 * KIB, 2
    worker.ask("identity")  # has answered once: whatever that costs is paid
    time.sleep(0.2)  # of the one before, nothing is on its way back any more
    before = physical.used_bytes()
    worker.ask("retain", block_bytes, nbytes // block_bytes // n_threads)
    full = physical.used_bytes()
    worker.ask("release")
    time.sleep(IDLE_S)
    kept = physical.used_bytes()
    worker.ask("retire")
    return max(0.0, (kept - before) / (full - before))


def idle_rows(effort: Effort) -> list[Row]:
    """Return line 9: everyone in a process of its own, in turn every round."""
    with compile_drivers() as drivers:
        shares: dict[str, list[float]] = {name: [] for name in (OURS, *PEER_NAMES)}
        for _ in range(max(3, min(effort.n_rounds, 7))):
            with workers(drivers) as everyone:
                for name, worker in everyone.items():
                    shares[name].append(100 * share_kept(worker, effort.retained_bytes))
    medians = {name: statistics.median(per) if per else None for name, per in shares.items()}
    ours = medians.pop(OURS)
    work = (
        f"{effort.retained_bytes // MIB} MiB in blocks of 64 KiB, freed by two threads that then "
        f"sleep: held {IDLE_S:g} s later"
    )
    return [limit_row("9", work, 5, ours, "%", peers=medians)]


def sparse_rows(effort: Effort) -> list[Row]:
    """Return lines 10: what is held after trim() while few blocks are live."""
    rows = []
    for step, to_reach in ((4, 1.05), (32, 1.2)):
        for backing in ("base", "thp"):
            asked = ("stride", backing, step, effort.sparse_bytes)
            answers = [in_process(*asked) for _ in range(min(effort.n_rounds, 5))]
            held, full, live = (
                statistics.median(answer[name] for answer in answers)
                for name in ("held_bytes", "full_bytes", "live_bytes")
            )
            work = (
                f"one of {step} blocks of 16 KiB of {effort.sparse_bytes // MIB} MiB kept, trim(), "
                f"{backing}: held ÷ live"
            )
            before: dict[str, float | None] = {"before": full / live}
            intact = all(answer["intact"] for answer in answers)
            ratio = held / live if intact else None
            note = "" if intact else "what was kept is not what was written"
            bar = f"10.stride{step}"
            rows.append(limit_row(bar, work, to_reach, ratio, "×", peers=before, note=note))
    return rows


def limit_rows(effort: Effort) -> list[Row]:
    """Return line 14."""
    answer = in_process("limit", effort.n_cycles)
    work = (
        f"{effort.n_cycles:,} times until refused under RLIMIT_DATA of 512 MiB "
        f"({answer['fewest']} to {answer['most']} MiB each time), all freed: not a clear error"
    )
    return [limit_row("14", work, 0, answer["n_unclear"], "times")]


def chaos_rows(effort: Effort) -> list[Row]:
    """Return lines 15."""
    answer = in_process("chaos", effort.n_steps)
    counts = ", ".join(f"{n:,} {name}" for name, n in answer["counts"].items())
    work = f"{sum(answer['counts'].values()):,} steps of 4 threads ({counts})"
    note = "; ".join(answer["errors"])
    return [
        limit_row(
            "15",
            f"{work}: what check() and the blocks' owners found wrong",
            0,
            answer["n_errors"],
            "errors",
            note=note,
        ),
        limit_row("15", "the same, everything freed: left", 0, answer["leaked_bytes"], "bytes"),
    ]


LINES = {
    "8": ("first touch", fill_rows),
    "9": ("idle memory", idle_rows),
    "10": ("sparse blocks", sparse_rows),
    "14": ("a limit", limit_rows),
    "15": ("anything at any time", chaos_rows),
}


def run(rounds: int, *, quick: bool = False) -> RowsReport:
    """Measure everything: some minutes, or less than one if `quick`."""
    require_compiler()
    effort = quick_effort(rounds) if quick else full_effort(rounds)
    missing = missing_peers()
    notes = [how_to_install(missing)] if missing else []
    with compile_drivers() as drivers:
        versions = peer_versions(drivers)
    facts = machine() | {
        "peers": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "physical memory": f"by {physical.source()}",
    }
    rows: list[Row] = []
    for bar, (text, measure) in LINES.items():
        rows += guarded(bar, text, 1, partial(measure, effort))
    return RowsReport("memory", TITLE, rows, facts, PEER_NAMES, notes)
