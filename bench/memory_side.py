"""The works of the memory benchmark done from Python: ``python -m bench.memory_side WORK ...``.

Each in a process of its own, which prints one line of JSON.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import resource
import sys
import threading
import time
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

import pagealloc
from bench.physical import used_bytes
from pagealloc.core import os_memory

if TYPE_CHECKING:
    from collections.abc import Callable

KIB, MIB = 1 << 10, 1 << 20
PAGE_BYTES = pagealloc.page_size_bytes()


# --- 8: filling 1 GiB ---


def fill(n_rounds: int, nbytes: int) -> dict[str, Any]:
    """Write a byte to every page: ours on huge pages, and a mapping of base pages; by turns.

    Ours asks for its memory with ``prefault=True``, and that is timed as well.  First the guest's
    memory is warmed, several times as much as is filled: the host has to back it before anybody can
    be timed.  Before every round the kernel has everything back.
    """
    warm = mmap.mmap(-1, min(6 * nbytes, psutil.virtual_memory().available // 2))
    np.frombuffer(warm, np.uint8)[::PAGE_BYTES] = 1
    warm.close()
    with pagealloc.PageAllocator() as allocator:

        def ours() -> Callable[[], object]:
            buffer = allocator.alloc(nbytes, prefault=True)
            np.frombuffer(buffer, np.uint8)[::PAGE_BYTES] = 1
            return lambda: (buffer.close(), allocator.trim())

        def base_pages() -> Callable[[], object]:
            mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if hasattr(mmap, "MADV_NOHUGEPAGE"):
                mapping.madvise(mmap.MADV_NOHUGEPAGE)
            np.frombuffer(mapping, np.uint8)[::PAGE_BYTES] = 1
            return mapping.close

        cases = {"ours": ours, "base pages": base_pages}
        answers: dict[str, Any] = {name: {"ns": [], "faults": []} for name in cases}
        for round_ in range(-1, n_rounds):
            for name, case in cases.items():
                faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
                start = time.perf_counter_ns()
                give_back = case()
                taken = time.perf_counter_ns() - start
                faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
                give_back()
                if round_ >= 0:
                    answers[name]["ns"].append(taken)
                    answers[name]["faults"].append(faults)
        with allocator.alloc(nbytes):
            answers["backing"] = allocator.stats().arenas[0].achieved_backing
    return answers


# --- 10: sparse ---


def stride(backing: str, step: int, nbytes: int) -> dict[str, Any]:
    """Keep every `step`-th block of 16 KiB, and trim: what is held, and what is live.

    The machine's figure is of what was taken since every block was allocated and none written to,
    to which the allocator's own tables are added; so it leaves out Python's objects alone.
    """
    block_bytes = 16 * KIB
    with pagealloc.PageAllocator(backing=backing) as allocator:
        buffers = [allocator.alloc(block_bytes) for _ in range(nbytes // block_bytes)]
        tables_bytes = allocator.stats().held_bytes or 0
        before = used_bytes()
        for buffer in buffers:
            np.frombuffer(buffer, np.uint8)[:] = 1
        full_bytes = used_bytes() - before + tables_bytes
        kept = buffers[::step]
        for i, buffer in enumerate(buffers):
            if i % step:
                buffer.close()
        trimmed_bytes = allocator.trim()
        time.sleep(0.3)  # the kernel's counters are brought up to date now and then
        held_bytes = used_bytes() - before + tables_bytes
        counted_bytes = allocator.stats().held_bytes
        intact = all(bytes(memoryview(buffer)) == b"\1" * block_bytes for buffer in kept)
        allocator.check()
        for buffer in kept:
            buffer.close()
    return {
        "live_bytes": len(kept) * block_bytes,
        "held_bytes": max(held_bytes, counted_bytes or 0),
        "full_bytes": full_bytes,
        "trimmed_bytes": trimmed_bytes,
        "intact": intact,
    }


# --- 14: a limit ---


def limit(n_cycles: int) -> dict[str, Any]:
    """Allocate under RLIMIT_DATA until refused, free, again: how often the answer was not clear."""
    resource.setrlimit(resource.RLIMIT_DATA, (512 * MIB, 512 * MIB))
    n_unclear, n_blocks = 0, []
    allocator = pagealloc.PageAllocator()
    for _ in range(n_cycles):
        blocks = []
        error: BaseException | None = None
        while error is None:
            try:
                blocks.append(allocator.alloc(MIB))
                memoryview(blocks[-1])[0] = 1
            except MemoryError as refusal:
                error = refusal
        clear = isinstance(error, pagealloc.OutOfMemoryError) and str(error).startswith(
            "asked for 1048576 bytes (1.00 MiB): the kernel refused (Cannot allocate memory)"
        )
        n_unclear += not clear
        n_blocks.append(len(blocks))
        blocks.clear()
    allocator.check()
    return {"n_unclear": n_unclear, "fewest": min(n_blocks), "most": max(n_blocks)}


# --- 15: anything at any time ---

N_THREADS = 4
REFUSED_SHARE = 0.01
FORK_SHARE = 0.0002
REFUSABLE = ("mmap", "munmap", "madvise", "mremap", "mincore", "pagemap", "pthread_create")


class Chaos:
    """Threads that allocate, free, resize, trim and fork, while the kernel refuses now and then."""

    def __init__(self, seed: int) -> None:
        self.allocator = pagealloc.PageAllocator(
            backing="auto", arena_bytes="8MiB", budget_bytes="512MiB", purge_after_s=0.02
        )
        self.live: list[list[tuple[int, Any]]] = [[] for _ in range(N_THREADS)]
        self.counts = dict.fromkeys(("alloc", "free", "resize", "trim", "fork", "refused"), 0)
        self.errors: list[str] = []
        self.seed = seed

    def size(self, rng: random.Random) -> int:
        """Return up to 64 KiB; now and then, up to the size of an arena."""
        return int(2 ** rng.uniform(0, 23 if rng.random() < 0.01 else 16))

    def step(self, rng: random.Random, live: list[tuple[int, Any]]) -> str:
        """Do one thing; return what."""
        choice = rng.random()
        if rng.random() < REFUSED_SHARE:
            os_memory.refuse(
                rng.choice(REFUSABLE), skip=rng.randrange(3), times=rng.randrange(1, 4)
            )
        if choice < FORK_SHARE:
            self.fork()
            return "fork"
        if choice < 0.0005:
            self.allocator.trim()
            return "trim"
        if live and choice < 0.25:
            i = rng.randrange(len(live))
            fill, buffer = live[i]
            buffer.resize(self.size(rng))
            self.compare(buffer, fill, (0,))
            self.write(buffer, fill)
            return "resize"
        if len(live) > 500 or (live and choice < 0.6):
            i = rng.randrange(len(live))
            live[i], live[-1] = live[-1], live[i]
            fill, buffer = live.pop()
            self.compare(buffer, fill, (0, -1))
            buffer.close()
            return "free"
        buffer = self.allocator.alloc(self.size(rng), align=1 << rng.randrange(14))
        fill = rng.randrange(256)
        self.write(buffer, fill)
        live.append((fill, buffer))
        return "alloc"

    def write(self, buffer: Any, fill: int) -> None:
        """Mark both ends."""
        view = memoryview(buffer)
        view[0] = view[-1] = fill
        view.release()

    def compare(self, buffer: Any, fill: int, ends: tuple[int, ...]) -> None:
        """Look at what `write` has marked."""
        view = memoryview(buffer)
        if any(view[end] != fill for end in ends):
            self.errors.append(f"a block of {buffer.nbytes} bytes was overwritten")
        view.release()

    def fork(self) -> None:
        """Have a child allocate and trim."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forks among threads
            pid = os.fork()
        if pid == 0:
            status = 1
            try:
                for name in REFUSABLE:
                    os_memory.refuse(name, times=0)
                for _ in range(20):
                    self.allocator.alloc(100_000).close()
                self.allocator.trim()
                status = 0
            finally:
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status:
            self.errors.append(f"a forked child ended with {status}")

    def run_thread(self, number: int, n_steps: int) -> None:
        """Do steps on the blocks of one thread."""
        rng = random.Random(self.seed * N_THREADS + number)
        counts = dict.fromkeys(self.counts, 0)
        for _ in range(n_steps):
            try:
                counts[self.step(rng, self.live[number])] += 1
            except pagealloc.OutOfMemoryError:
                counts["refused"] += 1
            except BaseException as error:
                self.errors.append(f"{type(error).__name__}: {error}")
                raise
        for name, n in counts.items():
            self.counts[name] += n

    def run(self, n_steps: int) -> None:
        """Do some steps; then nothing may be broken."""
        threads = [
            threading.Thread(target=self.run_thread, args=(number, n_steps // N_THREADS))
            for number in range(N_THREADS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.seed += 1
        for name in REFUSABLE:
            os_memory.refuse(name, times=0)
        try:
            self.allocator.check()
            n_live = self.allocator.stats().n_live
            if n_live != sum(map(len, self.live)):
                self.errors.append(f"{n_live} live blocks, {sum(map(len, self.live))} expected")
        except pagealloc.InvariantError as error:
            self.errors.append(str(error))


def chaos(n_steps: int) -> dict[str, Any]:
    """So many steps, with a check every 50,000; then everything is freed."""
    state = Chaos(seed=1)
    done = 0
    while done < n_steps and not state.errors:
        state.run(min(50_000, n_steps - done))
        done += 50_000
    for live in state.live:
        live.clear()
    state.allocator.trim()
    state.allocator.check()
    left = state.allocator.stats()
    return {
        "counts": state.counts,
        "n_errors": len(state.errors),
        "errors": state.errors[:5],
        "leaked_bytes": left.reserved_bytes + left.live_bytes,
    }


WORKS: dict[str, Callable[..., dict[str, Any]]] = {
    "fill": fill,
    "stride": stride,
    "limit": limit,
    "chaos": chaos,
}

if __name__ == "__main__":
    work, *arguments = sys.argv[1:]
    numbers = [int(text) if text.isdecimal() else text for text in arguments]
    print(json.dumps(WORKS[work](*numbers)))
