"""What stress tests have in common: threads, forked children, what must hold when all is over."""

import faulthandler
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pagealloc import PageAllocator

CHILD_SECONDS = 30
OFTEN_S = 1e-4


@contextmanager
def switching_often() -> Iterator[None]:
    """Threads of Python take turns 50 times as often: more interleavings in less time.

    Who asks for the GIL back after each short call else waits 5 ms for a thread that never waits.
    """
    before_s = sys.getswitchinterval()
    sys.setswitchinterval(OFTEN_S)
    try:
        yield
    finally:
        sys.setswitchinterval(before_s)


@contextmanager
def running(stop: threading.Event, *threads: threading.Thread) -> Iterator[None]:
    """Threads at work, which are told to stop and waited for whatever becomes of the test.

    One that doesn't stop fails the test, and keeps nobody from leaving.
    """
    for thread in threads:
        thread.daemon = True
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join(CHILD_SECONDS)
    assert not any(thread.is_alive() for thread in threads)


def in_child(work: Callable[[], object]) -> int:
    """Run `work` in a forked child; its exit code, or minus the signal that killed it."""
    pid = os.fork()
    if pid == 0:
        faulthandler.register(signal.SIGALRM, chain=True)
        signal.alarm(CHILD_SECONDS)  # a deadlock says where, ends the child, and fails the test
        try:
            work()
        except BaseException:  # noqa: BLE001  (whatever it is, the exit code says it)
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def assert_nothing_is_left(allocator: PageAllocator) -> None:
    """When all threads are done and all blocks freed: nothing may be lost."""
    allocator.check()
    allocator.trim()
    assert allocator.stats().reserved_bytes == 0
    allocator.close()
