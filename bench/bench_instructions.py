"""Instructions of one hot allocation and free, counted by callgrind: no clock, no noise.

Each allocator's process runs under ``valgrind --tool=callgrind``, which executes the same code as
the machine would and counts it: for the same binaries the same figures everywhere.  The loop and
its calls, some ten instructions, are counted with all of them.
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.bench_core import PEER_NAMES, size_name
from bench.peers import PEERS, how_to_install, missing_peers
from bench.report import machine
from bench.rows import Row, RowsReport, compare
from bench.workers import OURS, Drivers, Worker, compile_drivers, require_compiler

__all__ = ["run"]

KIB, MIB = 1 << 10, 1 << 20
BARS = {4 * KIB: 1.25, 16 * KIB: 1.25, 64 * KIB: 1.25, 256 * KIB: 1.25, MIB: 0.4, 2 * MIB: 0.4}
"""By block size: as in bars 1 and 2 of `core`, which are about time."""

PAIRS_A_ROUND = 400


def require_valgrind() -> None:
    """End the command where nothing can be counted."""
    if shutil.which("valgrind") is None:
        sys.exit("instructions are counted by valgrind: install the Debian package valgrind")


def count(start: Any, n_pairs: int) -> list[float]:
    """Return what one pair executes, for each size; `start` makes a Worker run under a command."""
    with tempfile.TemporaryDirectory(prefix="pagealloc-bench-") as folder:
        out = Path(folder, "out")
        callgrind = (
            *("valgrind", "-q", "--tool=callgrind", f"--callgrind-out-file={out}"),
            *("--toggle-collect=counted_pairs", "--dump-after=counted_pairs"),
        )
        worker = start(callgrind)
        try:
            for nbytes in BARS:
                worker.ask("hot_counted", nbytes, 0, n_pairs)
        finally:
            worker.close()
        dumps = [out.with_name(f"out.{number}") for number in range(1, len(BARS) + 1)]
        return [instructions_of(dump.read_text()) / n_pairs for dump in dumps]


def instructions_of(dump: str) -> int:
    found = re.search(r"^summary: (\d+)$", dump, re.MULTILINE)
    assert found, "callgrind wrote no summary"
    return int(found[1])


def count_everyone(drivers: Drivers, n_pairs: int) -> dict[str, list[float]]:
    counts = {OURS: count(lambda under: Worker.of_ours(drivers, under), n_pairs)}
    for peer in PEERS:
        if peer.is_installed():

            def start(under: tuple[str, ...], peer: Any = peer) -> Worker:
                return Worker.of_peer(peer, drivers, under)

            counts[peer.name] = count(start, n_pairs)
    return counts


def run(rounds: int) -> RowsReport:
    """Count `rounds` x 400 pairs of each size; some 20 seconds."""
    require_compiler()
    require_valgrind()
    missing = missing_peers()
    with compile_drivers() as drivers:
        counts = count_everyone(drivers, rounds * PAIRS_A_ROUND)
    rows = [
        compare(
            "instructions",
            f"hot {size_name(nbytes)}",
            to_reach,
            [counts[OURS][i]],
            {name: [counts[name][i]] if name in counts else None for name in PEER_NAMES},
            unit="instr.",
        )
        for i, (nbytes, to_reach) in enumerate(BARS.items())
    ]
    most, least = max(counts[OURS]), min(counts[OURS])
    rows.append(
        Row(
            "instructions.flat",
            "our largest count ÷ our smallest",
            most,
            {"our smallest": least},
            "instr.",
            most / least,
            1.1,
            most / least <= 1.1,
        )
    )
    notes = [how_to_install(missing)] if missing else []
    return RowsReport("instructions", "Instructions, counted", rows, machine(), PEER_NAMES, notes)
