"""Soak: an engine's allocations for an hour, pagealloc and glibc by turns.

Requests of a 256-token prompt and 64 decoded tokens come in batches: 16 blocks of 64 KiB each for
the prompts, then a block each for every 16 tokens, then all are freed.  Of every block one byte a
page is written, which is not timed; every single allocation is.  The batch size, 1 to 32, follows
an exponential distribution and changes every 10 seconds.  Two processes take turns, half a second
each, so both see the same load and the same disturbances.

The batch sizes of the first third of the run come again in the second and in the last: drift
compares like with like.

``python bench/soak.py --minutes 60`` prints the figures, writes JSON and a picture.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run by its path
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from bench.installed import prefer_installed_package
from bench.peers import PEERS
from bench.rows import Row, limit_row, table
from bench.workers import OURS, Drivers, compile_drivers, require_compiler, workers

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Plan", "batch_sizes", "drift", "measure", "rows", "write_picture"]

BLOCK_BYTES = 64 << 10
MAX_BATCH, MEAN_BATCH = 32, 8
OTHER = "glibc"
BAR_P99, BAR_DRIFT_PERCENT = 0.38, 10
PICTURE = Path(".benchmarks/soak.png")


@dataclass(frozen=True)
class Plan:
    """How long, in seconds: the run, a window of one allocator, a batch size."""

    total_s: float
    window_s: float = 0.5
    switch_s: float = 10
    seed: int = 1

    @property
    def n_pairs(self) -> int:
        """How many pairs of windows: a multiple of three, and at least one for each third."""
        return 3 * max(1, round(self.total_s / (6 * self.window_s)))


def batch_sizes(plan: Plan) -> list[int]:
    """Return the batch size of each pair of windows."""
    generator = random.Random(plan.seed)
    pairs_a_third = plan.n_pairs // 3
    pairs_a_switch = max(1, round(plan.switch_s / (2 * plan.window_s)))
    third: list[int] = []
    while len(third) < pairs_a_third:
        drawn = round(generator.expovariate(1 / MEAN_BATCH))
        third += [min(max(drawn, 1), MAX_BATCH)] * pairs_a_switch
    return third[:pairs_a_third] * 3


def middle_mean(values: Sequence[float]) -> float:
    """Return the mean of the middle half: as robust as a median, and finer than the clock."""
    ordered = sorted(values)
    cut = len(ordered) // 4
    return statistics.fmean(ordered[cut : len(ordered) - cut])


def drift(ours_p99: Sequence[float], other_p99: Sequence[float]) -> float:
    """Return by how much, of 1, our P99 relative to the other's changed over the run.

    Parameters
    ----------
    ours_p99, other_p99 : sequence of float
        Of each pair of windows.

    Returns
    -------
    float
        The last third of the run against the first, each pair of windows against the one with the
        same place in its third, and so with the same batch size; positive: we became slower.
    """
    ratios = [a / b for a, b in zip(ours_p99, other_p99, strict=True)]
    third = len(ratios) // 3
    first, last = ratios[:third], ratios[-third:]
    changes = [math.log(after / before) for before, after in zip(first, last, strict=True)]
    return math.exp(middle_mean(changes)) - 1


def measure(plan: Plan, drivers: Drivers) -> dict[str, Any]:
    """Run the soak.

    Returns
    -------
    dict
        ``batch_sizes``; for each allocator a list of ``windows`` (start in s, p50, p99, p999, max
        in ns, counts by bin for the picture) and the ``total`` over all samples.
    """
    glibc = tuple(peer for peer in PEERS if peer.name == OTHER)
    sizes = batch_sizes(plan)
    windows: dict[str, list[dict[str, Any]]] = {OURS: [], OTHER: []}
    with workers(drivers, peers=glibc) as everyone:
        start = time.monotonic()
        for pair, n_requests in enumerate(sizes):
            names = (OURS, OTHER) if pair % 2 == 0 else (OTHER, OURS)
            for name in names:
                at_s = time.monotonic() - start
                window_ns = int(plan.window_s * 1e9)
                answer = everyone[name].ask("soak_window", BLOCK_BYTES, n_requests, window_ns)
                windows[name].append({"start_s": at_s, **answer})
        totals = {name: worker.ask("soak_total") for name, worker in everyone.items()}
    return {"batch_sizes": sizes, "windows": windows, "total": totals}


def judge(result: dict[str, Any], plan: Plan) -> list[Row]:
    """Return the two lines of bar 13."""
    ours, other = result["total"][OURS]["p99"], result["total"][OTHER]["p99"]
    minutes = f"soak, {plan.total_s / 60:.3g} minutes"
    per_window = [[w["p99"] for w in result["windows"][name]] for name in (OURS, OTHER)]
    percent = 100 * abs(drift(per_window[0], per_window[1]))
    ratio = ours / other
    text = f"P99 of one allocation, {minutes}"
    holds = ratio <= BAR_P99
    drifted = f"change of our P99 relative to {OTHER}'s, {minutes}"
    return [
        Row("13.p99", text, ours, {OTHER: other}, "ns", ratio, BAR_P99, holds),
        limit_row("13.drift", drifted, BAR_DRIFT_PERCENT, percent, "%"),
    ]


def rows(plan: Plan, drivers: Drivers, picture: Path = PICTURE) -> list[Row]:
    """Run the soak, draw its picture, return its lines."""
    result = measure(plan, drivers)
    write_picture(result, picture)
    return judge(result, plan)


def write_picture(result: dict[str, Any], path: Path) -> None:
    """Draw how long allocations took, over time: a heat map for each allocator, side by side."""
    try:
        from bench.heat_map import draw
    except ImportError as error:
        print(f"no picture: {error}; install matplotlib", file=sys.stderr)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(result, path)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 0: both bars hold, 1: one is missed."""
    parser = argparse.ArgumentParser(prog="bench/soak.py", description="Soak pagealloc and glibc.")
    parser.add_argument("--minutes", type=float, default=60, help="how long (%(default)s)")
    parser.add_argument("--json", type=Path, default=PICTURE.with_suffix(".json"))
    parser.add_argument("--png", type=Path, default=PICTURE)
    options = parser.parse_args(arguments)
    if not options.minutes > 0:
        parser.error(f"--minutes {options.minutes:g}: must be more than 0")
    prefer_installed_package()
    require_compiler()
    plan = Plan(60 * options.minutes)
    with compile_drivers() as drivers:
        result = measure(plan, drivers)
    judged = judge(result, plan)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    content = {"rows": [row.as_json() for row in judged], **result}
    options.json.write_text(json.dumps(content) + "\n")
    write_picture(result, options.png)
    print(table(judged, [OTHER]))
    for name, total in result["total"].items():
        print(f"{name}: {total['n']:,} allocations, ns: {total}")
    print(f"written to {options.json}; the picture: {options.png}")
    return 0 if all(row.holds for row in judged) else 1


if __name__ == "__main__":
    sys.exit(main())
