"""Latency histograms: where a duration is counted, and what can be told from the counts."""

import dataclasses
import math
import threading
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagealloc.core import os_memory
from pagealloc.core.latency import LatencyTable, bucket_of, group_of_pages, page_group_count
from pagealloc.core.latency_histogram import LatencyHistogram, size_group_labels
from pagealloc.core.os_memory import page_size_bytes, refusing
from pagealloc.core.size_class import slot_sizes_bytes

PAGE_BYTES = [4096, 16384, 65536]
EDGES_NS = LatencyHistogram.bucket_edges_ns
FACTOR_TWO_NS = LatencyHistogram.factor_two_edges_ns
N_BUCKETS = len(EDGES_NS) + 1


def reference_bucket(ns: int) -> int:
    """Walk up the edges, as the docstring describes them."""
    octave_ns, bucket = 16, 1
    if ns < octave_ns:
        return 0
    while ns >= octave_ns * 2:
        octave_ns, bucket = octave_ns * 2, bucket + 8
    return min(bucket + (ns - octave_ns) // (octave_ns // 8), N_BUCKETS - 1)


def histogram_of(samples_ns, size_class: str = "64 B", node: int = 0) -> LatencyHistogram:
    counts = [0] * N_BUCKETS
    for ns in samples_ns:
        counts[bucket_of(ns)] += 1
    return LatencyHistogram(size_class, node, sum(samples_ns), tuple(counts))


samples = st.lists(st.integers(0, 1 << 30), min_size=1, max_size=60)


# --- buckets ---


def test_the_edges_are_what_the_docstring_says():
    assert EDGES_NS[:10] == (16, 18, 20, 22, 24, 26, 28, 30, 32, 36)
    assert EDGES_NS[-1] == 100_663_296
    assert FACTOR_TWO_NS[0] == 16
    assert FACTOR_TWO_NS[-1] == 67_108_864
    assert all(upper == 2 * lower for lower, upper in pairwise(FACTOR_TWO_NS))
    assert set(FACTOR_TWO_NS) <= set(EDGES_NS)


def test_a_bucket_is_at_most_an_eighth_as_wide_as_its_lower_edge():
    assert all(0 < (upper - lower) * 8 <= lower for lower, upper in pairwise(EDGES_NS))


@pytest.mark.parametrize("i", range(len(EDGES_NS)))
def test_around_an_edge(i):
    assert bucket_of(EDGES_NS[i] - 1) == i
    assert bucket_of(EDGES_NS[i]) == i + 1
    assert bucket_of(EDGES_NS[i] + 1) == i + 1


def test_the_ends():
    assert [bucket_of(ns) for ns in (-(1 << 63), -1, 0, 1, 15)] == [0] * 5
    assert [bucket_of(ns) for ns in (10**9, (1 << 62) + 1, (1 << 63) - 1)] == [N_BUCKETS - 1] * 3


def test_longer_is_never_counted_lower():
    buckets = [bucket_of(ns) for ns in range(4096)]
    assert buckets == sorted(buckets)
    assert set(buckets) == set(range(buckets[-1] + 1))


@given(st.integers(0, 63).flatmap(lambda bits: st.integers(0, (1 << bits) - 1)))
def test_the_bucket_is_the_reference_s(ns):
    assert bucket_of(ns) == reference_bucket(ns)


# --- size groups ---


@pytest.mark.parametrize("page_bytes", PAGE_BYTES)
def test_a_run_is_in_the_smallest_group_that_holds_it(page_bytes):
    labels = size_group_labels([], page_bytes)
    assert len(labels) == page_group_count(page_bytes)
    largest_pages = (1 << 30) // page_bytes
    assert labels[group_of_pages(1, page_bytes)] == f"{page_bytes // 1024} KiB"
    assert labels[group_of_pages(largest_pages, page_bytes)] == "1 GiB"
    assert labels[group_of_pages(largest_pages + 1, page_bytes)] == "> 1 GiB"
    assert labels[group_of_pages((1 << 63) - 1, page_bytes)] == "> 1 GiB"
    n_pages = 1
    while n_pages <= largest_pages:
        group = group_of_pages(n_pages, page_bytes)
        assert group_of_pages(n_pages + 1, page_bytes) == group + 1
        assert group_of_pages(max(2 * n_pages - 1, 1), page_bytes) == group + (n_pages > 1)
        n_pages *= 2


@pytest.mark.parametrize("page_bytes", PAGE_BYTES)
def test_labels_are_distinct_and_there_is_room_for_all(page_bytes):
    labels = size_group_labels(slot_sizes_bytes(page_bytes), page_bytes)
    assert len(set(labels)) == len(labels)
    assert LatencyTable(labels).histograms() == []


def test_labels_are_exact():
    labels = size_group_labels([64, 1344, 2048], 4096)
    assert labels[:5] == ["64 B", "1344 B", "2 KiB", "4 KiB", "8 KiB"]


def test_there_are_no_other_pages():
    with pytest.raises(ValueError, match="page_bytes=8192"):
        group_of_pages(1, 8192)
    with pytest.raises(ValueError, match="page_bytes=0"):
        page_group_count(0)


# --- recording ---


def test_what_is_recorded_is_read():
    table = LatencyTable(["a", "b", "c"], n_nodes=2)
    table.record(1, 0, 20)
    table.record(1, 1, 40, times=3)
    table.record(2, 1, 1 << 40)
    assert [(h.size_class, h.numa_node, h.n_samples, h.sum_ns) for h in table.histograms()] == [
        ("b", 0, 1, 20),
        ("b", 1, 3, 120),
        ("c", 1, 1, 1 << 40),
    ]
    first, second, third = table.histograms()
    assert first.counts[reference_bucket(20)] == 1
    assert second.counts[reference_bucket(40)] == 3
    assert third.counts[-1] == 1
    assert table.n_dropped == 0


@given(samples)
def test_a_table_counts_as_the_reference_does(samples_ns):
    table = LatencyTable(["64 B"], n_nodes=1)
    for ns in samples_ns:
        table.record(0, 0, ns)
    assert table.histograms() == [histogram_of(samples_ns)]


def test_a_clock_that_ran_backwards_adds_nothing_to_the_sum():
    table = LatencyTable(["a"])
    table.record(0, 0, -5)
    (histogram,) = table.histograms()
    assert (histogram.counts[0], histogram.sum_ns) == (1, 0)


def test_a_node_that_is_not_there_is_the_nearest():
    table = LatencyTable(["a"], n_nodes=3)
    table.record(0, 1 << 20, 100)
    table.record(0, -1, 100)
    assert [h.numa_node for h in table.histograms()] == [0, 2]


def test_a_group_that_is_not_there_is_dropped_and_counted():
    table = LatencyTable(["a"])
    table.record(1, 0, 100, times=2)
    table.record(-1, 0, 100)
    assert table.histograms() == []
    assert table.n_dropped == 3


def test_the_largest_table():
    table = LatencyTable([f"group {i}" for i in range(96)], n_nodes=64)
    for group in (0, 95):
        for node in (0, 63):
            table.record(group, node, 1000)
    assert [(h.size_class, h.numa_node) for h in table.histograms()] == [
        ("group 0", 0), ("group 0", 63), ("group 95", 0), ("group 95", 63),
    ]  # fmt: skip


def test_without_memory_every_sample_is_dropped_and_counted():
    with refusing("mmap"):
        table = LatencyTable(["a"])
    table.record(0, 0, 100, times=7)
    assert table.histograms() == []
    assert table.n_dropped == 7


def test_a_table_takes_one_mapping_and_gives_it_back():
    before = os_memory.call_counts()
    table = LatencyTable(["a"])
    table.record(0, 0, 100, times=100)
    made = os_memory.call_counts()  # with munmap, where larger pages are simulated
    assert made["mmap"] == before["mmap"] + 1
    del table
    assert os_memory.call_counts()["munmap"] == made["munmap"] + 1


@pytest.mark.parametrize(
    ("labels", "n_nodes", "complaint"),
    [
        ([], 1, "0 labels: 1 to 96"),
        (["x"] * 97, 1, "97 labels: 1 to 96"),
        (["x"], 0, "n_nodes=0: 1 to 64"),
        (["x"], 65, "n_nodes=65: 1 to 64"),
    ],
)
def test_a_table_that_is_too_small_or_too_large(labels, n_nodes, complaint):
    with pytest.raises(ValueError, match=complaint):
        LatencyTable(labels, n_nodes)


def test_a_table_is_initialised_once():
    table = LatencyTable(["a"])
    table.record(0, 0, 100)
    with pytest.raises(TypeError, match="once"):
        table.__init__(["a"])
    assert table.histograms()[0].n_samples == 1


def test_threads_lose_no_sample_and_a_reader_sees_counts_rise():
    n_threads, times = 4, 20_000
    table = LatencyTable(["a", "b"], n_nodes=2)
    start = threading.Barrier(n_threads + 1)

    def work(i: int) -> None:
        start.wait()
        for group in (0, 1):
            table.record(group, i % 2, 16, times=times, step_ns=3)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(n_threads)]
    for thread in threads:
        thread.start()
    start.wait()
    seen = [0]
    while any(thread.is_alive() for thread in threads):
        seen.append(LatencyHistogram.total(table.histograms()).n_samples)
    for thread in threads:
        thread.join()
    assert seen == sorted(seen)
    expected = histogram_of([16 + 3 * i for i in range(times)] * 2)
    found = table.histograms()
    assert len(found) == 4
    for histogram in found:
        assert histogram.counts == expected.counts
        assert histogram.sum_ns == expected.sum_ns
    assert table.n_dropped == 0


# --- the machine ---


def test_the_current_node_is_one_of_those_told_apart():
    assert 1 <= os_memory.node_count() <= 64
    assert 0 <= os_memory.current_node() < os_memory.node_count()


def test_the_node_is_0_where_the_kernel_does_not_say():
    with refusing("getcpu"):
        assert os_memory.current_node() == 0


def test_the_clock_moves_on():
    assert 0 <= LatencyTable(["a"]).time_pair_ns() < 10**9


# --- what can be told from the counts ---


@pytest.mark.parametrize("seed", range(4))
def test_percentiles_of_log_normal_samples(seed):
    random = np.random.default_rng(seed)
    drawn = random.lognormal(mean=random.uniform(5, 12), sigma=random.uniform(0.3, 1.2), size=9000)
    samples_ns = np.clip(drawn, 16, EDGES_NS[-1] - 1).astype(np.int64)
    histogram = histogram_of(samples_ns.tolist())
    in_order = np.sort(samples_ns)
    for q in [0, 1, 5, 10, 25, 50, 75, 90, 95, 99, 99.9, 100]:
        told_ns = histogram.percentile_ns(q)
        exact_ns = in_order[max(math.ceil(q * len(in_order) / 100), 1) - 1]
        assert abs(told_ns - exact_ns) < exact_ns / 8
        # Between two samples NumPy interpolates, so its result may lie a little beside either.
        assert told_ns == pytest.approx(np.quantile(samples_ns, q / 100), rel=0.125, abs=0)


@given(samples, st.integers(0, 100))
def test_a_percentile_lies_in_the_bucket_of_its_sample(samples_ns, q):
    told_ns = histogram_of(samples_ns).percentile_ns(q)
    exact_ns = sorted(samples_ns)[max(math.ceil(q * len(samples_ns) / 100), 1) - 1]
    if exact_ns >= EDGES_NS[-1]:
        assert told_ns == EDGES_NS[-1]
    else:
        assert bucket_of(int(told_ns)) == bucket_of(exact_ns)
        assert abs(told_ns - exact_ns) < max(16, exact_ns / 8)


@given(samples)
def test_percentiles_rise(samples_ns):
    histogram = histogram_of(samples_ns)
    told_ns = [histogram.percentile_ns(q) for q in range(0, 101, 5)]
    assert told_ns == sorted(told_ns)


@pytest.mark.parametrize("q", [-1, 100.1, math.nan])
def test_no_percentage(q):
    with pytest.raises(ValueError, match="0 to 100"):
        histogram_of([100]).percentile_ns(q)


def test_nothing_can_be_told_without_samples():
    nothing = histogram_of([])
    assert nothing.n_samples == 0
    assert math.isnan(nothing.percentile_ns(50))
    assert math.isnan(nothing.mean_ns)
    assert sum(nothing.factor_two_counts()) == 0


def test_the_mean_is_exact():
    assert histogram_of([17, 19, 1000]).mean_ns == 1036 / 3


@given(samples)
def test_factor_two_counts_are_those_of_the_samples(samples_ns):
    counts = histogram_of(samples_ns).factor_two_counts()
    edges_ns = np.array([0, *FACTOR_TWO_NS, 1 << 62])
    assert counts == tuple(np.histogram(samples_ns, edges_ns)[0])
    assert sum(counts) == len(samples_ns)


@given(samples, samples)
def test_a_merge_is_the_histogram_of_all_samples(one_ns, other_ns):
    assert histogram_of(one_ns).merge(histogram_of(other_ns)) == histogram_of(one_ns + other_ns)


def test_a_total_keeps_what_all_share():
    small, large = histogram_of([20], "64 B", 1), histogram_of([30, 40], "4 KiB", 1)
    both = LatencyHistogram.total([small, large])
    assert (both.size_class, both.numa_node, both.n_samples, both.sum_ns) == ("all", 1, 3, 90)
    across = small.merge(histogram_of([50], "64 B", 0))
    assert (across.size_class, across.numa_node, across.n_samples) == ("64 B", None, 2)
    nothing = LatencyHistogram.total([])
    assert (nothing.size_class, nothing.numa_node, nothing.n_samples) == ("all", None, 0)


def test_a_histogram_is_immutable_and_whole():
    histogram = histogram_of([20])
    with pytest.raises(dataclasses.FrozenInstanceError):
        histogram.sum_ns = 0
    with pytest.raises(ValueError, match="3 counts: a LatencyHistogram has 182"):
        LatencyHistogram("64 B", 0, 0, (1, 2, 3))


def test_groups_are_numbered_as_they_are_named():
    page_bytes = page_size_bytes()
    slots = slot_sizes_bytes(page_bytes)
    table = LatencyTable(size_group_labels(slots, page_bytes))
    table.record(len(slots) + group_of_pages(3, page_bytes), 0, 500)
    (histogram,) = table.histograms()
    assert histogram.size_class == f"{4 * page_bytes // 1024} KiB"
