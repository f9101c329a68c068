"""Threads that publish, find, pin and close under a budget, beside a simulator of the same policy.

A block is a page; its rows say which prompt they are of, so that a wrong one is noticed.
"""

from __future__ import annotations

import threading
import zlib
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bench.prefix_simulator import PrefixSimulator
from pagealloc import huge_page_size_bytes, page_size_bytes
from pagealloc.kv import KVCache, KVLayout

if TYPE_CHECKING:
    from bench.prefix_simulator import Path
    from pagealloc.kv import Sequence
    from pagealloc.kv.eviction import Policy

__all__ = ["N_THREADS", "Outcome", "run_threads", "simulate", "works_of"]

N_THREADS, N_OPEN = 4, 3
BLOCK_TOKENS, MAX_BLOCKS = 4, 24
CAPACITY_BLOCKS = 1200
PIN_SHARE = 0.02
N_PINNED = 4  # of a thread; then the oldest is unpinned


@dataclass(frozen=True)
class Work:
    """A prompt, and whether it is pinned."""

    path: Path
    pin: bool


@dataclass
class Outcome:
    """What came of the works of all threads."""

    hit_rate: float
    n_wrong_rows: int = 0
    most_bytes: int = 0
    budget_bytes: int = 0
    n_evicted_blocks: int = 0


def works_of(thread: int, n_works: int) -> list[Work]:
    """Return a thread's prompts: few common beginnings, many continuations."""
    rng = np.random.default_rng(thread)
    works = []
    for _ in range(n_works):
        beginning = int(rng.zipf(1.4)) % 300
        n_first = 4 + beginning % 8
        path = [(beginning, i) for i in range(n_first)]
        user = int(rng.zipf(1.3)) % 50
        path += [(beginning, user, i) for i in range(int(rng.integers(0, MAX_BLOCKS - n_first)))]
        works.append(Work(tuple(path), bool(rng.random() < PIN_SHARE)))
    return works


def token_ids(path: Path) -> list[int]:
    return [zlib.crc32(repr(block).encode()) >> 1 for block in path for _ in range(BLOCK_TOKENS)]


def row_values(path: Path) -> np.ndarray[tuple[int], np.dtype[np.float16]]:
    """Return a number a block that depends on all blocks up to it, exact in float16."""
    values, digest = [], 0
    for block in path:
        digest = zlib.crc32(repr(block).encode(), digest)
        values.append(digest % 2048)
    return np.array(values, np.float16)


def run_threads(policy: Policy, works: list[list[Work]]) -> Outcome:
    """Have each thread do its works, with a few sequences open at a time."""
    layout = KVLayout(1, 1, 8, MAX_BLOCKS * BLOCK_TOKENS, order="block", block_tokens=BLOCK_TOKENS)
    budget_bytes = CAPACITY_BLOCKS * page_size_bytes()
    outcome, lock = Outcome(0.0, budget_bytes=budget_bytes), threading.Lock()
    with KVCache(
        layout, budget_bytes=budget_bytes, backing="base", purge_after_s=0, prefix_eviction=policy
    ) as cache:

        def wrong_rows(seq: Sequence, path: Path, n_blocks: int) -> int:
            rows = seq.k(0, on_cross="copy")[: n_blocks * BLOCK_TOKENS, 0, 0]
            expected = row_values(path)[:n_blocks].repeat(BLOCK_TOKENS)
            return int((rows != expected).sum())

        def work(own: list[Work]) -> None:
            opened: deque[tuple[Sequence, Path]] = deque()
            pinned: deque[Path] = deque()
            for each in own:
                seq = cache.sequence(token_ids(each.path))
                n_found = seq.n_cached // BLOCK_TOKENS
                n_wrong = wrong_rows(seq, each.path, n_found)
                values = row_values(each.path)[n_found:].repeat(BLOCK_TOKENS)
                rows = np.broadcast_to(values[:, None, None], (len(values), 1, 8))
                seq.append(0, rows, rows)
                seq.publish(pin=each.pin)
                opened.append((seq, each.path))
                if each.pin:
                    pinned.append(each.path)
                if len(pinned) > N_PINNED:
                    cache.prefixes.unpin(token_ids(pinned.popleft()))
                if len(opened) > N_OPEN:
                    old, path = opened.popleft()
                    n_wrong += wrong_rows(old, path, len(path))  # what was in use has stayed
                    old.close()
                with lock:
                    outcome.n_wrong_rows += n_wrong
                    outcome.most_bytes = max(outcome.most_bytes, cache.stats().committed_bytes)
            for seq, _ in opened:
                seq.close()

        threads = [threading.Thread(target=work, args=[own]) for own in works]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        cache.check()
        stats = cache.prefixes.stats()
        if stats.n_lookups != sum(map(len, works)):
            raise RuntimeError("a thread has died: see its traceback")
        outcome.hit_rate = stats.hit_rate
        outcome.n_evicted_blocks = stats.n_evicted_blocks
    return outcome


def simulate(policy: Policy, works: list[list[Work]]) -> Outcome:
    """Do the same works in turn, in the simulator."""
    blocks_per_chunk = huge_page_size_bytes() // page_size_bytes()
    model = PrefixSimulator(CAPACITY_BLOCKS, policy, blocks_per_chunk)
    opened: list[deque[Path]] = [deque() for _ in works]
    pinned: list[deque[Path]] = [deque() for _ in works]
    for turn in zip(*works, strict=True):
        for thread, each in enumerate(turn):
            n_found = model.find(each.path)
            if not model.compute(len(each.path) - n_found):
                raise RuntimeError("the simulator has no room: the capacity is too small")
            model.publish(each.path, n_found, pin=each.pin)
            opened[thread].append(each.path)
            if each.pin:
                pinned[thread].append(each.path)
            if len(pinned[thread]) > N_PINNED:
                model.unpin(pinned[thread].popleft())
            if len(opened[thread]) > N_OPEN:
                model.close(opened[thread].popleft())
    return Outcome(model.n_hit / model.n_asked)
