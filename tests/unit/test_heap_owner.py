"""Heap: closed by several threads at once; listed while others are collected."""

import contextlib
import gc
import threading
import time

import pytest

from pagealloc import OutOfMemoryError, PageAllocator
from pagealloc.core.heap_owner import open_heaps

MIB = 1 << 20


def test_two_threads_close_it_while_a_third_is_in_it():
    """Both wait for the third; who comes second finds it closed, and not what is unmapped."""
    allocator = PageAllocator(backing="base", budget_bytes=8 * MIB)
    is_in, may_leave = threading.Event(), threading.Event()

    def ask(_nbytes):
        is_in.set()
        may_leave.wait(30)
        raise KeyError("nothing to give back")

    def alloc():
        with pytest.raises(OutOfMemoryError):
            allocator.alloc("16MiB")

    def close():
        with contextlib.suppress(BufferError):  # on a busy machine it has waited long enough
            allocator.close()

    allocator.on_pressure(ask)
    threads = [threading.Thread(target=alloc)]
    threads[0].start()
    assert is_in.wait(30)
    threads += [threading.Thread(target=close) for _ in range(4)]
    for thread in threads[1:]:
        thread.start()
    time.sleep(0.02)  # so that they wait
    may_leave.set()
    for thread in threads:
        thread.join()
    allocator.close()
    assert allocator.closed


def test_listing_while_garbage_is_collected():
    """A copy of the list may start a collection, in which heaps die that are in it."""
    with PageAllocator() as allocator:
        threshold = gc.get_threshold()
        try:
            for n_new in range(1, 60):
                gc.collect()
                cycle = [PageAllocator()]
                cycle.append(cycle)
                gc.set_threshold(n_new)
                del cycle
                assert allocator in [heap for _, heap in open_heaps()]
                gc.set_threshold(*threshold)
        finally:
            gc.set_threshold(*threshold)
