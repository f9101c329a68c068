"""Contention: waits for the mutexes that threads share, counted and by stack."""

import threading

import pytest

from pagealloc import PageAllocator
from pagealloc.core.lock_waits import lock_wait_counts
from pagealloc.observe import profile

N_BLOCKS = 3000
MAX_ROUNDS = 200


def fight(allocator: PageAllocator, stop: threading.Event) -> None:
    while not stop.is_set():
        allocator.alloc_many("8KiB", N_BLOCKS).close()


def fight_until_somebody_waits(allocator: PageAllocator) -> None:
    """Two threads at one central list, until one of them had to wait for it."""
    stop = threading.Event()
    before = lock_wait_counts()[0]
    threads = [threading.Thread(target=fight, args=(allocator, stop)) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(MAX_ROUNDS):
            if lock_wait_counts()[0] > before:
                return
            stop.wait(0.05)
        pytest.fail("three threads never met")
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_waits_are_counted_and_noted_by_stack():
    # Without a purger, whose thread has no Python stack, and may wait longest on a busy machine.
    with PageAllocator(purge_after_s=None) as allocator, profile("contention") as p:
        before = lock_wait_counts()
        fight_until_somebody_waits(allocator)
    after = lock_wait_counts()
    found = p.profile
    assert after[0] > before[0]
    assert after[1] > before[1]
    assert found.total() >= after[1] - before[1], "what was waited is all in the profile"
    assert found.total(0) >= after[0] - before[0], "each wait is counted"
    hottest, waited_ns = found.hottest(1)[0]
    assert hottest.function == "fight"
    assert waited_ns > found.total() // 2


def test_alone_nobody_waits():
    with PageAllocator(purge_after_s=None) as allocator, profile("contention") as p:
        for _ in range(50):
            allocator.alloc_many("8KiB", 100).close()
    assert not any("test_alone" in frame.function for stack in p.profile.samples for frame in stack)


def test_waits_before_it_began_are_not_in_it():
    with PageAllocator() as allocator:
        fight_until_somebody_waits(allocator)
        with profile("contention") as p:
            allocator.alloc_many("8KiB", N_BLOCKS).close()
        assert not any(f.function == "fight" for stack in p.profile.samples for f in stack)


def test_one_at_a_time():
    with profile("contention"):
        refused = profile("contention")
        with pytest.raises(RuntimeError, match="stop that profile first"):
            refused.start()
        refused.stop()
        with pytest.raises(RuntimeError, match="stop that profile first"):
            refused.start()
    profile("contention").start().stop()
