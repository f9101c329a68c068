"""Threads that allocate, free each other's buffers, and trim; and forks among them."""

import os
import random
import signal
import threading
import time
from collections import deque

import numpy as np

from pagealloc import PageAllocator

N_THREADS = 4


def churn(allocator, mailbox, stop, seed, failures):
    """Fill each buffer with one byte, pass some on, check the byte before freeing."""
    rng = random.Random(seed)
    try:
        while not stop.is_set():
            nbytes = int(2 ** rng.uniform(0, 20))
            buffer = allocator.alloc(nbytes)
            np.frombuffer(buffer, np.uint8).fill(seed)
            mailbox.append((seed, buffer))
            if len(mailbox) > 50:
                fill, other = mailbox.popleft()
                assert (np.frombuffer(other, np.uint8) == fill).all()
                other.close()
    except BaseException as error:
        failures.append(error)
        raise


def start_churn(allocator):
    mailbox, stop, failures = deque(), threading.Event(), []
    threads = [
        threading.Thread(target=churn, args=(allocator, mailbox, stop, seed, failures))
        for seed in range(1, N_THREADS + 1)
    ]
    for thread in threads:
        thread.start()
    return mailbox, stop, failures, threads


def finish(allocator, mailbox, stop, failures, threads):
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures
    for fill, buffer in mailbox:
        assert (np.frombuffer(buffer, np.uint8) == fill).all()
        buffer.close()
    allocator.check()
    allocator.trim()
    assert allocator.stats().reserved_bytes == 0
    allocator.close()


def test_buffers_pass_between_threads_while_another_trims():
    allocator = PageAllocator(backing="base", arena_bytes="4MiB")
    mailbox, stop, failures, threads = start_churn(allocator)
    end = time.monotonic() + 2
    while time.monotonic() < end:
        allocator.trim()
        allocator.stats()
        time.sleep(0.01)
    finish(allocator, mailbox, stop, failures, threads)


def test_a_child_forked_under_load_can_read_allocate_and_free():
    allocator = PageAllocator(backing="base", arena_bytes="4MiB")
    kept = allocator.zeros(1000, np.uint8)
    kept.fill(42)
    mailbox, stop, failures, threads = start_churn(allocator)
    for _ in range(100):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                signal.alarm(30)  # a deadlock ends the child, and fails the test
                assert (kept == 42).all()
                kept.fill(1)  # copy on write: the parent must not see it
                child = [allocator.alloc(n) for n in (1, 100, 5000, 100_000, 10 << 20)]
                for buffer in child:
                    np.frombuffer(buffer, np.uint8).fill(9)
                    buffer.close()
                allocator.trim()
                allocator.check()
                status = 0
            finally:
                os._exit(status)
        assert os.waitpid(pid, 0)[1] == 0
        assert (kept == 42).all()
    del kept
    finish(allocator, mailbox, stop, failures, threads)
