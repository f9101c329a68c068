"""Work in a child process that shares nothing but what it opens itself."""

import os
import time
import traceback

__all__ = ["child_of", "in_child", "wait_for"]


def child_of(work, *arguments):
    """Fork, and have the child do the work; return its pid."""
    pid = os.fork()
    if pid:
        return pid
    try:
        work(*arguments)
        os._exit(0)
    except BaseException as error:
        traceback.print_exception(error)
        raise
    finally:
        os._exit(1)


def in_child(work, *arguments):
    """Have a child do the work, and wait for it; it must succeed."""
    pid = child_of(work, *arguments)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def wait_for(condition, timeout_s=10.0):
    """Wait until something is so that another thread or process does."""
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, "waited in vain"
        time.sleep(0.001)
