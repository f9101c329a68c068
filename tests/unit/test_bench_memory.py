"""The memory benchmark's lines, with little work: what they count is judged, and never a time."""

import os
import re
import shutil
from pathlib import Path

import pytest
from benches import import_bench
from mappings import CAN_WEIGH

from pagealloc import page_size_bytes

import_bench()
from bench import bench_memory, physical, workers  # noqa: E402

MIB = 1 << 20
LITTLE = bench_memory.Effort(
    n_rounds=2,
    fill_bytes=32 * MIB,
    retained_bytes=64 * MIB,
    sparse_bytes=32 * MIB,
    n_cycles=3,
    n_steps=20_000,
)

needs_physical_bytes = pytest.mark.skipif(
    not CAN_WEIGH, reason="the sanitizer's own memory is not told apart"
)


def test_first_touch():
    time, faults = bench_memory.fill_rows(LITTLE)
    assert time.ours > 0
    assert time.peers["base pages"] > 0
    n_pages = 32 * MIB // page_size_bytes()
    assert faults.peers["base pages"] >= min(n_pages, 32 * MIB // (64 << 10))
    assert faults.ours > 0
    assert faults.ratio == faults.ours / faults.peers["base pages"]


def within(n_attempts, find):
    """Whether one of some looks finds it: what others take or give meanwhile is seen, too."""
    return any(find() for _ in range(n_attempts))


@needs_physical_bytes
def test_idle_memory_goes_back(monkeypatch):
    if shutil.which("gcc") is None:
        pytest.skip("the driver needs gcc")
    with workers.compile_drivers() as drivers, workers.workers(drivers, peers=()) as everyone:
        (ours,) = everyone.values()
        smaps = Path(f"/proc/{ours.process.pid}/smaps_rollup")

        def own_bytes():
            """What is the worker's alone, whatever others on this machine do meanwhile."""
            return int(re.search(r"Private_Dirty: +(\d+) kB", smaps.read_text())[1]) << 10

        monkeypatch.setattr(physical, "used_bytes", own_bytes)
        assert within(3, lambda: bench_memory.share_kept(ours, 64 * MIB) < 0.2)


@needs_physical_bytes
def test_what_is_used_is_seen_from_outside():
    if shutil.which("gcc") is None:
        pytest.skip("the driver needs gcc")
    with workers.compile_drivers() as drivers, workers.workers(drivers, peers=()) as everyone:
        (ours,) = everyone.values()

        def is_seen():
            before = physical.used_bytes()
            ours.ask("retain", 65536, 512)
            taken_bytes = physical.used_bytes() - before
            ours.ask("release")
            ours.ask("retire")
            return 32 * MIB < taken_bytes < 128 * MIB

        assert within(10, is_seen)


@needs_physical_bytes
@pytest.mark.skipif(page_size_bytes() > 16 << 10, reason="four blocks share a page")
@pytest.mark.skipif(
    "PAGEALLOC_HUGE_PAGE_BYTES" in os.environ, reason="no touch backs a simulated huge page"
)
def test_sparse_blocks():
    def is_given_back():
        rows = bench_memory.sparse_rows(LITTLE)
        assert [row.bar for row in rows] == ["10.stride4"] * 2 + ["10.stride32"] * 2
        assert not any(row.note for row in rows)
        return all(row.ours < row.peers["before"] / 2 for row in rows)

    assert within(5, is_given_back)


@pytest.mark.skipif(not CAN_WEIGH, reason="the limit is for the sanitizer's own memory as well")
def test_a_limit():
    (row,) = bench_memory.limit_rows(LITTLE)
    assert row.holds, row


def test_anything_at_any_time():
    rows = bench_memory.chaos_rows(LITTLE)
    assert all(row.holds for row in rows), rows
    assert "20,000 steps" in rows[0].work


def test_what_a_work_says_when_it_fails():
    with pytest.raises(workers.WorkerError, match=r"memory_side nothing: code 1\n(?s:.*)KeyError"):
        bench_memory.in_process("nothing")
