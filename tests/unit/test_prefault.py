"""Memory made physical ahead of its use: page faults are counted, and never a time."""

import errno
import resource
import threading
import time

import numpy as np
import pytest

from pagealloc import OutOfMemoryError, PageAllocator, page_size_bytes
from pagealloc.core import os_memory

MIB = 1 << 20
PAGE_BYTES = page_size_bytes()
BACKINGS = ("base", "auto")


def n_faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def faults_of_first_touch(buffers):
    views = [np.frombuffer(buffer, np.uint8) for buffer in buffers]
    before = n_faults()
    for view in views:
        view[::PAGE_BYTES] = 1
    return n_faults() - before


@pytest.fixture
def refuse():
    yield os_memory.refuse
    os_memory.refuse("madvise", times=0)


@pytest.mark.parametrize("backing", BACKINGS)
@pytest.mark.parametrize("nbytes", [100, 100_000, 40 * MIB, 100 * MIB + 12345])
def test_a_block_is_backed_when_it_is_handed_out(backing, nbytes):
    with PageAllocator(backing=backing) as allocator:
        before = n_faults()
        with allocator.alloc(nbytes, prefault=True) as buffer:
            assert n_faults() > before
            assert faults_of_first_touch([buffer]) < 64
            if nbytes > MIB:
                assert allocator.stats().held_bytes >= nbytes
        allocator.check()


@pytest.mark.parametrize("guard", ["slot", "slot+freed"])
def test_a_guarded_block_is_backed_up_to_its_guard(guard):
    """The interpreter takes a fault of its own now and then, and a sanitizer some more."""
    with PageAllocator(guard=guard) as allocator:
        for _ in range(2):
            with allocator.alloc(63 * PAGE_BYTES + 5, prefault=True) as buffer:
                assert faults_of_first_touch([buffer]) <= 8
            with allocator.alloc(100, prefault=True) as buffer:
                memoryview(buffer)[-1] = 1
        with pytest.raises(ValueError, match=r"prefault\(\) with guard="):
            allocator.prefault(MIB)


@pytest.mark.parametrize("backing", BACKINGS)
@pytest.mark.parametrize("n_threads", [None, 1, 3])
def test_free_memory_is_backed_and_waits(backing, n_threads):
    with PageAllocator(backing=backing, purge_after_s=0.05) as allocator:
        reports = []
        done_bytes = allocator.prefault(
            "100MiB", n_threads=n_threads, progress=lambda *report: reports.append(report)
        )
        assert done_bytes == 100 * MIB
        assert reports[-1] == (100 * MIB, 100 * MIB)
        assert [done for done, _ in reports] == sorted({done for done, _ in reports})
        assert {total for _, total in reports} == {100 * MIB}
        stats = allocator.stats()
        assert stats.n_live == 0
        assert stats.held_bytes >= 100 * MIB
        time.sleep(0.3)
        assert allocator.stats().held_bytes >= 100 * MIB
        buffers = [allocator.alloc(MIB) for _ in range(96)]
        assert faults_of_first_touch(buffers) < 200
        assert not any(buffer.fresh for buffer in buffers)  # committed before
        assert all(bytes(memoryview(buffer)[1:64]) == bytes(63) for buffer in buffers)
        allocator.check()
        del buffers
        deadline = time.monotonic() + 10
        while allocator.stats().held_bytes > 40 * MIB and time.monotonic() < deadline:
            time.sleep(0.05)
        assert allocator.stats().held_bytes <= 40 * MIB  # it was used: it is like all else
        allocator.trim()
        assert allocator.stats().held_bytes == 0


def test_what_lay_idle_before_waits_as_well():
    with PageAllocator(backing="base", purge_after_s=0.2) as allocator:
        buffers = [allocator.alloc(MIB, prefault=True) for _ in range(64)]
        buffers.clear()
        allocator.collect()
        allocator.collect()
        allocator.prefault("64MiB")
        time.sleep(1)
        assert allocator.stats().held_bytes >= 64 * MIB


def test_trim_takes_it_back():
    with PageAllocator(backing="base") as allocator:
        allocator.prefault("32MiB")
        assert allocator.trim() >= 32 * MIB
        assert allocator.stats().reserved_bytes == 0


def test_a_cancelled_one_keeps_what_it_has():
    with PageAllocator(backing="base", purge_after_s=0.05) as allocator:
        cancel = threading.Event()
        done_bytes = allocator.prefault(
            "256MiB", n_threads=2, progress=lambda *_: cancel.set(), cancel=cancel
        )
        assert 16 * MIB <= done_bytes <= 64 * MIB
        time.sleep(0.3)
        assert done_bytes <= allocator.stats().held_bytes < done_bytes + 8 * MIB
        allocator.check()
        assert allocator.prefault("256MiB", cancel=cancel) == 0
        allocator.check()


def test_what_progress_raises_ends_it():
    class StopError(OSError):
        pass

    def progress(done_bytes, all_bytes):
        raise StopError

    with PageAllocator(backing="base", purge_after_s=0.05) as allocator:
        with pytest.raises(StopError):
            allocator.prefault("256MiB", progress=progress)
        allocator.check()
        allocator.trim()
        assert allocator.stats().reserved_bytes == 0


def test_ctrl_c_ends_it():
    import signal

    with PageAllocator(backing="base") as allocator:
        cancel = threading.Event()
        real_is_set = cancel.is_set

        def is_set():  # between two chunks, in the main thread
            if threading.current_thread() is threading.main_thread():
                signal.raise_signal(signal.SIGINT)
            return real_is_set()

        cancel.is_set = is_set
        with pytest.raises(KeyboardInterrupt):
            allocator.prefault("256MiB", cancel=cancel)
        allocator.check()
        allocator.trim()
        assert allocator.stats().reserved_bytes == 0


def test_within_the_budget():
    with PageAllocator(backing="base", budget_bytes="64MiB") as allocator:
        assert allocator.prefault("64MiB") == 64 * MIB
        with pytest.raises(OutOfMemoryError, match=r"the budget of 64\.0 MiB"):
            allocator.prefault("80MiB")
        allocator.check()
        held = [allocator.alloc("16MiB")]
        allocator.on_pressure(lambda _: held.clear())
        assert allocator.prefault("64MiB") == 64 * MIB
        with allocator.alloc("60MiB"):
            allocator.check()


@pytest.mark.parametrize("backing", BACKINGS)
def test_a_kernel_without_the_call(refuse, backing):
    """Before Linux 5.14: each page is touched instead."""
    with PageAllocator(backing=backing) as allocator:
        with allocator.alloc("5MiB"):
            pass
        refuse("madvise", errno.EINVAL)
        with allocator.alloc("5MiB", prefault=True) as buffer:
            assert faults_of_first_touch([buffer]) < 64
            view = memoryview(buffer)
            view[0] = view[-1] = 7
            view.release()
        allocator.check()


@pytest.mark.parametrize("error", [errno.ENOMEM, errno.EFAULT])
def test_a_refusal_leaves_nothing(refuse, error):
    with PageAllocator(backing="base") as allocator:
        with allocator.alloc("40MiB"):
            pass
        kept = allocator.alloc(1)
        refuse("madvise", error, skip=1)
        with pytest.raises(OutOfMemoryError, match=r"for 41943040 bytes .* the kernel refused"):
            allocator.alloc("40MiB", prefault=True)
        assert allocator.stats().n_live == 1
        refuse("madvise", error, skip=2)
        with pytest.raises(OutOfMemoryError, match=r"for 67108864 bytes .* the kernel refused"):
            allocator.prefault("64MiB")
        refuse("madvise", times=0)
        assert allocator.stats().n_live == 1
        allocator.check()
        kept.close()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("0",), ValueError, "nbytes"),
        (("1MiB", 0), ValueError, "n_threads=0: at least 1"),
        (("1MiB", "many"), TypeError, "integer"),
    ],
)
def test_nonsense(arguments, error, message):
    nbytes, *n_threads = arguments
    with PageAllocator() as allocator:
        with pytest.raises(error, match=message):
            allocator.prefault(nbytes, n_threads=n_threads[0] if n_threads else None)
        assert allocator.stats().reserved_bytes == 0


def test_several_at_once():
    with PageAllocator(backing="base", purge_after_s=0.05) as allocator:
        done = []
        threads = [
            threading.Thread(target=lambda: done.append(allocator.prefault("24MiB")))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for _ in range(2000):
            allocator.alloc(100_000).close()
        for thread in threads:
            thread.join()
        assert done == [24 * MIB] * 4
        allocator.check()
        assert allocator.stats().held_bytes >= 24 * MIB


def test_a_closed_allocator():
    from pagealloc import ClosedError

    allocator = PageAllocator()
    allocator.close()
    with pytest.raises(ClosedError):
        allocator.prefault(1)
