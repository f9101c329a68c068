"""Acquiring and dropping a block from Python, against what Python programs use instead.

In a process of its own (``python_side.py ROUNDS LOOPS``), all cases in turn every round.  Each is
written as a program writes it, loop and clock included: a name is bound to the block, and dropped.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import repeat
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.rows import Row

    Case = Callable[[int], float]

__all__ = ["Effort", "rows"]

SIZES = {"64 KiB": 64 << 10, "2 MiB": 2 << 20}
N_BATCH = 64
now_ns = time.perf_counter_ns


@dataclass(frozen=True)
class Effort:
    """How often everything is done."""

    n_rounds: int
    n_loops: int


# --- in the process that measures ---


def cases(nbytes: int) -> dict[str, Case]:
    """Return what is measured: each takes a number of loops, returns ns a block."""
    return our_cases(nbytes) | other_cases(nbytes) | torch_case(nbytes)


def our_cases(nbytes: int) -> dict[str, Case]:
    import pagealloc

    allocator = pagealloc.PageAllocator()

    def one(n_loops: int) -> float:
        start = now_ns()
        for _ in repeat(None, n_loops):
            block = allocator.alloc(nbytes)
            del block
        return (now_ns() - start) / n_loops

    def batch(n_loops: int) -> float:
        n_batches = max(1, n_loops // N_BATCH)
        start = now_ns()
        for _ in repeat(None, n_batches):
            blocks = allocator.alloc_many(nbytes, N_BATCH)
            blocks.close()
        return (now_ns() - start) / (n_batches * N_BATCH)

    found: dict[str, Case] = {"alloc": one}
    return found | ({"alloc_many": batch} if hasattr(allocator, "alloc_many") else {})


def other_cases(nbytes: int) -> dict[str, Case]:
    import numpy as np

    def of_object(n_loops: int) -> float:
        start = now_ns()
        for _ in repeat(None, n_loops):
            block = object()
            del block
        return (now_ns() - start) / n_loops

    def of_numpy(n_loops: int) -> float:
        start = now_ns()
        for _ in repeat(None, n_loops):
            block = np.empty(nbytes, np.uint8)
            del block
        return (now_ns() - start) / n_loops

    return {"object()": of_object, "np.empty": of_numpy}


def torch_case(nbytes: int) -> dict[str, Case]:
    """Return nothing where torch is not installed."""
    try:
        import torch
    except ImportError:
        return {}

    def of_torch(n_loops: int) -> float:
        start = now_ns()
        for _ in repeat(None, n_loops):
            block = torch.empty(nbytes, dtype=torch.uint8)
            del block
        return (now_ns() - start) / n_loops

    return {"torch.empty": of_torch}


def measure(effort: Effort) -> dict[str, dict[str, list[float]]]:
    """Return each size's cases' ns a block, one figure a round."""
    results = {}
    for size, nbytes in SIZES.items():
        measured = cases(nbytes)
        for case in measured.values():
            case(effort.n_loops)  # warms up
        times: dict[str, list[float]] = {name: [] for name in measured}
        for _ in range(effort.n_rounds):
            for name, case in measured.items():
                times[name].append(case(effort.n_loops))
        results[size] = times
    return results


# --- in the process that asks ---


def rows(effort: Effort) -> list[Row]:
    """Run the process, and judge what it found."""
    from bench.installed import environment
    from bench.rows import compare
    from bench.workers import WorkerError

    result = subprocess.run(
        [sys.executable, __file__, str(effort.n_rounds), str(effort.n_loops)],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        raise WorkerError(f"{__file__}: {result.stderr}")
    measured: dict[str, dict[str, list[float]]] = json.loads(result.stdout)
    judged = []
    for bar, other, to_reach in (
        ("11.object", "object()", 1.3),
        ("11.numpy", "np.empty", 0.33),
        ("11.torch", "torch.empty", 0.05),
    ):
        for size, times in measured.items():
            more: dict[str, Any] = {}
            if other not in times:
                more = {"optional": other == "torch.empty", "note": f"there is no {other} here"}
            text = f"alloc and drop {size}"
            judged.append(
                compare(bar, text, to_reach, times["alloc"], {other: times.get(other)}, **more)
            )
    for size, times in measured.items():
        text = f"alloc_many of {N_BATCH} × {size}, close: a block"
        note = "" if "alloc_many" in times else "this pagealloc has no alloc_many"
        one = {"one by one": times["alloc"]}
        judged.append(compare("11.batch", text, 0.6, times.get("alloc_many"), one, note=note))
    return judged


if __name__ == "__main__":
    print(json.dumps(measure(Effort(int(sys.argv[1]), int(sys.argv[2])))))
