"""What changes between two snapshots."""

import numpy as np
import pytest
from snapshots import allocator_of, busy_process, histogram_of, snapshot_of

from pagealloc.observe.live import N_POINTS, History, latencies_between


def points_of(*snapshots):
    history = History()
    for snapshot in snapshots:
        history.add(snapshot)
    return history.points


def test_rates_are_per_second():
    _, point = points_of(
        snapshot_of(
            allocator_of(n_allocs=100, purged_bytes=10),
            time_s=10,
            n_minor_faults=5,
            n_major_faults=1,
        ),
        snapshot_of(
            allocator_of(n_allocs=150, purged_bytes=40),
            time_s=12,
            n_minor_faults=9,
            n_major_faults=2,
        ),
    )
    assert point.faults_per_s == 2.5
    assert point.allocs_per_s == 25
    assert point.purged_bytes_per_s == 15


def test_the_first_point_has_no_rates():
    (point,) = points_of(snapshot_of(allocator_of(n_allocs=100, live_bytes=7, held_bytes=9)))
    assert (point.faults_per_s, point.allocs_per_s, point.purged_bytes_per_s) == (None,) * 3
    assert point.latencies == {}
    assert (point.live_bytes, point.held_bytes) == (7, 9)


def test_allocators_come_and_go():
    _, point = points_of(
        snapshot_of(allocator_of("0", n_allocs=100), allocator_of("1", n_allocs=7), time_s=1),
        snapshot_of(allocator_of("1", n_allocs=8), allocator_of("2", n_allocs=30), time_s=2),
    )
    assert point.allocs_per_s == 1 + 30


def test_a_counter_that_lags_is_no_negative_rate():
    _, point = points_of(
        snapshot_of(allocator_of("0", n_allocs=100), time_s=1),
        snapshot_of(allocator_of("0", n_allocs=99), time_s=2),
    )
    assert point.allocs_per_s == 0


@pytest.mark.parametrize(
    "later",
    [
        snapshot_of(time_s=11, n_minor_faults=10, pid=2),
        snapshot_of(time_s=9, n_minor_faults=10),
        snapshot_of(time_s=11, n_minor_faults=4),
    ],
)
def test_another_process_starts_a_new_history(later):
    first = snapshot_of(time_s=10, n_minor_faults=5)
    history = History()
    history.add(first)
    history.add(later)
    assert history.latest == later
    assert len(history.points) == 1
    assert history.points[0].faults_per_s is None


def test_the_same_snapshot_again_is_no_point():
    history = History()
    assert history.add(snapshot_of()) is not None
    assert history.add(snapshot_of()) is None
    assert len(history.points) == 1


def test_a_history_forgets_what_is_old():
    history = History(n_points=3)
    for i in range(10):
        history.add(snapshot_of(time_s=i, n_minor_faults=i * i))
    assert [point.time_s for point in history.points] == [7, 8, 9]
    assert history.points[0].faults_per_s == 49 - 36
    assert history.duration_s == 3
    assert N_POINTS == 60


def test_percentiles_are_of_the_interval_alone():
    before, during = [20_000] * 1000, list(range(100, 300))
    latencies = latencies_between(
        snapshot_of(allocator_of(latencies=[histogram_of(before)]), time_s=1),
        snapshot_of(allocator_of(latencies=[histogram_of(before + during)]), time_s=2),
    )
    expected_ns = np.percentile(during, [50, 99], method="inverted_cdf")
    for name in ("4 KiB", "all"):
        assert latencies[name].n_samples == len(during)
        assert latencies[name].p50_ns == pytest.approx(expected_ns[0], rel=0.125)
        assert latencies[name].p99_ns == pytest.approx(expected_ns[1], rel=0.125)


def test_sizes_are_in_order_and_nodes_and_allocators_together():
    snapshot = snapshot_of(
        allocator_of("0", [histogram_of([20], "1 GiB"), histogram_of([20], "> 1 GiB")]),
        allocator_of(
            "1",
            [
                histogram_of([20], "64 B"),
                histogram_of([30, 40], "64 B", numa_node=1),
                histogram_of([], "128 B"),
                histogram_of([20], "4 KiB"),
                histogram_of([20], "of no size"),
            ],
        ),
    )
    found = latencies_between(None, snapshot)
    assert list(found) == ["64 B", "4 KiB", "1 GiB", "> 1 GiB", "of no size", "all"]
    assert found["64 B"].n_samples == 3
    assert found["all"].n_samples == 7


def test_a_series_has_gaps_where_nothing_was_timed():
    history = History()
    for time_s, durations_ns in ((1, []), (2, [20, 20]), (3, [20, 20]), (4, [20, 20, 1000])):
        history.add(
            snapshot_of(allocator_of(latencies=[histogram_of(durations_ns)]), time_s=time_s)
        )
    assert [each.n_samples for each in history.series("4 KiB")] == [0, 2, 0, 1]
    assert [each.p99_ns is None for each in history.series("4 KiB")] == [True, False, True, False]
    assert history.latencies()["all"].n_samples == 3
    assert [each.n_samples for each in history.series("none")] == [0] * 4


def test_an_empty_history():
    history = History()
    assert (history.points, history.latest, history.duration_s) == ((), None, 0)
    assert history.latencies() == {}


def test_of_this_process():
    with busy_process() as snapshot:
        history = History()
        point = history.add(snapshot)
        stats = snapshot.allocators[-1].stats
        assert point.live_bytes >= stats.live_bytes > 0
        assert point.kv_held_bytes >= snapshot.caches[-1].stats.held_bytes > 0
        assert history.latencies()["all"].n_samples > 0
