"""The KV cache: memory, page faults, speed and scale of a trace of 32 conversations.

The works of ``kv_trace.py`` run in processes of their own.  What is timed here runs in turn, every
round, and a ratio is the median of the ratios of the same round.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench import bench_fork
from bench.compiled import compiled
from bench.installed import ROOT, environment
from bench.report import machine
from bench.rows import Row, RowsReport, guarded, limit_row, median_ratio
from pagealloc.kv import KVCache, KVLayout

if TYPE_CHECKING:
    import numpy.typing as npt

    from pagealloc.kv import Sequence

__all__ = ["PREALLOCATED", "append_ns", "in_process", "run", "share_row"]

TITLE = "The KV cache, measured"
MIB = 1 << 20
PREALLOCATED = "preallocated"
N_TOKENS = 2048  # of a round
MAX_MAPPINGS = int(Path("/proc/sys/vm/max_map_count").read_text())


def in_process(*arguments: object) -> dict[str, Any]:
    """Have a work of ``kv_trace.py`` done by the pagealloc imported here."""
    texts = [item if isinstance(item, str) else json.dumps(item) for item in arguments]
    result = subprocess.run(
        [sys.executable, "-P", "-m", "bench.kv_trace", *texts],
        env=environment(ROOT),
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        raise RuntimeError(f"kv_trace {texts}: code {result.returncode}\n{result.stderr}")
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


def share_row(bar: str, work: str, to_reach: float, ours: float, base: float, unit: str) -> Row:
    """Judge our figure as a share of what the preallocated cache has."""
    ratio = ours / base
    return Row(bar, work, ours, {PREALLOCATED: base}, unit, ratio, to_reach, ratio <= to_reach)


# --- memory and page faults -----------------------------------------------------------------------


def trace_rows() -> list[Row]:
    """Return the lines of the trace, both layouts."""
    rows = []
    for shape in ("smollm2", "llama"):
        base = in_process(PREALLOCATED, shape)
        base_mib = base["held_bytes"] / MIB
        for order in ("block", "interleaved", "split"):
            found = in_process("ours", shape, order, {"cache": {"backing": "base"}})
            held_mib, needed = found["held_bytes"] / MIB, found["needed_bytes"]
            rows.append(
                share_row("memory", f"{shape}, {order}: held", 0.17, held_mib, base_mib, "MiB")
            )
            waste = 100 * (found["held_bytes"] - needed) / needed
            work = f"{shape}, {order}: waste, (held - needed) / needed"
            rows.append(limit_row("memory", work, 1 if order == "block" else 4, waste, "%"))
            faults = (found["n_faults"], base["n_faults"])
            work = f"{shape}, {order}, base pages: start-up and inference"
            rows.append(share_row("faults", work, 0.17, *faults, "faults"))
        if shape == "llama":
            found = in_process("ours", shape, "block", {"block_tokens": 128})
            faults, held_mib = found["n_faults"], found["held_bytes"] / MIB
            work = f"{shape}, block of 128 tokens, 2 MiB pages"
            rows.append(share_row("faults", work, 0.01, faults, base["n_faults"], "faults"))
            rows.append(share_row("faults", f"{work}: held", 0.4, held_mib, base_mib, "MiB"))
    return rows


def steady_rows() -> list[Row]:
    """Return the lines of decoding in steady state, and of warm windows."""
    rows = []
    for shape in ("smollm2", "llama"):
        found = in_process("steady", shape)
        work = f"{shape}: 4,096 tokens decoded; page faults beside pages written for the first time"
        rows.append(
            limit_row("faults", work, 0, found["n_faults"] - found["n_new_pages"], "faults")
        )
        found = in_process("warm", shape)
        work = (
            f"{shape}: fork of 992 tokens and 512 more in a warm window, median of "
            f"{len(found['n_faults'])} ({max(found['n_faults'])} at most, Python's own included; "
            f"{found['cold']:,} in a cold window)"
        )
        rows.append(limit_row("speed", work, 0, statistics.median(found["n_faults"]), "faults"))
    return rows


# --- speed ----------------------------------------------------------------------------------------


def append_ns(seq: Sequence, tokens: list[npt.NDArray[np.float16]]) -> float:
    """Append tokens one by one; return nanoseconds of each."""
    append = seq.append_token
    start_ns = time.perf_counter_ns()
    for token in tokens:
        append(token)
    return (time.perf_counter_ns() - start_ns) / len(tokens)


def append_rows(rounds: int) -> list[Row]:
    """Return the lines of append_token into committed pages against memcpy alone."""
    loops, rows = compiled("kv_loops"), []
    for shape, sizes in (("smollm2", (30, 3, 64)), ("llama", (4, 8, 128))):
        for order in ("block", "interleaved", "split"):
            layout = KVLayout(*sizes, 8192, order=order)  # type: ignore[arg-type]
            token_shape = (N_TOKENS, layout.n_layers, 2, *layout.row_shape(0, 0))
            tokens = np.random.default_rng(0).normal(size=token_shape).astype(np.float16)
            flat = tokens.reshape(N_TOKENS, -1).view(np.uint8)
            each = list(tokens)
            ours, plain = [], []
            with KVCache(layout, purge_after_s=float("inf")) as cache:
                for _ in range(rounds + 2):  # the first rounds commit the pages
                    seq = cache.sequence()
                    ours.append(append_ns(seq, each))
                    address = seq._window.address  # noqa: SLF001  the same addresses
                    plain.append(loops.copy_tokens(cache._table, address, flat) / N_TOKENS)  # noqa: SLF001
                    seq.close()
            ours, plain = ours[2:], plain[2:]
            ratio = median_ratio([ns - 1000 for ns in ours], plain)
            rows.append(
                Row(
                    "speed",
                    f"{shape}, {order}: append_token into committed pages, less 1 us",
                    statistics.median(ours),
                    {"memcpy": statistics.median(plain)},
                    "ns",
                    ratio,
                    1.3,
                    ratio <= 1.3,
                )
            )
    return rows


def look_rows(rounds: int) -> list[Row]:
    """Return the lines of k(layer), and of the boundary check."""
    n_loops = 20_000
    layout = KVLayout(30, 3, 64, 8192)
    with KVCache(layout) as cache:
        seq = cache.sequence()
        for token in np.zeros((100, 30, 2, 3, 64), np.float16):
            seq.append_token(token)
        views, plain = [], []
        for _ in range(rounds):
            k = seq.k
            start_ns = time.perf_counter_ns()
            for _ in range(n_loops):
                k(7)
            views.append((time.perf_counter_ns() - start_ns) / n_loops)
            start_ns = time.perf_counter_ns()
            for _ in range(n_loops):
                object()
            plain.append((time.perf_counter_ns() - start_ns) / n_loops)
        loops, n_checks = compiled("kv_loops"), 2_000_000
        checks = []
        for order in ("interleaved", "block"):
            table = KVCache(KVLayout(30, 3, 64, 8192, order=order))._table  # type: ignore[arg-type]  # noqa: SLF001
            checks.append(
                [
                    (
                        loops.check_accesses(table, 8192, n_checks)[0]
                        - loops.count_tokens(table, 8192, n_checks)[0]
                    )
                    / n_checks
                    for _ in range(rounds)
                ]
            )
    ratio = median_ratio(views, plain)
    return [
        limit_row(
            "speed", "k(layer): an array without a copy", 500, statistics.median(views), "ns"
        ),
        Row(
            "speed",
            "k(layer) against object()",
            statistics.median(views),
            {"object()": statistics.median(plain)},
            "ns",
            ratio,
            6,
            ratio <= 6,
        ),
        *(
            limit_row("speed", f"boundary check in a loop, {order}", 6, statistics.median(ns), "ns")
            for order, ns in zip(("interleaved", "block"), checks, strict=True)
        ),
    ]


def fork_rows(rounds: int) -> list[Row]:
    """Return the line of a fork against a cold copy, from ``bench fork``."""
    report = bench_fork.run(rounds)
    bar = report.bars[0]
    return [
        limit_row(
            "speed",
            "fork of 1,000 tokens with the first read of every page, as a share of a cold copy",
            0.1,
            1 / bar.value,
            "of 1",
        )
    ]


# --- scale ----------------------------------------------------------------------------------------


def scale_rows() -> list[Row]:
    """Return the lines of a million appends."""
    rows = []
    for order in ("block", "interleaved"):
        found = in_process("scale", order)
        tenth = len(found["ns"]) // 10
        # The first step copies every sequence's shared tail.
        first, last = (
            statistics.median(part) for part in (found["ns"][1 : tenth + 1], found["ns"][-tenth:])
        )
        mappings = found["n_mappings"]
        work = f"{order}: a million appends to 1,000 sequences forked from 8 prompts"
        limit = 10_000 if order == "block" else MAX_MAPPINGS
        rows.append(limit_row("scale", f"{work}: mappings", limit, mappings, "mappings"))
        rows.append(
            Row(
                "scale",
                f"{work}: an append in the last tenth against the first",
                last,
                {"first tenth": first},
                "ns",
                last / first,
                1.5,
                last / first <= 1.5,
            )
        )
    return rows


def run(rounds: int) -> RowsReport:
    """Measure everything: some minutes."""
    lines = {
        "memory": ("the trace", trace_rows),
        "faults": ("steady state", steady_rows),
        "speed": ("appending", partial(append_rows, rounds)),
        "speed of views": ("arrays and checks", partial(look_rows, rounds)),
        "speed of forks": ("forks", partial(fork_rows, rounds)),
        "scale": ("a million appends", scale_rows),
    }
    rows: list[Row] = []
    for bar, (text, measure) in lines.items():
        rows += guarded(bar.split()[0], text, 1, measure)
    return RowsReport("kv", TITLE, rows, machine(), [PREALLOCATED])
