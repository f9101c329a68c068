"""The interval map against a dict of pages."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagealloc.core.interval_map import IntervalMap

END = 48
pages = st.tuples(st.integers(0, END - 8), st.integers(0, 8))
steps = st.one_of(
    st.tuples(st.just("set"), pages, st.integers(0, 2)),
    st.tuples(st.just("erase"), pages, st.just(0)),
    st.tuples(st.just("add"), pages, st.sampled_from([-1, 1])),
)


def as_dict(intervals):
    return {
        page: value
        for first, n_pages, value in intervals.runs(0, END)
        for page in range(first, first + n_pages)
    }


def fewest_runs(expected):
    """How many runs a map needs that has joined whatever can be joined."""
    return sum(expected.get(page - 1) != expected[page] for page in expected)


@given(st.lists(steps, max_size=60))
def test_it_is_a_dict_of_pages(steps):
    intervals, expected = IntervalMap(), {}
    for action, (first, n_pages), number in steps:
        changed = range(first, first + n_pages)
        if action == "set":
            intervals.set(first, n_pages, number)
            expected |= dict.fromkeys(changed, number)
        elif action == "erase":
            intervals.erase(first, n_pages)
            expected = {p: v for p, v in expected.items() if p not in changed}
        elif all(page in expected for page in changed):
            intervals.add(first, n_pages, number)
            expected |= {page: expected[page] + number for page in changed}
        else:
            with pytest.raises(ValueError, match="carry nothing"):
                intervals.add(first, n_pages, number)
        intervals.check()
        assert as_dict(intervals) == expected
        assert len(intervals) == fewest_runs(expected)


@given(st.lists(pages, max_size=12), pages)
def test_runs_and_gaps_are_cut_to_the_range_and_fill_it(committed, asked):
    intervals = IntervalMap()
    for first, n_pages in committed:
        intervals.set(first, n_pages, first % 3)
    parts = [run[:2] for run in intervals.runs(*asked)] + intervals.gaps(*asked)
    covered = [page for first, n_pages in sorted(parts) for page in range(first, first + n_pages)]
    assert covered == list(range(asked[0], sum(asked)))


def test_metadata_grows_with_runs_not_with_pages():
    intervals = IntervalMap()
    intervals.set(0, 1 << 40, 1)
    assert len(intervals) == 1
    intervals.add(1 << 20, 1, 1)
    assert intervals.runs(0, 1 << 40) == [
        (0, 1 << 20, 1),
        (1 << 20, 1, 2),
        ((1 << 20) + 1, (1 << 40) - (1 << 20) - 1, 1),
    ]
    intervals.add(1 << 20, 1, -1)
    assert len(intervals) == 1


@pytest.mark.parametrize("change", ["set", "add"])
@pytest.mark.parametrize("bad", [(-1, 1), (0, -1), (2**63 - 1, 1)])
def test_pages_out_of_range_are_refused(change, bad):
    intervals = IntervalMap()
    intervals.set(0, 4, 1)
    with pytest.raises(ValueError, match="out of range"):
        getattr(intervals, change)(*bad, 1)
    with pytest.raises(ValueError, match="out of range"):
        intervals.erase(*bad)
    intervals.check()
    assert intervals.runs(0, END) == [(0, 4, 1)]


def test_ten_thousand_runs():
    intervals = IntervalMap()
    for page in range(0, 20_000, 2):
        intervals.set(page, 1, page)
    assert len(intervals) == 10_000
    assert intervals.runs(10_000, 4) == [(10_000, 1, 10_000), (10_002, 1, 10_002)]
    for page in range(1, 20_000, 2):
        intervals.set(page, 1, 0)
    intervals.set(0, 20_000, 0)
    assert len(intervals) == 1
