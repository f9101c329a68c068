"""Published prefixes: finding them, the memory of D's trace, restoring from a file, eviction.

Look-ups and the hash pass they are compared with run in turn, every round; what reads a file runs
in processes of their own, in turn, for memory that a process has touched before is faster.
"""

from __future__ import annotations

import gc
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.bench_kv import in_process
from bench.installed import ROOT, environment
from bench.prefix_loads import PREFIX_TOKENS, answering, cache_of_prefix
from bench.prefix_threads import N_THREADS, run_threads, simulate, works_of
from bench.report import machine
from bench.rows import Row, RowsReport, compare, guarded, limit_row, median_ratio
from pagealloc.kv import KVCache, KVLayout
from pagealloc.kv.prefix_hash import TOKEN_BYTES, block_hash, token_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

__all__ = ["run"]

TITLE = "Published prefixes, measured"
HASH_PASS, FEW, TOLD, READ, SIMULATED = "hash pass", "10 published", "told", "read()", "simulator"
PROMPT_TOKENS, N_PUBLISHED, N_FEW, SHORT_TOKENS = 8000, 10_000, 10, 64
BLOCK_TOKENS = 16
N_LOOKUPS = 20
N_WORKS = 1500
MIB = 1 << 20


# --- looking up -----------------------------------------------------------------------------------


def hash_pass(ids: npt.NDArray[np.int32], digest: Callable[[bytes], bytes]) -> bytes:
    """Hash a prompt block by block, and look nothing up."""
    tokens, key = token_bytes(ids), digest(b"")
    width = BLOCK_TOKENS * TOKEN_BYTES
    for start in range(0, len(tokens), width):
        key = digest(key + tokens[start : start + width])
    return key


def cache_of(n_published: int, prompt: npt.NDArray[np.int32]) -> KVCache:
    """Return a cache in which a prompt and many short ones are published."""
    cache = KVCache(KVLayout(1, 1, 8, PROMPT_TOKENS, order="block", block_tokens=BLOCK_TOKENS))
    rng = np.random.default_rng(1)
    short = (rng.integers(0, 49152, SHORT_TOKENS, np.int32) for _ in range(n_published - 1))
    for ids in (prompt, *short):
        with cache.sequence(ids) as seq:
            rows = np.zeros((len(ids), 1, 8), np.float16)
            seq.append(0, rows, rows)
            seq.publish()
    return cache


def mean_ns(work: Callable[[], object]) -> float:
    start_ns = time.perf_counter_ns()
    for _ in range(N_LOOKUPS):
        work()
    return (time.perf_counter_ns() - start_ns) / N_LOOKUPS


def lookup_rows(rounds: int) -> list[Row]:
    """Return the lines of looking a long prompt up."""
    prompt = np.random.default_rng(0).integers(0, 49152, PROMPT_TOKENS, np.int32)
    digest = block_hash(bytes(32))
    with cache_of(N_PUBLISHED, prompt) as cache, cache_of(N_FEW, prompt) as small:
        for each in (cache, small):
            assert each.prefixes.n_tokens(each.prefixes.find(token_bytes(prompt)).lease) == len(
                prompt
            )
        gc.collect()
        gc.freeze()  # a hundred thousand objects: collecting them is nothing a look-up does
        try:
            found, few, opened, plain = [], [], [], []
            for _ in range(rounds):
                plain.append(mean_ns(lambda: hash_pass(prompt, digest)))
                found.append(mean_ns(lambda: cache.prefixes.find(token_bytes(prompt))))
                few.append(mean_ns(lambda: small.prefixes.find(token_bytes(prompt))))
                opened.append(mean_ns(lambda: cache.sequence(prompt).close()))
        finally:
            gc.unfreeze()
    work = f"{PROMPT_TOKENS:,} tokens among {N_PUBLISHED:,} published sequences"
    return [
        compare("lookup", f"{work}: found", 1.5, found, {HASH_PASS: plain}),
        compare("lookup", f"{work}: found, against few", 1.1, found, {FEW: few}),
        Row(
            "lookup",
            f"{work}: cache.sequence(token_ids) and close()",
            statistics.median(opened),
            {HASH_PASS: statistics.median(plain)},
            ratio=median_ratio(opened, plain),
            to_reach=2,
            holds=median_ratio(opened, plain) <= 2,
        ),
    ]


# --- memory ---------------------------------------------------------------------------------------


def memory_rows(notes: list[str]) -> list[Row]:
    """Return the lines of the trace with prompts that are found, against forks of them.

    A fork shares the last tokens of a prompt, too; who finds it computes what does not fill a KV
    block.  In `split` order that touches two places a layer, whose page tables alone are half a
    percent; so that order is told of, not judged.
    """
    rows = []
    for shape in ("smollm2", "llama"):
        for order in ("block", "interleaved", "split"):
            options: dict[str, Any] = {"cache": {"backing": "base"}}
            told = in_process("ours", shape, order, options)["held_bytes"] / MIB
            options = {"cache": {"backing": "base"}, "found": True}
            found = in_process("ours", shape, order, options)["held_bytes"] / MIB
            ratio = found / told
            work = f"{shape}, {order}: the trace with prompts found by the index, held"
            if order == "split":
                notes.append(f"{work}: {100 * (ratio - 1):+.2f} %.")
                continue
            holds = abs(ratio - 1) <= 0.01
            rows.append(Row("memory", work, found, {TOLD: told}, "MiB", ratio, 1.01, holds))
    return rows


# --- restoring ------------------------------------------------------------------------------------


def load_ns(work: str, path: Path) -> float:
    result = subprocess.run(
        [sys.executable, "-P", "-m", "bench.prefix_loads", work, str(path)],
        env=environment(ROOT),
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        raise RuntimeError(f"prefix_loads {work}: code {result.returncode}\n{result.stderr}")
    return float(result.stdout)


def restore_rows(rounds: int, notes: list[str]) -> list[Row]:
    """Return the lines of a prefix from a file in the page cache, and from another process.

    How long a sleeping process takes to wake is the machine's: bare exchanges tell.
    """
    with tempfile.TemporaryDirectory() as folder, cache_of_prefix() as cache:  # mode 0700
        path, socket_path = Path(folder, "prefix.kv"), Path(folder, "socket")
        bare_path = Path(folder, "bare")
        n_tokens = cache.save(path) * cache.layout.block_tokens
        mib = path.stat().st_size / MIB
        loaded, plain, attached, bare = [], [], [], []
        with answering(bare_path), cache.serve(socket_path) as server:
            for _ in range(rounds):
                plain.append(load_ns("read", path) / 1e6)
                loaded.append(load_ns("load", path) / 1e6)
                attached.append(load_ns("attach", socket_path) / 1e6)
                bare.append(load_ns("exchange", bare_path) / 1e6)
            while server.n_clients:  # the last one has just ended
                time.sleep(0.001)
    what = f"{n_tokens} of {PREFIX_TOKENS} tokens, {mib:.0f} MiB"
    notes.append(
        f"restore: attaching took {min(attached):.2f} to {max(attached):.2f} ms. Two bare "
        f"exchanges over such a socket took {statistics.median(bare):.2f} ms in the median, "
        f"{min(bare):.2f} to {max(bare):.2f}."
    )
    cold = f"{what}: load() and sequence(), cold"
    return [
        compare("restore", cold, 2, loaded, {READ: plain}, unit="ms"),
        limit_row(
            "restore",
            f"{what}: attach() and sequence() in another process",
            3,
            statistics.median(attached),
            "ms",
        ),
    ]


# --- evicting -------------------------------------------------------------------------------------


def eviction_rows() -> list[Row]:
    """Return the lines of threads under a budget."""
    works = [works_of(thread, N_WORKS) for thread in range(N_THREADS)]
    rows = []
    for policy in ("lru", "lfu", "bytes"):
        found, model = run_threads(policy, works), simulate(policy, works)  # type: ignore[arg-type]
        text = f"{policy}, {N_THREADS} threads, {found.n_evicted_blocks:,} blocks evicted"
        apart = 100 * abs(found.hit_rate / model.hit_rate - 1)
        rows += [
            Row(
                "eviction",
                f"{text}: hit rate, apart from the simulator's by %",
                apart,
                {SIMULATED: 100 * model.hit_rate, "found": 100 * found.hit_rate},
                "%",
                None,
                2,
                apart <= 2,
            ),
            limit_row("eviction", f"{text}: wrong rows", 0, found.n_wrong_rows, "rows"),
            limit_row(
                "eviction",
                f"{text}: most committed, as a share of the budget",
                1,
                found.most_bytes / found.budget_bytes,
                "of 1",
            ),
        ]
    return rows


def run(rounds: int) -> RowsReport:
    """Measure everything: three minutes."""
    notes: list[str] = []
    lines = {
        "lookup": ("long prompts", partial(lookup_rows, rounds)),
        "memory": ("the trace", partial(memory_rows, notes)),
        "restore": ("from a file and another process", partial(restore_rows, rounds, notes)),
        "eviction": ("threads under a budget", eviction_rows),
    }
    rows: list[Row] = []
    for bar, (text, measure) in lines.items():
        rows += guarded(bar, text, 1, measure)
    return RowsReport(
        "prefix", TITLE, rows, machine(), [HASH_PASS, FEW, TOLD, READ, SIMULATED], notes
    )
