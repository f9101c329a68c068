"""The trace of the KV benchmark: who holds how many tokens, and what a preallocated cache costs.

A work in a process of its own: ``python -m bench.kv_trace WORK LAYOUT``, a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import mmap
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pagealloc.kv import KVCache, KVLayout, Sequence

PROMPT_TOKENS, N_PROMPTS, N_SEQUENCES = 1000, 8, 32
MAX_TOKENS, DECODED_TOKENS = 8192, 64
SHAPES = {
    "smollm2": (30, 3, 64),
    "llama": (4, 8, 128),  # the heads of Llama 3 8B, and 4 of its layers
}
LENGTHS = np.exp(
    np.random.default_rng(0).uniform(np.log(16), np.log(MAX_TOKENS), N_SEQUENCES)
).astype(int)


def layout_of(shape: str, order: str, **options: Any) -> KVLayout:
    return KVLayout(*SHAPES[shape], MAX_TOKENS, order=order, **options)  # type: ignore[arg-type]


class Meter:
    """Page faults of this process since it was made."""

    def __init__(self) -> None:
        self.before = self.read()

    @staticmethod
    def read() -> int:
        """Return the page faults so far."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    @property
    def n_faults(self) -> int:
        """Page faults since it was made."""
        return self.read() - self.before


def status_bytes(*names: str) -> int:
    lines = dict(
        line.split(":", 1)
        for line in Path("/proc/self/status").read_text().splitlines()
        if ":" in line
    )
    return sum(int(lines[name].split()[0]) << 10 for name in names)


class Rows:
    """Rows to append: some random ones, over and over, so that no source page is ever new."""

    def __init__(self, layout: KVLayout) -> None:
        n_heads, head_dim = layout.row_shape(0, 0)
        shape = (MAX_TOKENS, n_heads, head_dim)  # (T, H, D)
        self.rows = np.random.default_rng(1).normal(size=shape).astype(np.float16)
        shape = (layout.n_layers, 2, n_heads, head_dim)
        self.token = np.random.default_rng(2).normal(size=shape).astype(np.float16)
        self.n_layers = layout.n_layers

    def append(self, seq: Sequence, n_tokens: int) -> None:
        """Prefill in one call a layer, the last tokens one by one."""
        n_decoded = min(n_tokens, DECODED_TOKENS)
        prefilled = self.rows[: n_tokens - n_decoded]
        if len(prefilled):
            for layer in range(self.n_layers):
                seq.append(layer, prefilled, prefilled)
        for _ in range(n_decoded):
            seq.append_token(self.token)


def prompt_ids(number: int) -> npt.NDArray[np.int32]:
    """Return the token ids of one of the trace's prompts."""
    return np.random.default_rng(number).integers(0, 49152, PROMPT_TOKENS, np.int32)


def ours(shape: str, order: str, options: dict[str, Any]) -> dict[str, Any]:
    """Hold the trace's conversations in a cache; "found" in the options: by the prefix index."""
    cache_options = options.pop("cache", {})
    is_found = options.pop("found", False)
    layout = layout_of(shape, order, **options)
    rows = Rows(layout)
    meter, start_ns = Meter(), time.perf_counter_ns()
    cache = KVCache(layout, **cache_options)
    prompts = [cache.sequence() for _ in range(N_PROMPTS)]
    for prompt in prompts:
        rows.append(prompt, PROMPT_TOKENS)
    if is_found:
        for number, prompt in enumerate(prompts):
            prompt.publish(prompt_ids(number))
    sequences = []
    for i, length in enumerate(LENGTHS):
        if is_found:
            seq = cache.sequence(prompt_ids(i % N_PROMPTS)[: int(length)])
        else:
            seq = prompts[i % N_PROMPTS].fork(min(int(length), PROMPT_TOKENS))
        rows.append(seq, int(length) - len(seq))
        sequences.append(seq)
    n_faults, ns = meter.n_faults, time.perf_counter_ns() - start_ns
    stats = cache.stats()
    assert [len(seq) for seq in sequences] == LENGTHS.tolist()
    return {
        "held_bytes": stats.held_bytes,
        "needed_bytes": stats.needed_bytes,
        "page_table_bytes": stats.page_table_bytes,
        "n_faults": n_faults,
        "n_mappings": stats.n_mappings,
        "ns": ns,
    }


def preallocated(shape: str) -> dict[str, Any]:
    """Give each conversation a float16 window for the whole context, cleared, and its rows."""
    layout = layout_of(shape, "interleaved")
    rows = Rows(layout)
    n_heads, head_dim = layout.row_shape(0, 0)
    before = status_bytes("RssAnon", "VmPTE")
    meter, start_ns = Meter(), time.perf_counter_ns()
    windows = []
    for length in LENGTHS:
        window = mmap.mmap(
            -1, MAX_TOKENS * layout.token_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        )
        window.madvise(mmap.MADV_NOHUGEPAGE)
        array = np.frombuffer(window, np.float16)
        array[:] = 0
        kv = array.reshape(layout.n_layers, 2, MAX_TOKENS, n_heads, head_dim)
        kv[:, :, :length] = rows.rows[:length]
        windows.append(window)
    n_faults, ns = meter.n_faults, time.perf_counter_ns() - start_ns
    held_bytes = status_bytes("RssAnon", "VmPTE") - before
    return {"held_bytes": held_bytes, "n_faults": n_faults, "ns": ns}


def steady(shape: str) -> dict[str, Any]:
    """Decode in steady state: page faults, and pages written for the first time."""
    layout = layout_of(shape, "block")
    rows = Rows(layout)
    with KVCache(layout) as cache:
        seq = cache.sequence()
        rows.append(seq, 1024)
        before_bytes, meter = seq.committed_bytes, Meter()
        for _ in range(4096):
            seq.append_token(rows.token)
        n_faults = meter.n_faults
        return {
            "n_faults": n_faults,
            "n_new_pages": (seq.committed_bytes - before_bytes) // mmap.PAGESIZE,
        }


def warm(shape: str) -> dict[str, Any]:
    """Fork a prompt and go on, with windows that are warm: page faults of what is not shared."""
    layout = layout_of(shape, "block")
    rows = Rows(layout)
    with KVCache(layout, purge_after_s=float("inf")) as cache:
        prompt = cache.sequence()
        rows.append(prompt, 992)  # whole KV blocks: no shared block is written to
        n_faults = []
        for _ in range(30):
            meter = Meter()
            seq = prompt.fork()
            rows.append(seq, 512)
            n_faults.append(meter.n_faults)
            seq.close()
        return {"cold": n_faults[0], "n_faults": n_faults[10:]}


def scale(order: str) -> dict[str, Any]:
    """A million appends to 1,000 live sequences forked from eight prompts, in turn."""
    n_sequences, n_steps = 1000, 1000
    layout = KVLayout(30, 1, 16, 2048, order=order)  # type: ignore[arg-type]
    rows = Rows(layout)
    with KVCache(layout) as cache:
        prompts = [cache.sequence() for _ in range(N_PROMPTS)]
        for prompt in prompts:
            rows.append(prompt, PROMPT_TOKENS)
        sequences = [prompts[i % N_PROMPTS].fork() for i in range(n_sequences)]
        after_forks = cache.stats().n_mappings
        step_ns, most_mappings = [], 0
        for step in range(n_steps):
            start_ns = time.perf_counter_ns()
            for seq in sequences:
                seq.append_token(rows.token)
            step_ns.append(time.perf_counter_ns() - start_ns)
            if step % 100 == 0:
                most_mappings = max(most_mappings, cache.stats().n_mappings)
        most_mappings = max(most_mappings, cache.stats().n_mappings)
        assert all(len(seq) == PROMPT_TOKENS + n_steps for seq in sequences)
        return {
            "n_mappings_after_forks": after_forks,
            "n_mappings": most_mappings,
            "ns": [ns / n_sequences for ns in step_ns],
            "process_mappings": len(Path("/proc/self/maps").read_text().splitlines()),
        }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("work")
    parser.add_argument("arguments", nargs="*")
    options = parser.parse_args()
    if options.work == "ours":
        shape, order, *more = options.arguments
        answer = ours(shape, order, json.loads(more[0]) if more else {})
    else:
        answer = {"preallocated": preallocated, "steady": steady, "warm": warm, "scale": scale}[
            options.work
        ](*options.arguments)
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
