"""Which allocations have their time taken."""

import sys

import pytest

from pagealloc import LatencyHistogram, OutOfMemoryError, PageAllocator, page_size_bytes
from pagealloc.core.os_memory import refusing
from pagealloc.units import format_bytes

PAGE_BYTES = page_size_bytes()


def n_samples(allocator):
    return sum(histogram.n_samples for histogram in allocator.latencies())


def churn(allocator, nbytes, n):
    for _ in range(n):
        allocator.alloc(nbytes).close()


@pytest.mark.parametrize("nbytes", [100, PAGE_BYTES, 4 * PAGE_BYTES, 40 << 20])
def test_about_one_in_so_many_is_timed(nbytes):
    with PageAllocator(backing="base", time_every=16) as allocator:
        churn(allocator, nbytes, 16_000)
        # Distances are uniform with mean 16: 1,000 samples, give or take 18 (one sigma).
        assert 800 < n_samples(allocator) < 1200
        (histogram,) = allocator.latencies()
        assert isinstance(histogram, LatencyHistogram)
        assert histogram.sum_ns > 0


def test_samples_are_sorted_by_size():
    with PageAllocator(backing="base", time_every=1) as allocator:
        churn(allocator, 100, 50)
        churn(allocator, 3 * PAGE_BYTES, 50)
        labels = [histogram.size_class for histogram in allocator.latencies()]
        assert len(labels) == 2
        assert labels[0].startswith("128")
        assert labels[1].split() == format_bytes(4 * PAGE_BYTES).replace(".0", "").split()


def test_it_can_be_switched_while_threads_run_hot():
    with PageAllocator(backing="base", time_every=0) as allocator:
        churn(allocator, PAGE_BYTES, 5000)
        assert allocator.time_every == 0
        assert n_samples(allocator) == 0
        allocator.time_every = 10
        churn(allocator, PAGE_BYTES, 5000)
        n_on = n_samples(allocator)
        assert n_on > 300
        allocator.time_every = 0
        churn(allocator, PAGE_BYTES, 5000)
        assert n_samples(allocator) == n_on


def test_switched_on_after_a_first_allocation_that_was_refused():
    with PageAllocator(backing="base", time_every=0) as allocator:
        allocator.alloc(100).close()  # this thread has a cache, but no magazine for the next size
        with refusing("mmap"), pytest.raises(OutOfMemoryError):
            allocator.alloc(40 << 20)
        allocator.time_every = 10
        churn(allocator, 40 << 20, 5000)
        assert n_samples(allocator) > 300


@pytest.mark.parametrize("every", [-1, 1 << 40])
def test_impossible_distances(every):
    with pytest.raises(ValueError, match="time_every"):
        PageAllocator(time_every=every)
    with PageAllocator() as allocator, pytest.raises(ValueError, match="time_every"):
        allocator.time_every = every


def test_a_distance_is_a_whole_number():
    with pytest.raises(TypeError):
        PageAllocator(time_every=1.5)


def test_no_close_while_histograms_are_made():
    """Another thread may close the allocator then; a profiler's hook shows it without one."""
    refusals = []

    def try_to_close(frame, event, arg):
        if not refusals and event == "call" and "latency_histogram" in frame.f_code.co_filename:
            with pytest.raises(BufferError, match="using this allocator") as refusal:
                allocator.close()
            refusals.append(refusal)

    with PageAllocator(backing="base", time_every=1) as allocator:
        churn(allocator, 100, 100)
        sys.setprofile(try_to_close)
        try:
            allocator.latencies()
        finally:
            sys.setprofile(None)
        assert refusals
