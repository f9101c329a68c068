"""Snapshots as JSON: what is written is read, and nothing else is."""

import json
from dataclasses import replace

import pytest
from snapshots import allocator_of, busy_process, histogram_of, snapshot_of

from pagealloc.observe import snapshot_json
from pagealloc.observe.snapshot_json import snapshot_from_json, snapshot_to_json


@pytest.fixture(scope="module")
def snapshot():
    with busy_process() as found:
        yield found


def test_there_and_back(snapshot):
    # Other tests' allocators may be there as well.
    assert any(one.latencies and one.stats.arenas for one in snapshot.allocators)
    assert snapshot.caches
    text = snapshot_to_json(snapshot)
    assert "\n" not in text
    assert snapshot_from_json(text) == snapshot
    assert snapshot_from_json(text.encode()) == snapshot


def test_a_snapshot_of_nothing():
    snapshot = snapshot_of()
    assert snapshot_from_json(snapshot_to_json(snapshot)) == snapshot


def test_what_was_counted_stays_counted(snapshot):
    found = snapshot_from_json(snapshot_to_json(snapshot))
    before, after = snapshot.allocators[0].latencies[0], found.allocators[0].latencies[0]
    assert after.n_samples == before.n_samples > 0
    assert after.percentile_ns(99) == before.percentile_ns(99)


def changed(path, value):
    """The text of a snapshot in which one value is another."""
    snapshot = snapshot_of(allocator_of(latencies=[histogram_of([20, 30])], live_bytes=5))
    plain = json.loads(snapshot_to_json(snapshot))
    place = plain
    *above, last = path
    for name in above:
        place = place[name]
    place[last] = value
    return json.dumps(plain)


ALLOCATOR = ("snapshot", "allocators", 0)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("version",), 0),
        (("version",), None),
        (("snapshot",), []),
        (("snapshot", "pid"), True),
        (("snapshot", "pid"), "1"),
        (("snapshot", "pid"), 1.0),
        (("snapshot", "pid"), 1 << 64),
        (("snapshot", "pid"), None),
        (("snapshot", "more"), 1),
        (("snapshot", "time_s"), 1 << 5000),
        (("snapshot", "time_s"), "now"),
        (("snapshot", "allocators"), {}),
        (("snapshot", "allocators"), [3]),
        ((*ALLOCATOR, "name"), "\x1b[2J"),
        ((*ALLOCATOR, "name"), "two\nlines"),
        ((*ALLOCATOR, "name"), "x" * 1001),
        ((*ALLOCATOR, "stats", "live_bytes"), [1]),
        ((*ALLOCATOR, "stats", "budget_bytes"), False),
        ((*ALLOCATOR, "latencies", 0, "counts"), [1, 2]),
        ((*ALLOCATOR, "latencies", 0, "counts", 3), -1),
        ((*ALLOCATOR, "latencies", 0, "n_samples"), 2),
    ],
)
def test_another_value_is_refused(path, value):
    with pytest.raises(ValueError, match="snapshot"):
        snapshot_from_json(changed(path, value))


def test_the_unchanged_one_is_read():
    assert snapshot_from_json(changed(("version",), snapshot_json.VERSION))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "[]",
        "{}",
        "1" * 10_000,
        "[" * 100_000,
        '{"version": 1, "version": 1}',
        '{"version": NaN}',
        b"\xff\xfe{",
        b"{\x00}",
    ],
)
def test_no_snapshot(text):
    with pytest.raises(ValueError, match="snapshot"):
        snapshot_from_json(text)


def test_infinity_is_no_time():
    text = snapshot_to_json(snapshot_of()).replace("1000.0", "1e999")
    with pytest.raises(ValueError, match="time_s is out of range"):
        snapshot_from_json(text)


def test_a_long_one_is_not_even_parsed(monkeypatch):
    monkeypatch.setattr(snapshot_json, "MOST_BYTES", 100)
    with pytest.raises(ValueError, match="more than 100 bytes"):
        snapshot_from_json(snapshot_to_json(snapshot_of(allocator_of())))


def test_a_number_that_is_none_is_not_written():
    with pytest.raises(ValueError, match="not JSON compliant"):
        snapshot_to_json(replace(snapshot_of(), time_s=float("nan")))
