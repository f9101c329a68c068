"""append() of single tokens, layer by layer, against assigning to a preallocated NumPy array.

30 layers, 3 KV heads x 64, float16.  Each side starts with memory never touched and writes 512
tokens; the time is that of one append of K and V to one layer, page faults and commits included.
"""

from __future__ import annotations

import mmap
import time
from typing import TYPE_CHECKING

import numpy as np

from bench.report import Bar, Report, interleave
from pagealloc.kv import KVCache, KVLayout

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

N_LAYERS, N_HEADS, HEAD_DIM = 30, 3, 64
N_TOKENS, MAX_TOKENS = 512, 8192
ORDERS = ("block", "interleaved", "split")


def run(rounds: int) -> Report:
    rows = np.random.default_rng(0).normal(size=(1, N_HEADS, HEAD_DIM)).astype(np.float16)
    cases = {"NumPy array, preallocated": lambda: assign(rows)}
    for order in ORDERS:
        cases[f"append, {order}"] = append_to(order, rows)
    for order in ORDERS:
        cases[f"append_token / {N_LAYERS}, {order}"] = append_token_to(order)
    timings = interleave(cases, rounds)
    median_ns = {timing.name: timing.median_ns for timing in timings}
    added_us = (median_ns["append, block"] - median_ns["NumPy array, preallocated"]) / 1000
    bars = [Bar("append adds, in block order", added_us, 5, " us", at_least=False)]
    title = f"append of one token to one of {N_LAYERS} layers x {N_HEADS} KV heads x {HEAD_DIM}"
    return Report(title, timings, bars)


def per_append(start_ns: int) -> int:
    return (time.perf_counter_ns() - start_ns) // (N_TOKENS * N_LAYERS)


def assign(rows: npt.NDArray[np.float16]) -> int:
    """Write to an array over fresh memory, as long as the context."""
    shape = (N_LAYERS, 2, MAX_TOKENS, N_HEADS, HEAD_DIM)
    n_bytes = int(np.prod(shape)) * rows.itemsize
    mapping = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    array = np.frombuffer(mapping, np.float16).reshape(shape)  # (L, 2, T, H, D)
    start_ns = time.perf_counter_ns()
    for token in range(N_TOKENS):
        for layer in range(N_LAYERS):
            array[layer, 0, token : token + 1] = rows
            array[layer, 1, token : token + 1] = rows
    return per_append(start_ns)


def make_cache(order: str) -> KVCache:
    return KVCache(KVLayout(N_LAYERS, N_HEADS, HEAD_DIM, MAX_TOKENS, order=order))  # type: ignore[arg-type]


def append_to(order: str, rows: npt.NDArray[np.float16]) -> Callable[[], int]:
    def measure() -> int:
        with make_cache(order) as cache:
            seq = cache.sequence()
            start_ns = time.perf_counter_ns()
            for _ in range(N_TOKENS):
                for layer in range(N_LAYERS):
                    seq.append(layer, rows, rows)
            return per_append(start_ns)

    return measure


def append_token_to(order: str) -> Callable[[], int]:
    token = np.ones((N_LAYERS, 2, N_HEADS, HEAD_DIM), np.float16)

    def measure() -> int:
        with make_cache(order) as cache:
            seq = cache.sequence()
            start_ns = time.perf_counter_ns()
            for _ in range(N_TOKENS):
                seq.append_token(token)
            return per_append(start_ns)

    return measure
