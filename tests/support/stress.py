"""What stress tests have in common: forked children, and what must hold when all is over."""

import os
import signal
import traceback
from collections.abc import Callable

from pagealloc import PageAllocator

CHILD_SECONDS = 30


def in_child(work: Callable[[], object]) -> int:
    """Run `work` in a forked child; its exit code, or minus the signal that killed it."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(CHILD_SECONDS)  # a deadlock ends the child, and fails the test
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
