"""Bytes that no feed would send: a ValueError, and never another error."""

import json

from hypothesis import given
from hypothesis import strategies as st
from snapshots import allocator_of, busy_process, histogram_of, snapshot_of

from pagealloc.observe.live import History, latencies_between
from pagealloc.observe.snapshot_json import snapshot_from_json, snapshot_to_json
from pagealloc.observe.web import live_json

with busy_process() as found:
    BUSY = snapshot_to_json(found)
SMALL = json.loads(
    snapshot_to_json(snapshot_of(allocator_of(latencies=[histogram_of([20, 30, 10**9])])))
)
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from([-1, 0, 1 << 63, 1 << 64, 1 << 5000, "> 1 GiB", "0 B", "1e400"])
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


def read(text):
    """Read it, and if it is a snapshot, show it: whatever passes can be shown."""
    try:
        snapshot = snapshot_from_json(text)
    except ValueError:
        return None
    assert snapshot_from_json(snapshot_to_json(snapshot)) == snapshot
    latencies_between(None, snapshot)
    history = History()
    history.add(snapshot)
    json.loads(live_json(history))
    return snapshot


@given(st.binary(max_size=300) | st.text(max_size=300))
def test_anything(text):
    read(text)


@given(st.lists(st.tuples(st.integers(0, len(BUSY)), st.binary(max_size=8)), max_size=4))
def test_a_text_with_other_bytes_in_it(changes):
    data = bytearray(BUSY.encode())
    for at, piece in changes:
        data[at : at + len(piece)] = piece
    read(bytes(data))


@given(st.data())
def test_a_snapshot_with_another_value(data):
    plain = json.loads(json.dumps(SMALL))
    place = plain
    while True:
        names = sorted(place) if isinstance(place, dict) else range(min(len(place), 5))
        key = data.draw(st.sampled_from(names))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = data.draw(values)
    read(json.dumps(plain))


def test_what_is_changed_is_read_unchanged():
    assert read(BUSY) is not None
    assert read(json.dumps(SMALL)) is not None
