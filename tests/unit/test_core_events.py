"""Slow events of the core: what is kept, in which order, and how many are said to be lost."""

import threading
import time

import pytest
from quiet import quieten
from stress import in_child, running, switching_often

from pagealloc import PageAllocator
from pagealloc.core.event_ring import CAPACITY, KINDS, take_events, unwatch_events, watch_events

ARENA_BYTES = 8 << 20


@pytest.fixture(autouse=True)
def _quiet():
    quieten()


@pytest.fixture
def watched():
    watch_events()
    yield
    unwatch_events()
    take_events()


@pytest.fixture
def allocator():
    with PageAllocator(backing="base", arena_bytes=ARENA_BYTES, purge_after_s=None) as allocator:
        yield allocator


def trim(allocator, n):
    """Each is one event, also if nothing goes back."""
    for _ in range(n):
        allocator.trim()


def kinds(events):
    return [event[0] for event in events]


# --- what is kept ---


def test_an_arena_and_a_trim(watched, allocator):
    begun_at_ns = time.monotonic_ns()
    allocator.alloc("1MiB", prefault=True).close()
    trimmed_bytes = allocator.trim()
    ended_at_ns = time.monotonic_ns()
    (growth, trimming), n_lost = take_events()
    assert n_lost == 0
    assert growth[0] == "arena_growth"
    assert growth[4] == ARENA_BYTES
    assert trimming[0] == "trim"
    assert trimming[4] == trimmed_bytes >= 1 << 20
    assert growth[1] == trimming[1] > 0
    assert begun_at_ns <= growth[2] < growth[3] <= trimming[2] < trimming[3] <= ended_at_ns


def test_the_purger_s_work(watched):
    with PageAllocator(backing="base", arena_bytes=ARENA_BYTES, purge_after_s=0.02) as allocator:
        allocator.alloc("1MiB", prefault=True).close()
        found = []
        while "purge" not in kinds(found):  # pytest-timeout ends what never comes
            time.sleep(0.01)
            found += take_events()[0]
    (purge,) = [event for event in found if event[0] == "purge"]
    assert purge[4] == 1 << 20
    assert set(kinds(found)) <= set(KINDS)


def test_events_are_taken_once(watched, allocator):
    trim(allocator, 2)
    assert kinds(take_events()[0]) == ["trim", "trim"]
    assert take_events() == ([], 0)
    trim(allocator, 1)
    assert kinds(take_events()[0]) == ["trim"]


@pytest.mark.parametrize("n_more", [0, 1, CAPACITY + 3])
def test_the_oldest_are_lost(watched, allocator, n_more):
    trim(allocator, CAPACITY + n_more)
    events, n_lost = take_events()
    assert (len(events), n_lost) == (CAPACITY, n_more)
    begun_at_ns = [event[2] for event in events]
    assert begun_at_ns == sorted(begun_at_ns)
    trim(allocator, 1)
    events, n_lost = take_events()
    assert (len(events), n_lost) == (1, 0)


# --- who watches ---


def test_nothing_is_kept_for_nobody(allocator):
    trim(allocator, 1)
    assert take_events() == ([], 0)
    watch_events()
    try:
        assert take_events() == ([], 0)
        trim(allocator, 1)
    finally:
        unwatch_events()
    trim(allocator, 1)
    assert kinds(take_events()[0]) == ["trim"]


def test_a_second_watch_is_refused(watched):
    with pytest.raises(RuntimeError, match="watched already"):
        watch_events()


def test_a_new_watch_does_not_see_the_old_one_s(allocator):
    watch_events()
    trim(allocator, 1)
    unwatch_events()
    watch_events()
    try:
        assert take_events() == ([], 0)
    finally:
        unwatch_events()


def test_nobody_watches_in_a_forked_child(watched, allocator):
    def work():
        trim(allocator, 1)
        watch_events()
        assert take_events() == ([], 0)
        trim(allocator, 1)
        assert kinds(take_events()[0]) == ["trim"]

    trim(allocator, 1)
    assert in_child(work) == 0
    trim(allocator, 1)
    assert take_events()[0][1:]


# --- threads ---


def test_threads_lose_no_event_but_those_counted(watched):
    """Each heap's number, kind and size belong together; each event is seen once, or was lost."""
    n_each, found, n_lost, stop = 150, [], [], threading.Event()
    sizes = (2 << 20, 4 << 20, 6 << 20)
    allocators = [
        PageAllocator(backing="base", arena_bytes=nbytes, purge_after_s=None) for nbytes in sizes
    ]
    for allocator in allocators:
        allocator.trim()
    heaps = [event[1] for event in take_events()[0]]
    bytes_of_heap = dict(zip(heaps, sizes, strict=True))

    def grow(allocator):
        for _ in range(n_each):
            allocator.alloc("64KiB").close()
            allocator.trim()

    def take():
        while not stop.is_set():
            events, n = take_events()
            found.extend(events)
            n_lost.append(n)

    growing = [threading.Thread(target=grow, args=(allocator,)) for allocator in allocators]
    taking = [threading.Thread(target=take) for _ in range(2)]
    with switching_often(), running(stop, *growing, *taking):
        for thread in growing:
            thread.join()
    events, n = take_events()
    found.extend(events)
    assert len(found) + sum(n_lost) + n == 2 * n_each * len(allocators)
    assert found
    assert {event[1] for event in found} <= bytes_of_heap.keys()
    for kind, heap, begun_at_ns, ended_at_ns, nbytes in found:
        assert kind in ("arena_growth", "trim")
        assert nbytes == (bytes_of_heap[heap] if kind == "arena_growth" else 0)
        assert 0 < begun_at_ns <= ended_at_ns
    for allocator in allocators:
        allocator.close()
