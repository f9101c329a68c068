"""The heap profiler: what it notes, what of it is live, and what it stands for."""

import gc
import os
import threading

import pytest

from pagealloc import ExtentStore, PageAllocator, Window, page_size_bytes
from pagealloc.core import noted
from pagealloc.observe import profile
from pagealloc.observe.heap_profile import HeapProfiler
from pagealloc.observe.profiles import Profile

ALLOC_OBJECTS, ALLOC_BYTES, LIVE_OBJECTS, LIVE_BYTES = range(4)
MIB = 1 << 20


@pytest.fixture
def allocator():
    with PageAllocator() as allocator:
        yield allocator


def values_below(found: Profile, function: str) -> list[int]:
    """Return the sums over all stacks that a function is part of."""
    stacks = [
        values
        for stack, values in found.samples.items()
        if any(frame.function.endswith(function) for frame in stack)
    ]
    return [sum(column) for column in zip(*stacks, strict=True)] or [0] * 4


def kept(allocator: PageAllocator, n: int, nbytes: int) -> list:
    return [allocator.alloc(nbytes) for _ in range(n)]


def dropped(allocator: PageAllocator, n: int, nbytes: int) -> None:
    for _ in range(n):
        allocator.alloc(nbytes).close()


def test_every_block_of_period_1(allocator):
    with profile("heap", period=1) as p:
        buffers = kept(allocator, 3, 5000)
        dropped(allocator, 2, 300)
        batch = allocator.alloc_many(1000, 7)
    found = p.profile
    assert values_below(found, "kept") == [3, 15000, 3, 15000]
    assert values_below(found, "dropped") == [2, 600, 0, 0]
    assert found.total(ALLOC_OBJECTS) == 3 + 2 + 7
    assert found.total(LIVE_BYTES) == 15000 + 7000
    buffers[0].close()  # closed, though somebody still has the object
    del batch
    assert p.profile.total(LIVE_BYTES) == 10000
    buffers.clear()
    assert p.profile.total(LIVE_BYTES) == 0
    assert p.profile.total(ALLOC_BYTES) == 15600 + 7000


def test_samples_stand_for_all(allocator):
    """Of 40 MiB in blocks of any size, about 40 MiB: each is a sum of some 640 random gaps."""
    for nbytes in (200, 5000, MIB):
        with profile("heap", period="64KiB") as p:
            buffers = kept(allocator, 40 * MIB // nbytes, nbytes)
        for value in (ALLOC_BYTES, LIVE_BYTES):
            assert p.profile.total(value) == pytest.approx(40 * MIB, rel=0.25)
        assert p.profile.total(LIVE_OBJECTS) == pytest.approx(len(buffers), rel=0.25)
        del buffers


def test_windows_count_what_they_committed():
    page_bytes = page_size_bytes()
    with ExtentStore() as store, profile("heap", period=1) as p:
        window = Window(store, 64 * page_bytes)
        window.commit(0, 40 * page_bytes)
        window.commit(0, 40 * page_bytes)  # is there already
        assert p.profile.total(ALLOC_BYTES) == p.profile.total(LIVE_BYTES) == 40 * page_bytes
        window.release(0, 30 * page_bytes)
        assert p.profile.total(LIVE_BYTES) == 10 * page_bytes
        window.close()
        assert p.profile.total(LIVE_BYTES) == 0
        assert p.profile.total(ALLOC_BYTES) == 40 * page_bytes


def test_nothing_before_and_after(allocator):
    before = kept(allocator, 3, 5000)
    with profile("heap", period=1) as p:
        pass
    after = kept(allocator, 3, 5000)
    assert p.profile.samples == {}
    assert len(before) == len(after)


def test_one_at_a_time(allocator):
    with profile("heap", period=1) as first:
        with pytest.raises(RuntimeError, match="stop that profile first"):
            profile("heap").start()
        kept(allocator, 1, 100)
    assert first.profile.total(ALLOC_OBJECTS) == 1, "the refused one took it away"
    with profile("heap", period=1) as second:
        kept(allocator, 1, 100)
    assert second.profile.total(ALLOC_OBJECTS) == 1


def test_period_is_checked():
    with pytest.raises(ValueError, match="period"):
        HeapProfiler(0)
    with pytest.raises(ValueError, match="period"):
        HeapProfiler("much")


def test_threads_and_collections(allocator):
    """Weak references die in any thread, amid notes too; nothing is lost, nothing is left."""

    def work():
        for i in range(300):
            pair = [allocator.alloc(64), allocator.alloc(9000)]
            pair.append(pair)  # garbage that only a collection finds
            if i % 50 == 0:
                gc.collect()

    with profile("heap", period=1) as p:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    gc.collect()
    assert p.profile.total(ALLOC_OBJECTS) == 4 * 300 * 2
    assert p.profile.total(LIVE_BYTES) == 0


def test_fork_amid_notes(allocator):
    """A child goes on, and notes into its own copy."""
    with profile("heap", period=1) as p:
        buffers = kept(allocator, 2, 100)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                more = kept(allocator, 3, 100)
                code = 0 if p.profile.total(LIVE_OBJECTS) == len(buffers) + len(more) else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert p.profile.total(LIVE_OBJECTS) == len(buffers)


def test_a_profiler_that_raises_is_told_to_who_allocates(allocator):
    """Not the product's, but the core must not lose the block: its owner is made already."""

    def fail(*_):
        raise KeyError("planted")

    noted.start_heap_profile(fail, 1)
    try:
        with pytest.raises(KeyError, match="planted"):
            allocator.alloc(100)
    finally:
        noted.stop_heap_profile()
    allocator.check()
    assert allocator.stats().n_live == 0
