"""fork() of a 1,000-token sequence against copying its rows: time and held bytes.

30 layers, 3 KV heads x 64, float16, block order: 22 MiB.  A cold copy goes to memory that was
never touched; it and the fork include the first read of every page.  Nearly all of the fork's time
is that read: the kernel enters page after page into the child's page tables.  It has huge pages to
enter where the parent's appends completed them, so a parent filled token by token is measured too.
"""

from __future__ import annotations

import mmap
import statistics
import time
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from bench.report import Bar, Report, interleave
from pagealloc import page_size_bytes
from pagealloc.kv import KVCache, KVLayout, Sequence

Bytes = npt.NDArray[np.uint8]
Rows = npt.NDArray[np.float16]

N_TOKENS = 1000
PAGE_BYTES = page_size_bytes()


def run(rounds: int) -> Report:
    layout = KVLayout(n_layers=30, n_kv_heads=3, head_dim=64, max_tokens=8192, order="block")
    rows = np.random.default_rng(0).normal(size=(N_TOKENS, 3, 64)).astype(np.float16)  # (T, H, D)
    cache = KVCache(layout)
    parent = cache.sequence()
    fill(parent, rows)
    decoded = cache.sequence()
    for token in np.broadcast_to(rows[:, None, None], (N_TOKENS, 30, 2, 3, 64)):
        decoded.append_token(token)
    n_bytes = parent.committed_bytes
    warm = np.ones(n_bytes, np.uint8)

    def fork_and_read(source: Sequence = parent) -> int:
        start = time.perf_counter_ns()
        child = source.fork()
        read_pages(all_bytes(child))
        end = time.perf_counter_ns()
        child.close()
        return end - start

    def fork() -> int:
        start = time.perf_counter_ns()
        child = parent.fork()
        end = time.perf_counter_ns()
        child.close()
        return end - start

    def cold_copy() -> int:
        start = time.perf_counter_ns()
        mapping = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        copy = np.frombuffer(mapping, np.uint8)
        np.copyto(copy, all_bytes(parent))
        read_pages(copy)
        return time.perf_counter_ns() - start

    def cold_copy_on_huge_pages() -> int:
        start = time.perf_counter_ns()
        copy = np.empty(n_bytes, np.uint8)  # NumPy asks for huge pages, which THP may grant
        np.copyto(copy, all_bytes(parent))
        read_pages(copy)
        return time.perf_counter_ns() - start

    def append_again() -> int:
        start = time.perf_counter_ns()
        with cache.sequence() as other:
            fill(other, rows)
            end = time.perf_counter_ns()
        return end - start

    def warm_copy() -> int:
        start = time.perf_counter_ns()
        np.copyto(warm, all_bytes(parent))
        read_pages(warm)
        return time.perf_counter_ns() - start

    held = measure_held(parent, rounds)
    timings = interleave(
        {
            "fork, then first read of every page": fork_and_read,
            "the same, filled token by token": lambda: fork_and_read(decoded),
            "fork alone": fork,
            "cold copy": cold_copy,
            "cold copy, huge pages if there are": cold_copy_on_huge_pages,
            "cold copy into a new sequence": append_again,
            "warm copy": warm_copy,
        },
        rounds,
    )
    median_ns = {timing.name: timing.median_ns for timing in timings}
    forks = ("fork, then first read of every page", "the same, filled token by token")
    speedups = [median_ns["cold copy"] / median_ns[name] for name in forks]
    bars = [
        Bar("cold copy to fork with first read", speedups[0], 10, "x", at_least=True),
        Bar("cold copy to fork, filled token by token", speedups[1], 10, "x", at_least=True),
        Bar("held by a fork", held.after_fork_bytes / 1024, 64, " KiB", at_least=False),
    ]
    note = (
        f"{n_bytes / 2**20:.1f} MiB of pages; a fork that has read every page holds "
        f"{held.after_read_bytes / 1024:.3g} KiB more, its page tables"
    )
    cache.close()
    title = f"fork of {N_TOKENS} tokens: {layout!r}"
    return Report(title, timings, bars, [note])


class Held(NamedTuple):
    """What a fork adds to the held bytes: at once, and once every page was read."""

    after_fork_bytes: float
    after_read_bytes: float


def measure_held(parent: Sequence, rounds: int) -> Held:
    added: list[Held] = []
    for _ in range(rounds):
        before = parent.cache.stats().held_bytes
        with parent.fork() as child:
            after_fork = parent.cache.stats().held_bytes
            read_pages(all_bytes(child))
            after_read = parent.cache.stats().held_bytes
        added.append(Held(after_fork - before, after_read - before))
    return Held(*(statistics.median(column) for column in zip(*added, strict=True)))


def fill(seq: Sequence, rows: Rows) -> None:
    for layer in range(seq.cache.layout.n_layers):
        seq.append(layer, rows, rows)


def all_bytes(seq: Sequence) -> Bytes:
    """Every byte behind the sequence's rows, in place."""
    view = seq._window.view(0, seq.committed_bytes)  # noqa: SLF001  pages, not rows, are compared
    return np.frombuffer(memoryview(view), np.uint8)


def read_pages(array: Bytes) -> int:
    """Read one byte of every page."""
    return int(array[::PAGE_BYTES].sum())
