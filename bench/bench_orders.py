"""What each order of rows costs, and from how many tokens on a fork beats a copy.

30 layers, 3 KV heads x 64, float16.  A fork is measured with the first read of every page, against
a copy to memory never touched and to memory touched before.
"""

from __future__ import annotations

import mmap
import time
from typing import TYPE_CHECKING

import numpy as np

from bench.bench_fork import fill, read_pages
from bench.report import Report, interleave
from pagealloc.kv import KVCache, KVLayout, Sequence

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

ORDERS = ("interleaved", "split", "block")
LENGTHS = (100, 300, 1000, 3000, 8000)
N_TOKENS = 1000


def run(rounds: int) -> Report:
    cases: dict[str, Callable[[], int]] = {}
    caches, notes = [], []
    for order in ORDERS:
        layout = KVLayout(30, 3, 64, 8192, order=order)  # type: ignore[arg-type]
        cache = KVCache(layout, purge_after_s=float("inf"))
        caches.append(cache)
        notes.append(counts(layout))
        source = filled(cache, N_TOKENS)
        cases[f"{order}: append_token, 1,000 of them"] = appending(cache)
        cases[f"{order}: fork of 1,000 tokens alone"] = forking(source, reads=False)
        cases[f"{order}: q . K over 1,000 tokens of a layer"] = attending(source)
    for order in ("interleaved", "block"):
        for n_tokens in LENGTHS:
            source = filled(caches[ORDERS.index(order)], n_tokens)
            cases[f"{order}, {n_tokens} tokens: fork, first read"] = forking(source, reads=True)
            if order == "block":
                cases[f"{n_tokens} tokens: copy, cold"] = copying(source, is_cold=True)
                cases[f"{n_tokens} tokens: copy, warm"] = copying(source, is_cold=False)
    timings = interleave(cases, rounds)
    cases.clear()  # they hold arrays and sequences
    for cache in caches:
        cache.close()
    return Report("orders of rows, and forks against copies", timings, [], notes)


def filled(cache: KVCache, n_tokens: int) -> Sequence:
    n_heads, head_dim = cache.layout.row_shape(0, 0)
    rows = np.random.default_rng(0).normal(size=(n_tokens, n_heads, head_dim))
    seq = cache.sequence()
    fill(seq, rows.astype(np.float16))
    return seq


def counts(layout: KVLayout) -> str:
    """Return what can be counted, of a cache of its own."""
    with KVCache(layout) as cache:
        seq = cache.sequence()
        for token in np.zeros((10, 30, 2, 3, 64), np.float16):
            seq.append_token(token)
        stats = cache.stats()
        with seq.fork():
            n_mappings = cache.stats().n_mappings - stats.n_mappings
        return (
            f"{layout.order}: 10 tokens of {10 * layout.token_bytes / 1024:.0f} KiB hold "
            f"{stats.file_bytes / 1024:.0f} KiB and {stats.page_table_bytes / 1024:.0f} KiB of "
            f"page tables; a fork takes {n_mappings} mappings"
        )


def appending(cache: KVCache) -> Callable[[], int]:
    tokens = list(np.random.default_rng(1).normal(size=(N_TOKENS, 30, 2, 3, 64)).astype(np.float16))

    def measure() -> int:
        with cache.sequence() as seq:
            append = seq.append_token
            start_ns = time.perf_counter_ns()
            for token in tokens:
                append(token)
            return time.perf_counter_ns() - start_ns

    return measure


def forking(source: Sequence, *, reads: bool) -> Callable[[], int]:
    def measure() -> int:
        start_ns = time.perf_counter_ns()
        child = source.fork()
        if reads:
            for array in pages_of(child):
                read_pages(array)
                del array
        elapsed_ns = time.perf_counter_ns() - start_ns
        child.close()
        return elapsed_ns

    return measure


def pages_of(seq: Sequence) -> list[npt.NDArray[np.uint8]]:
    window = seq._window  # noqa: SLF001  pages, not rows, are compared
    spans: list[tuple[int, int]] = []
    for run in window.runs():
        if spans and spans[-1][0] + spans[-1][1] == run.offset:
            spans[-1] = (spans[-1][0], spans[-1][1] + run.nbytes)
        else:
            spans.append((run.offset, run.nbytes))
    return [np.frombuffer(memoryview(window.view(*span)), np.uint8) for span in spans]


def copying(source: Sequence, *, is_cold: bool) -> Callable[[], int]:
    arrays = pages_of(source)
    nbytes = sum(array.nbytes for array in arrays)
    warm = np.ones(nbytes, np.uint8)

    def measure() -> int:
        start_ns = time.perf_counter_ns()
        target = warm
        if is_cold:
            mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            target = np.frombuffer(mapping, np.uint8)
        at = 0
        for array in arrays:
            target[at : at + array.nbytes] = array
            at += array.nbytes
        read_pages(target)
        return time.perf_counter_ns() - start_ns

    return measure


def attending(source: Sequence) -> Callable[[], int]:
    query = np.random.default_rng(2).normal(size=(3, 64)).astype(np.float32)

    def measure() -> int:
        start_ns = time.perf_counter_ns()
        for layer in range(30):
            if source.cache.layout.order == "block":
                k = source.k_blocks(layer)
                np.einsum("bthd,hd->bth", k, query, dtype=np.float32, casting="unsafe")
            else:
                k = source.k(layer)
                np.einsum("thd,hd->th", k, query, dtype=np.float32, casting="unsafe")
        return (time.perf_counter_ns() - start_ns) // 30

    return measure
