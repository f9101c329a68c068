"""The heap profiler: what it notes, what of it is live, and what it stands for."""

import _thread
import collections
import contextlib
import gc
import os
import sys
import threading
import time

import numpy as np
import pytest
from stress import running

from pagealloc import ExtentStore, PageAllocator, Window, numpy_handler, page_size_bytes
from pagealloc.core import noted
from pagealloc.observe import profile
from pagealloc.observe.heap_profile import HeapProfiler
from pagealloc.observe.profiles import Profile
from pagealloc.observe.stacks import lock

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
        refused = profile("heap")
        with pytest.raises(RuntimeError, match="stop that profile first"):
            refused.start()
        refused.stop()
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
        noted.stop_heap_profile(fail)
    allocator.check()
    assert allocator.stats().n_live == 0


def test_small_commits_stand_for_all():
    """What one page of a window stands for is live, as long as that window has it."""
    page_bytes, n_windows = page_size_bytes(), 3000
    with ExtentStore() as store, profile("heap", period=16 * page_bytes) as p:
        windows = [Window(store, page_bytes) for _ in range(n_windows)]
        for window in windows:
            window.commit(0, page_bytes)
        live_bytes = p.profile.total(LIVE_BYTES)
        assert live_bytes == p.profile.total(ALLOC_BYTES)
        assert live_bytes == pytest.approx(n_windows * page_bytes, rel=0.5)
        for window in windows:
            window.close()
        assert p.profile.total(LIVE_BYTES) == 0


def test_a_window_that_comes_and_goes_takes_no_more_memory():
    page_bytes = page_size_bytes()
    profiler = HeapProfiler(1)
    with ExtentStore() as store:
        window = Window(store, page_bytes)
        profiler.start()
        try:
            for _ in range(50):
                window.commit(0, page_bytes)
                window.release(0, page_bytes)
            window.commit(0, page_bytes)
        finally:
            profiler.stop()
        assert profiler.profile().total(ALLOC_BYTES) == 51 * page_bytes
        assert profiler.profile().total(LIVE_BYTES) == page_bytes
        assert sum(len(known.by_stack) for known in profiler._noted.values()) <= 2
        window.close()


def test_buffers_made_longer_and_shorter(allocator):
    with profile("heap", period=1) as p:
        buffer = allocator.alloc(1000)
        buffer.resize(5000)
        assert p.profile.total(ALLOC_BYTES) == p.profile.total(LIVE_BYTES) == 5000
        assert p.profile.total(LIVE_OBJECTS) == 1
        buffer.resize(500)
        assert p.profile.total(LIVE_BYTES) == 500
    buffer.close()


def test_a_thread_without_python_frames(allocator):
    with profile("heap", period=1) as p:
        _thread.start_new_thread(allocator.alloc, (5000,))
        for _ in range(1000):
            if p.profile.total(ALLOC_OBJECTS):
                break
            time.sleep(0.01)
    assert p.profile.samples[()][:2] == [1, 5000]


def test_equal_functions_of_two_files_are_two(allocator):
    text = "def take(allocator): return allocator.alloc(100)"
    with profile("heap", period=1) as p:
        for file in ("one.py", "other.py"):
            names: dict = {}
            exec(compile(text, file, "exec"), names)
            names["take"](allocator).close()
    assert {stack[0].file for stack in p.profile.samples} == {"one.py", "other.py"}


def test_a_block_dies_while_others_hold_the_lock(allocator):
    """Who holds a lock of its own while it frees must not wait for one of the profiler's."""
    with profile("heap", period=1):
        buffers = [allocator.alloc(100)]
        thread = threading.Thread(target=buffers.clear)
        with lock:
            thread.start()
            thread.join(timeout=20)
            assert not thread.is_alive()


def test_code_that_allocates_amid_a_profile(allocator):
    """A collection may run it at any moment; here the sum of live shares does."""
    kept_blocks = []

    with profile("heap", period=1) as p:
        kept_blocks += kept(allocator, 3, 100)
        profiler = p._profiler
        live_share = type(next(iter(profiler._noted.values()))).live_share

        def share_and_allocate(known):
            exec(compile("take()", f"file{len(kept_blocks)}", "exec"), {"take": take})
            return live_share(known)

        def take():
            kept_blocks.append(allocator.alloc(100))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("pagealloc.observe.heap_profile._Noted.live_share", share_and_allocate)
            found = p.profile
    assert found.total(LIVE_BYTES) == 300
    assert found.total(ALLOC_BYTES) == 600
    kept_blocks.clear()


def arrays(n: int, nbytes: int) -> list[np.ndarray]:
    return [np.empty(nbytes, np.uint8) for _ in range(n)]


@pytest.mark.parametrize("nbytes", [300, 3 * MIB])
def test_arrays_under_the_handler_of_numpy(allocator, nbytes):
    with profile("heap", period=1) as p, numpy_handler(allocator):
        kept_arrays = arrays(5, nbytes)
        arrays(2, nbytes)
        np.zeros(nbytes, np.uint8)
    found = values_below(p.profile, "arrays")
    assert found == [7, 7 * nbytes, 5, 5 * nbytes]
    del kept_arrays[2:]  # after the profile has ended
    assert values_below(p.profile, "arrays") == [7, 7 * nbytes, 2, 2 * nbytes]
    kept_arrays.clear()
    with numpy_handler(allocator):
        kept_arrays = arrays(5, nbytes)  # where the others were, and not noted
    assert values_below(p.profile, "arrays") == [7, 7 * nbytes, 0, 0]
    assert p.profile.total(ALLOC_BYTES) == 8 * nbytes


def test_an_array_that_numpy_resizes(allocator):
    with profile("heap", period=1) as p, numpy_handler(allocator):
        array = np.empty(1000, np.uint8)
        array.resize(5 * MIB, refcheck=False)
        assert p.profile.total(LIVE_BYTES) == 5 * MIB
        array.resize(5 * MIB - 100, refcheck=False)  # where it is
    assert p.profile.total(ALLOC_BYTES) == 5 * MIB + 1000
    assert p.profile.total(LIVE_OBJECTS) == 1
    del array
    assert p.profile.total(LIVE_OBJECTS) == 0


def test_an_array_that_ends_while_an_exception_is_on_its_way(allocator):
    def fail():
        kept_until_then = arrays(3, 5000)
        raise KeyError(len(kept_until_then))

    with (
        profile("heap", period=1) as p,
        numpy_handler(allocator),
        contextlib.suppress(KeyError),
    ):
        fail()
    assert values_below(p.profile, "fail") == [3, 15000, 0, 0]


def test_an_interrupt_while_an_array_is_noted_is_not_lost(allocator):
    def interrupted(*_):
        raise KeyboardInterrupt

    with numpy_handler(allocator):
        noted.start_heap_profile(interrupted, 1)
        try:
            with pytest.raises(KeyboardInterrupt):
                arrays(1000, 100)
        finally:
            noted.stop_heap_profile(interrupted)


def test_an_array_comes_though_its_note_fails(allocator, monkeypatch):
    def fails(*_):
        raise RuntimeError("no memory for this")

    told = []
    monkeypatch.setattr(sys, "unraisablehook", lambda args: told.append(args.exc_value))
    with numpy_handler(allocator):
        noted.start_heap_profile(fails, 1)
        try:
            array = np.empty(100, np.int64)
        finally:
            noted.stop_heap_profile(fails)
    assert [str(error) for error in told] == ["no memory for this"]
    array[:] = 7
    assert array.sum() == 700
    del array


def test_arrays_of_threads_while_profiles_come_and_go(allocator):
    """Who frees is not who allocated, and what was noted may be so no more."""
    done = threading.Event()
    boxes = [collections.deque(maxlen=20) for _ in range(2)]

    def work(mine, others):
        with numpy_handler(allocator):
            while not done.is_set():
                mine.append(np.full(1000, 3))
                with contextlib.suppress(IndexError):
                    assert others.popleft().sum() == 3000

    threads = [threading.Thread(target=work, args=pair) for pair in (boxes, boxes[::-1])]
    profiles = []
    with running(done, *threads):
        for _ in range(30):
            with profile("heap", period="10KiB") as p:
                time.sleep(0.01)
            profiles.append(p)
    for p in profiles:
        assert 0 <= p.profile.total(LIVE_BYTES) <= p.profile.total(ALLOC_BYTES)
    assert sum(p.profile.total(ALLOC_BYTES) for p in profiles) > 0
    for box in boxes:
        box.clear()
    for p in profiles:
        assert p.profile.total(LIVE_BYTES) == 0
