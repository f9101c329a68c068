"""Threads that allocate, free each other's buffers, and trim; and forks among them."""

import random
import subprocess
import sys
import threading
import time
from collections import deque
from contextlib import contextmanager, suppress

import numpy as np
import pytest
from stress import assert_nothing_is_left, in_child, running

from pagealloc import ClosedError, PageAllocator

N_THREADS = 4


def churn(allocator, mailbox, stop, seed, failures):
    """Fill each buffer with one byte, pass some on, check the byte before freeing."""
    rng = random.Random(seed)
    try:
        while not stop.is_set():
            nbytes = int(2 ** rng.uniform(0, 20))
            buffer = allocator.alloc(nbytes)
            np.frombuffer(buffer, np.uint8).fill(seed)
            if rng.random() < 0.3:
                buffer.resize(int(2 ** rng.uniform(0, 20)))
                assert (np.frombuffer(buffer, np.uint8)[:nbytes] == seed).all()
                np.frombuffer(buffer, np.uint8).fill(seed)
            mailbox.append((seed, buffer))
            if len(mailbox) > 50:
                fill, other = mailbox.popleft()
                assert (np.frombuffer(other, np.uint8) == fill).all()
                other.close()
    except BaseException as error:
        failures.append(error)
        raise


@contextmanager
def churning(allocator):
    """Threads at work, which end whatever the test does; then nothing may be lost."""
    mailbox, stop, failures = deque(), threading.Event(), []
    threads = [
        threading.Thread(target=churn, args=(allocator, mailbox, stop, seed, failures))
        for seed in range(1, N_THREADS + 1)
    ]
    with running(stop, *threads):
        yield
    assert not failures
    for fill, buffer in mailbox:
        assert (np.frombuffer(buffer, np.uint8) == fill).all()
        buffer.close()


def test_buffers_pass_between_threads_while_another_trims(duration_s):
    allocator = PageAllocator(backing="base", arena_bytes="4MiB")
    with churning(allocator):
        end = time.monotonic() + duration_s
        while time.monotonic() < end:
            allocator.trim()
            allocator.stats()
            time.sleep(0.01)
    assert_nothing_is_left(allocator)


@pytest.mark.fork_under_load
def test_a_child_forked_under_load_can_read_allocate_and_free(duration_s):
    allocator = PageAllocator(backing="base", arena_bytes="4MiB")
    kept = allocator.zeros(1000, np.uint8)
    kept.fill(42)

    def work(kept=kept):
        assert (kept == 42).all()
        kept.fill(1)  # copy on write: the parent must not see it
        for nbytes in (1, 100, 5000, 100_000, 10 << 20):
            with allocator.alloc(nbytes) as buffer:
                np.frombuffer(buffer, np.uint8).fill(9)
        allocator.trim()
        allocator.check()

    end = time.monotonic() + duration_s
    with churning(allocator):
        while time.monotonic() < end:
            assert in_child(work) == 0
            assert (kept == 42).all()
    del kept, work
    assert_nothing_is_left(allocator)


@pytest.mark.fork_under_load
@pytest.mark.parametrize("backing", ["base", "auto"])
def test_a_child_forked_while_memory_comes_and_goes_has_a_purger_of_its_own(duration_s, backing):
    """Also if the fork met the purger, a trim, or a prefault at work."""
    allocator = PageAllocator(backing=backing, arena_bytes="8MiB", purge_after_s=0.01)
    kept = allocator.zeros(1000, np.uint8)
    stop = threading.Event()

    def give_and_take():
        while not stop.is_set():
            allocator.prefault("3MiB", n_threads=2)
            allocator.trim()

    def work(kept=kept):
        assert (kept == 42).all()
        allocator.trim()
        # Committed, not held: what other threads had not written to yet may share a huge page with
        # what is written to here, and a huge page in use does not go back in part.
        floor_bytes = allocator.stats().committed_bytes
        with allocator.alloc("20MiB", prefault=True) as large:
            np.frombuffer(large, np.uint8).fill(9)
        small = [allocator.alloc(65536) for _ in range(64)]
        for buffer in small:
            np.frombuffer(buffer, np.uint8).fill(9)
        del buffer
        small.clear()
        end = time.monotonic() + 10
        while allocator.stats().held_bytes > floor_bytes and time.monotonic() < end:
            time.sleep(0.01)
        allocator.check()
        assert allocator.stats().held_bytes <= floor_bytes

    kept.fill(42)
    end = time.monotonic() + duration_s
    with churning(allocator), running(stop, threading.Thread(target=give_and_take)):
        while time.monotonic() < end:
            assert in_child(work) == 0
    del kept, work
    assert_nothing_is_left(allocator)


@pytest.mark.fork_under_load
def test_a_forked_child_knows_what_is_live_and_can_close(duration_s):
    """The other threads' calls, cut off by the fork, must not look like live buffers or callers."""
    end = time.monotonic() + duration_s
    while time.monotonic() < end:
        allocator = PageAllocator(backing="base", arena_bytes="2MiB")
        stop = threading.Event()

        def churn_slots(allocator=allocator, stop=stop):
            while not stop.is_set():
                allocator.alloc(100).close()

        def work(allocator=allocator):
            n_live = allocator.stats().n_live
            assert n_live in (0, 1)
            if n_live == 0:
                allocator.close()

        with running(stop, threading.Thread(target=churn_slots)):
            assert in_child(work) == 0
        allocator.close()


@pytest.mark.parametrize("other", ["alloc", "close", "stats", "trim"])
def test_close_races_with_other_calls(other):
    """One of them wins; the other is served before, or told that it is closed or in use."""
    calls = {
        "alloc": lambda allocator: allocator.alloc(5000).close(),
        "close": lambda allocator: allocator.close(),
        "stats": lambda allocator: allocator.stats(),
        "trim": lambda allocator: allocator.trim(),
    }

    def call(name, allocator, barrier):
        barrier.wait()
        with suppress(ClosedError, BufferError):
            calls[name](allocator)

    for _ in range(300):
        allocator = PageAllocator(backing="base", arena_bytes="2MiB")
        allocator.alloc(5000).close()
        barrier = threading.Barrier(3)
        threads = [
            threading.Thread(target=call, args=(name, allocator, barrier))
            for name in ("close", other, other)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        allocator.close()


@pytest.mark.fork_under_load
def test_the_default_allocator_is_made_in_a_child_forked_meanwhile():
    program = """
import os, signal, threading
import pagealloc
threads = [threading.Thread(target=pagealloc.default_allocator) for _ in range(4)]
for thread in threads:
    thread.start()
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)
        pagealloc.default_allocator().alloc(100).close()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
"""
    for _ in range(5):
        subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True)
