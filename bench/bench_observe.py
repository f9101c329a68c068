"""What observability costs when it is off: instructions, beside a build that has none of it.

The same checkout is built once more with ``PAGEALLOC_UNOBSERVED=1``: without the questions that the
profilers of the heap and of contention hook into.  callgrind counts both: a pair of calls through
the C API, and a Buffer made and closed in Python.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.bench_instructions import count, instructions_of, require_valgrind
from bench.installed import ROOT, environment
from bench.report import machine
from bench.rows import Row, RowsReport
from bench.workers import OURS, Drivers, Worker, compile_drivers, require_compiler

__all__ = ["run"]

TO_REACH = 1.01
PAIRS_A_ROUND = 400
PYTHON_SIZES = {"64 B": 64, "64 KiB": 65536}
UNOBSERVED = "unobserved"

PYTHON_PAIRS = """
import sys
import pagealloc
with pagealloc.PageAllocator(time_every=0, purge_after_s=None) as allocator:
    alloc, nbytes = allocator.alloc, int(sys.argv[1])
    for _ in range(int(sys.argv[2])):
        alloc(nbytes).close()
"""


def build_unobserved(folder: Path) -> dict[str, str]:
    """Build and install into a folder, and return the environment that imports it from there."""
    print("building the checkout with PAGEALLOC_UNOBSERVED=1", file=sys.stderr, flush=True)
    command = (sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder, ROOT)
    subprocess.run(command, env=os.environ | {"PAGEALLOC_UNOBSERVED": "1"}, check=True)
    return environment() | {"PYTHONPATH": str(folder)}


def python_pair_instructions(env: dict[str, str], nbytes: int, n_pairs: int) -> float:
    """Return what one Buffer made and closed executes: more of them, less fewer of them."""
    return (_whole_run(env, nbytes, 2000 + n_pairs) - _whole_run(env, nbytes, 2000)) / n_pairs


def _whole_run(env: dict[str, str], nbytes: int, n_pairs: int) -> int:
    with tempfile.TemporaryDirectory(prefix="pagealloc-bench-") as folder:
        out = Path(folder, "out")
        command = (
            *("valgrind", "-q", "--tool=callgrind", f"--callgrind-out-file={out}"),
            *(sys.executable, "-c", PYTHON_PAIRS, str(nbytes), str(n_pairs)),
        )
        subprocess.run(command, env=env | {"PYTHONHASHSEED": "0"}, cwd=folder, check=True)
        return instructions_of(out.read_text())


def c_pair_instructions(drivers: Drivers, env: dict[str, str], n_pairs: int) -> list[float]:
    """Return what a pair executes through the C API, for each size of `instructions`."""

    def start(under: tuple[str, ...]) -> Worker:
        worker = str(ROOT / "bench/worker.py")
        command = [*under, sys.executable, worker, str(drivers.library), "time_every=0"]
        return Worker(OURS, command, env)

    return count(start, n_pairs)


def run(rounds: int) -> RowsReport:
    """Count `rounds` x 400 pairs; a build, and then about a minute."""
    require_compiler()
    require_valgrind()
    n_pairs = rounds * PAIRS_A_ROUND
    with tempfile.TemporaryDirectory(prefix="pagealloc-unobserved-") as folder:
        builds = {OURS: environment(), UNOBSERVED: build_unobserved(Path(folder))}
        counts: dict[str, dict[str, float]] = {name: {} for name in builds}
        with compile_drivers() as drivers:
            for name, env in builds.items():
                counts[name]["a pair through the C API"] = max(
                    c_pair_instructions(drivers, env, n_pairs)
                )
                for size, nbytes in PYTHON_SIZES.items():
                    counts[name][f"alloc({size}).close() in Python"] = python_pair_instructions(
                        env, nbytes, n_pairs
                    )
    rows = [_row(work, ours, counts[UNOBSERVED][work]) for work, ours in counts[OURS].items()]
    return RowsReport("observe", "Observability that is off", rows, machine(), [UNOBSERVED])


def _row(work: str, ours: float, unobserved: float) -> Row:
    ratio = ours / unobserved
    holds = ratio <= TO_REACH
    peers: dict[str, float | None] = {UNOBSERVED: unobserved}
    return Row("off", work, ours, peers, "instr.", ratio, TO_REACH, holds)
