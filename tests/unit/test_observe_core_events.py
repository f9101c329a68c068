"""Slow events of the core, told to the listeners: by whom, how often, and until when."""

import subprocess
import sys
import threading
import time
import warnings

import pytest
from quiet import quieten
from stress import in_child

from pagealloc import PageAllocator
from pagealloc.core import event_ring
from pagealloc.observe import core_events
from pagealloc.observe.core_events import follow_core_events
from pagealloc.slow_events import on_slow_event

ARENA_BYTES = 8 << 20


@pytest.fixture(autouse=True)
def _quiet():
    quieten()


@pytest.fixture
def told():
    found = []
    remove = on_slow_event(found.append)
    yield found
    remove()


@pytest.fixture
def allocator():
    with PageAllocator(backing="base", arena_bytes=ARENA_BYTES, purge_after_s=None) as allocator:
        yield allocator


def n_tellers():
    return sum(thread.name == "pagealloc-events" for thread in threading.enumerate())


def names(told):
    return [event.name for event in told]


def test_what_is_told(told, allocator):
    begun_at_ns = time.time_ns()
    stop = follow_core_events()
    allocator.alloc("1MiB", prefault=True).close()
    trimmed_bytes = allocator.trim()
    stop()
    growth, purge = told
    heap = growth.attributes["heap"]
    assert growth.name == "arena_growth"
    assert growth.attributes == {"heap": heap, "nbytes": ARENA_BYTES}
    assert purge.name == "purge"
    assert purge.attributes == {"heap": heap, "nbytes": trimmed_bytes, "cause": "trim"}
    assert growth.begun_at_ns < growth.ended_at_ns <= purge.begun_at_ns < purge.ended_at_ns
    # The wall clock may be set meanwhile, but not by a minute.
    assert abs(growth.begun_at_ns - begun_at_ns) < 60e9


def test_the_thread_tells_by_itself(told, monkeypatch):
    monkeypatch.setattr(core_events, "INTERVAL_S", 0.01)
    stop = follow_core_events()
    try:
        with PageAllocator(backing="base", purge_after_s=0.02) as allocator:
            allocator.alloc("1MiB", prefault=True).close()
            while "purge" not in names(told):  # pytest-timeout ends what never comes
                time.sleep(0.01)
    finally:
        stop()
    assert names(told)[0] == "arena_growth"
    assert told[names(told).index("purge")].attributes["cause"] == "idle"


def test_the_lost_are_counted(told, allocator):
    stop = follow_core_events()
    with_lost = event_ring.CAPACITY + 5
    for _ in range(with_lost):
        allocator.trim()
    stop()
    lost = [event.attributes.get("n_lost", 0) for event in told]
    assert len(told) + sum(lost) == with_lost
    assert sum(lost) in range(6)  # the thread may have told some meanwhile


def test_two_follow_and_each_event_is_told_once(told, allocator):
    first, second = follow_core_events(), follow_core_events()
    try:
        assert n_tellers() == 1
        allocator.trim()
        first()
        first()
        assert names(told) == ["purge"]
        allocator.trim()
    finally:
        second()
    assert names(told) == ["purge", "purge"]
    assert n_tellers() == 0


def test_it_costs_nothing_before_and_after(told, allocator):
    assert n_tellers() == 0
    follow_core_events()()
    allocator.trim()
    assert n_tellers() == 0
    assert told == []
    assert event_ring.take_events() == ([], 0)


def test_a_failing_listener_does_not_end_the_thread(told, allocator, monkeypatch):
    monkeypatch.setattr(core_events, "INTERVAL_S", 0.01)

    def fail(event):
        raise OSError("full")

    remove = on_slow_event(fail)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        stop = follow_core_events()
        try:
            for n in (1, 2):
                allocator.trim()
                while len(told) < n:
                    time.sleep(0.01)
        finally:
            stop()
            remove()


def test_a_forked_child_follows_anew(told, allocator):
    def work():
        assert n_tellers() == 0
        allocator.trim()
        follow_again = follow_core_events()
        allocator.trim()
        stop()  # the parent's, which is nothing here
        assert n_tellers() == 1
        follow_again()
        assert names(told) == ["purge"]

    stop = follow_core_events()
    try:
        assert in_child(work) == 0
        allocator.trim()
    finally:
        stop()
    assert names(told) == ["purge"]


def test_the_end_of_the_process_tells_the_rest():
    code = (
        "import atexit\n"
        "from pagealloc import PageAllocator\n"
        "from pagealloc.observe.core_events import follow_core_events\n"
        "from pagealloc.slow_events import on_slow_event\n"
        "atexit.register(print, 'shut down')\n"
        "on_slow_event(lambda event: print(event.name))\n"
        "follow_core_events()\n"
        "PageAllocator(backing='base').trim()\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert run.stdout == "purge\nshut down\n"
