"""What is slow is told to who listens, and to nobody else."""

import threading
import time

import pytest
from prefixes import layout_of, publish

from pagealloc.kv import KVCache
from pagealloc.slow_events import on_slow_event, slow_event


@pytest.fixture
def events():
    found = []
    remove = on_slow_event(found.append)
    yield found
    remove()


def test_an_event_has_its_times_and_attributes(events):
    before_ns = time.time_ns()
    with slow_event("nap") as attributes:
        time.sleep(0.001)
        attributes["depth"] = 3
    (event,) = events
    assert (event.name, event.attributes, event.error) == ("nap", {"depth": 3}, None)
    assert event.begun_at_ns >= before_ns
    assert event.ended_at_ns - event.begun_at_ns >= 1_000_000


def test_what_fails_is_told_and_raised(events):
    with pytest.raises(KeyError), slow_event("nap"):
        raise KeyError(1)
    assert isinstance(events[0].error, KeyError)


def test_who_stopped_listening_hears_nothing():
    found, others = [], []
    remove, remove_other = on_slow_event(found.append), on_slow_event(others.append)
    remove()
    remove()
    with slow_event("nap"):
        pass
    remove_other()
    with slow_event("nap"):
        pass
    assert (len(found), len(others)) == (0, 1)


def test_a_listener_that_raises_harms_nobody(events):
    def fail(event):
        raise ValueError("mine")

    remove = on_slow_event(fail)
    try:
        with pytest.warns(RuntimeWarning, match="nap"), slow_event("nap"):
            pass
    finally:
        remove()
    assert len(events) == 1


def test_listeners_are_called_in_the_thread_that_was_slow():
    threads = []
    remove = on_slow_event(lambda _event: threads.append(threading.current_thread()))

    def work():
        with slow_event("nap"):
            pass

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(30)
    remove()
    assert threads == [thread]


def test_a_prefix_in_memory_is_restored(events):
    with KVCache(layout_of()) as cache:
        publish(cache, range(8))
        assert events == []  # nothing was published that it could have begun with
        cache.sequence([77, 78]).close()
        assert events == []
        cache.sequence(range(9)).close()
    (event,) = events
    assert event.name == "prefix_restore"
    assert event.attributes == {"n_tokens": 8, "source": "memory"}


def test_a_prefix_in_a_file_is_restored(tmp_path, events):
    pytest.importorskip("xxhash")
    path = tmp_path / "blocks.kv"
    with KVCache(layout_of()) as cache:
        publish(cache, range(8))
        cache.save(path)
    with KVCache.load(path) as cache, cache.sequence(range(8)):
        pass
    load, restore = events
    assert (load.name, load.attributes) == ("cache_load", {"n_blocks": 2})
    assert restore.attributes == {"n_tokens": 8, "source": "file"}


def test_a_load_that_fails_is_told(tmp_path, events):
    with pytest.raises(OSError, match="nowhere"):
        KVCache.load(tmp_path / "nowhere")
    assert isinstance(events[0].error, OSError)
