"""PageAllocator: what a caller asks, gets, and is told."""

import errno
import gc
import itertools
import mmap
import os
import queue
import random
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from stress import running

import pagealloc
from pagealloc import (
    BackingUnavailableError,
    ClosedError,
    OutOfMemoryError,
    PageAllocator,
    huge_page_size_bytes,
    page_size_bytes,
)
from pagealloc.core import os_memory
from pagealloc.core.os_memory import call_counts, refusing

PAGE_BYTES = page_size_bytes()


@pytest.fixture
def allocator():
    allocator = PageAllocator(backing="base")
    yield allocator
    allocator.check()


def fill_up(allocator, nbytes):
    """As many buffers as the budget allows."""
    buffers = []
    while True:
        try:
            buffers.append(allocator.alloc(nbytes))
        except OutOfMemoryError:
            return buffers


def touch(buffer):
    np.frombuffer(buffer, np.uint8)[:: mmap.PAGESIZE] = 1  # the kernel's page, also in simulations


# --- addresses and sizes ---


@pytest.mark.parametrize("nbytes", [1, 64, 100, PAGE_BYTES // 2, PAGE_BYTES - 1])
def test_below_a_page_slots_are_aligned_and_stay_in_one_page(allocator, nbytes):
    buffers = [allocator.alloc(nbytes) for _ in range(300)]
    for buffer in buffers:
        assert buffer.address % 64 == 0
        assert buffer.address // PAGE_BYTES == (buffer.address + nbytes - 1) // PAGE_BYTES
    spans = sorted((b.address, b.address + nbytes) for b in buffers)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


@pytest.mark.parametrize("n_pages", [1, 3, 90, 511, 513, 5000, 20000])
def test_page_multiples_cost_exactly_their_pages(n_pages):
    allocator = PageAllocator(backing="base")
    with allocator.alloc(n_pages * PAGE_BYTES) as buffer:
        assert buffer.address % PAGE_BYTES == 0
        assert allocator.stats().committed_bytes == n_pages * PAGE_BYTES
        touch(buffer)
        assert allocator.stats().held_bytes == n_pages * PAGE_BYTES


@pytest.mark.parametrize("align_log2", [*range(24), 26, 30])
@pytest.mark.parametrize("nbytes", [1, 100, PAGE_BYTES, 10 * PAGE_BYTES + 1])
def test_every_alignment_is_kept(allocator, nbytes, align_log2):
    align_bytes = 1 << align_log2
    with (
        allocator.alloc(nbytes, align=align_bytes) as a,
        allocator.alloc(nbytes, align=align_bytes) as b,
    ):
        touch(a), touch(b)
        assert a.address % align_bytes == 0
        assert b.address % align_bytes == 0
        assert abs(a.address - b.address) >= nbytes


def test_many_random_sizes_are_aligned_and_held_within_two_percent():
    """10,000 sizes from 1 B to 4 MiB, all live and touched (fewer where memory is short)."""
    available_bytes = psutil.virtual_memory().available
    n_sizes = min(10_000, available_bytes // 2 // (300 << 10))  # their mean
    if n_sizes < 1000:
        pytest.skip(f"{available_bytes >> 20} MiB available: too few for 1,000 sizes")
    rng = random.Random(20261122)
    sizes = [int(2 ** rng.uniform(0, 22)) for _ in range(n_sizes)]
    with PageAllocator(backing="base") as allocator:
        buffers = [allocator.alloc(nbytes) for nbytes in sizes]
        for buffer in buffers:
            if buffer.nbytes < PAGE_BYTES:
                assert buffer.address % 64 == 0
                assert buffer.address % PAGE_BYTES + buffer.nbytes <= PAGE_BYTES
            else:
                assert buffer.address % PAGE_BYTES == 0
            touch(buffer)
        spans = sorted((b.address, b.address + b.nbytes) for b in buffers)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
        assert allocator.stats().held_bytes <= 1.02 * sum(sizes)
        allocator.check()
        rng.shuffle(buffers)
        for buffer in buffers[: n_sizes // 2]:
            buffer.close()
        allocator.check()
        del buffer, buffers
        allocator.trim()
        assert allocator.stats().held_bytes == 0


def test_held_bytes_are_what_the_kernel_says(allocator):
    """mincore's count against Rss of the arenas' mappings."""
    buffers = [allocator.alloc(n * PAGE_BYTES) for n in (1, 7, 300)]
    touch(buffers[1])
    touch(buffers[2])
    stats = allocator.stats()
    arenas = [(a.address, a.address + a.reserved_bytes) for a in stats.arenas]
    rss_bytes = 0
    for entry in psutil.Process().memory_maps(grouped=False):
        start = int(entry.addr.split("-")[0], 16)
        if any(low <= start < high for low, high in arenas):
            rss_bytes += entry.rss
    assert stats.held_bytes == rss_bytes == 307 * PAGE_BYTES


def test_an_address_freed_is_used_again(allocator):
    first = allocator.alloc("1MiB")
    address = first.address
    first.close()
    assert allocator.alloc("1MiB").address == address


def test_best_fit_takes_the_smallest_hole_that_is_long_enough(allocator):
    sizes = [20, 1, 10, 1, 15, 1]  # pages; the single ones keep the holes apart
    buffers = [allocator.alloc(n * PAGE_BYTES) for n in sizes]
    hole = buffers[2].address
    for i in (0, 2, 4):
        buffers[i].close()
    allocator.trim()  # out of the magazines, into the holes
    assert allocator.alloc(9 * PAGE_BYTES).address == hole


def test_leaving_with_an_exception_lets_it_through():
    def fail_with_live_views():
        with PageAllocator(backing="base") as allocator, allocator.alloc(10) as buffer:
            views.append(memoryview(buffer))
            raise KeyError("what the user must see")

    views = []
    with pytest.raises(KeyError, match="what the user must see"):
        fail_with_live_views()


def test_a_subclass_may_have_settings_of_its_own():
    class Named(PageAllocator):
        def __init__(self, name):
            super().__init__(backing="base")
            self.name = name

    with Named("scratch") as allocator, allocator.alloc(10):
        assert allocator.name == "scratch"
    with pytest.raises(TypeError, match="made already"):
        PageAllocator.__init__(allocator := PageAllocator())
    allocator.close()


# --- arrays ---


def test_arrays_keep_their_buffer_and_zeros_are_zero(allocator):
    dirty = allocator.empty((1000, 1000), np.float32)
    dirty.fill(3)
    address = dirty.ctypes.data
    view = dirty[10:20].T
    del dirty
    assert allocator.stats().n_live == 1
    assert view.sum() == 3 * 10 * 1000
    del view
    assert allocator.stats().n_live == 0
    zeros = allocator.zeros((1000, 1000), np.float32)
    assert zeros.ctypes.data == address  # the same, used memory: it had to be cleared
    assert not zeros.any()
    assert zeros.ctypes.data % PAGE_BYTES == 0


def test_the_buffer_under_an_array_cannot_be_closed(allocator):
    array = allocator.zeros(10)
    base = array
    while not isinstance(base, pagealloc.Buffer):
        base = base.obj if isinstance(base, memoryview) else base.base
    with pytest.raises(BufferError):
        base.close()


@pytest.mark.parametrize("shape", [0, (3, 0), ()])
def test_small_and_empty_shapes(allocator, shape):
    assert np.array_equal(allocator.zeros(shape, "int8"), np.zeros(shape, "int8"))


def test_structured_and_16_bit_dtypes(allocator):
    assert allocator.zeros(5, [("a", "f2"), ("b", "u1")]).dtype.itemsize == 3
    assert allocator.empty((2, 3), np.float16).shape == (2, 3)
    assert allocator.empty((2,), np.dtype(("f4", (3,)))).shape == (2, 3)


@pytest.mark.parametrize(
    ("shape", "dtype", "error"),
    [
        (-1, "f4", ValueError),
        ((2, -3), "f4", ValueError),
        (1.5, "f4", TypeError),
        ("ab", "f4", TypeError),
        ((1 << 62, 1 << 62), "f8", ValueError),
        (None, "f4", TypeError),
        (3, object, TypeError),
        (3, "no such dtype", TypeError),
    ],
)
def test_bad_shapes_and_dtypes(allocator, shape, dtype, error):
    with pytest.raises(error):
        allocator.empty(shape, dtype)
    assert allocator.stats().n_live == 0


# --- bad input ---


@pytest.mark.parametrize("bad", [0, -1, 1 << 48, 1 << 64, 1 << 200, "", "1 parsec"])
def test_impossible_sizes_are_value_errors(allocator, bad):
    with pytest.raises(ValueError, match="nbytes="):
        allocator.alloc(bad)


@pytest.mark.parametrize("bad", [0, -64, 3, 96, 1 << 31, "12KiB"])
def test_impossible_alignments_are_value_errors(allocator, bad):
    with pytest.raises(ValueError, match="align="):
        allocator.alloc(100, align=bad)


def test_more_than_the_address_space_has_left_is_out_of_memory(allocator):
    with pytest.raises(OutOfMemoryError, match=r"128 TiB.*the kernel refused"):
        allocator.alloc("128TiB")
    with allocator.alloc(1):
        pass


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"backing": "gold"}, ValueError),
        ({"backing": None}, ValueError),
        ({"backing": ["base"]}, ValueError),
        ({"arena_bytes": 1}, ValueError),
        ({"arena_bytes": 1.5}, TypeError),
        ({"budget_bytes": 0}, ValueError),
        ({"budget_bytes": "much"}, ValueError),
        ({"no_such_option": 1}, TypeError),
    ],
)
def test_bad_settings(arguments, error):
    with pytest.raises(error):
        PageAllocator(**arguments)


@pytest.mark.parametrize("use", ["alloc", "empty", "zeros"])
def test_use_after_close(use):
    allocator = PageAllocator()
    allocator.close()
    allocator.close()
    with pytest.raises(ClosedError):
        getattr(allocator, use)(10)
    for name in ("trim", "stats", "check", "__enter__"):
        with pytest.raises(ClosedError):
            getattr(allocator, name)()
    assert allocator.closed
    assert "closed" in repr(allocator)


def test_close_with_live_buffers_is_refused_and_changes_nothing():
    allocator = PageAllocator()
    array = allocator.zeros(100)
    with pytest.raises(BufferError, match="1 live buffer "):
        allocator.close()
    array[0] = 1
    del array
    allocator.close()


# --- the budget ---


def test_the_budget_is_hard_exact_and_says_what_would_help():
    with PageAllocator(budget_bytes=16 * PAGE_BYTES, backing="base") as allocator:
        buffers = [allocator.alloc(PAGE_BYTES) for _ in range(16)]
        with pytest.raises(OutOfMemoryError, match=r"0 B left.*16 live buffers.*close Buffers"):
            allocator.alloc(1)
        with pytest.raises(MemoryError):
            allocator.alloc(17 * PAGE_BYTES)
        allocator.check()
        assert allocator.stats().n_failed == 2
        del buffers[:8]
        buffers.append(allocator.alloc(8 * PAGE_BYTES))  # the same pages, merged
        assert allocator.stats().committed_bytes == 16 * PAGE_BYTES
        buffers.clear()


def test_cached_memory_is_purged_before_the_budget_refuses():
    with PageAllocator(budget_bytes=100 * PAGE_BYTES, backing="base") as allocator:
        keep = [allocator.alloc(PAGE_BYTES) for _ in range(50)]
        hole = allocator.alloc(50 * PAGE_BYTES)
        touch(hole)
        hole.close()
        small = [allocator.alloc(100) for _ in range(10)]
        small.clear()  # leaves an empty slab behind
        with allocator.alloc(50 * PAGE_BYTES, align="1MiB") as moved:
            touch(moved)
            assert allocator.stats().held_bytes <= 100 * PAGE_BYTES
        keep.clear()


@pytest.mark.parametrize("budget_pages", [1, 4, 15, 17])
def test_small_requests_fill_a_tiny_budget_to_the_last_page(budget_pages):
    """A slab of sixteen pages has no room: single pages serve them."""
    with PageAllocator(budget_bytes=budget_pages * PAGE_BYTES, backing="base") as allocator:
        buffers = fill_up(allocator, 1)
        assert len(buffers) >= budget_pages
        assert allocator.stats().committed_bytes == budget_pages * PAGE_BYTES
        allocator.check()
        buffers.clear()


def test_a_refusal_leaves_no_arena_behind():
    with PageAllocator(budget_bytes=10 * PAGE_BYTES, backing="base") as allocator:
        with pytest.raises(OutOfMemoryError):
            allocator.alloc(11 * PAGE_BYTES)
        assert allocator.stats().reserved_bytes == 0


def test_under_thp_a_hole_in_a_committed_huge_page_serves_when_the_budget_is_full():
    allocator = PageAllocator(backing="thp", arena_bytes="8MiB", budget_bytes="6MiB")
    try:
        buffers = [allocator.alloc("1MiB") for _ in range(6)]
    except BackingUnavailableError as error:
        pytest.skip(f"no THP here: {error}")
    del buffers[1]  # a hole of 1 MiB; the free 2 MiB at the end are a longer run
    with pytest.raises(OutOfMemoryError):
        allocator.alloc("2MiB")
    buffers.append(allocator.alloc("1MiB"))
    del buffers[0]
    buffers.append(allocator.alloc("512KiB"))
    allocator.check()
    buffers.clear()
    allocator.close()


def test_huge_pages_are_split_before_the_budget_refuses():
    """What trim() could free is not refused."""
    allocator = PageAllocator(backing="thp", arena_bytes="32MiB", budget_bytes="16MiB")
    try:
        buffers = [allocator.alloc("512KiB") for _ in range(32)]
    except BackingUnavailableError as error:
        pytest.skip(f"no THP here: {error}")
    for buffer in buffers:
        np.frombuffer(buffer, np.uint8)[:] = 7
    kept = buffers[::4]  # one in each huge page
    del buffer, buffers
    with allocator.alloc("10MiB") as large:
        touch(large)
        allocator.check()
        assert allocator.stats().committed_bytes <= 16 << 20
        assert all(np.all(np.frombuffer(buffer, np.uint8) == 7) for buffer in kept)
        with pytest.raises(OutOfMemoryError):
            allocator.alloc("3MiB")
    kept.clear()
    allocator.close()


def test_where_a_full_arena_is_refused_a_shorter_one_serves():
    with PageAllocator(backing="base") as allocator:
        with refusing("mmap", times=2):
            buffer = allocator.alloc("1MiB")
        (arena,) = allocator.stats().arenas
        assert 1 << 20 <= arena.reserved_bytes < allocator.arena_bytes
        allocator.check()
        buffer.close()


def test_an_aligned_request_passes_over_a_hole_without_an_aligned_start(allocator):
    page, mib = PAGE_BYTES, 1 << 20
    sizes = [page, mib, page, 3 * mib, page, 30 * mib, 29 * mib]  # fills the arena but for < 1 MiB
    buffers = [allocator.alloc(nbytes) for nbytes in sizes]
    assert len(allocator.stats().arenas) == 1
    tight, roomy = buffers[1].address, buffers[3].address
    buffers[3].close()
    buffers[1].close()
    allocator.trim()  # out of the magazines, into the holes
    aligned = allocator.alloc(mib, align=mib)
    assert aligned.address % mib == 0
    assert tight % mib != 0
    assert roomy <= aligned.address < roomy + 3 * mib
    assert len(allocator.stats().arenas) == 1
    assert allocator.alloc(mib).address == tight


def test_a_budget_below_an_arena_takes_base_pages_so_that_it_is_exact():
    with PageAllocator(budget_bytes="1MiB") as allocator:
        allocator.alloc(PAGE_BYTES).close()
        assert [a.achieved_backing for a in allocator.stats().arenas] == ["base"]


def test_under_pressure_only_what_is_needed_is_purged():
    with PageAllocator(budget_bytes=1000 * PAGE_BYTES, backing="base") as allocator:
        buffers = [allocator.alloc(n * PAGE_BYTES) for _ in range(10) for n in (90, 1)]
        for buffer in buffers:
            touch(buffer)
        held_bytes = allocator.stats().held_bytes
        del buffer, buffers[0::2]  # ten holes of 90 pages, kept apart by single ones
        with allocator.alloc(200 * PAGE_BYTES):
            purged_bytes = held_bytes - allocator.stats().held_bytes
            assert 0 < purged_bytes <= held_bytes // 4
        buffers.clear()


# --- trim ---


def test_trim_counts_nothing_that_stayed():
    with PageAllocator(backing="base") as allocator:
        buffer = allocator.alloc(10 * PAGE_BYTES)
        touch(buffer)
        buffer.close()
        with os_memory.refusing("madvise"), os_memory.refusing("munmap"):
            assert allocator.trim() == 0
        with os_memory.refusing("madvise"), os_memory.refusing("mincore"):
            assert allocator.trim() == 0  # it went back with its arena, uncounted
        assert allocator.stats().reserved_bytes == 0


def test_trim_returns_what_went_back():
    with PageAllocator(backing="base") as allocator:
        keep = allocator.alloc(PAGE_BYTES)
        touch(keep)
        hole = allocator.alloc(100 * PAGE_BYTES)
        np.frombuffer(hole, np.uint8)[: 60 * PAGE_BYTES] = 1
        hole.close()
        assert allocator.stats().held_bytes == 61 * PAGE_BYTES
        assert allocator.trim() == 60 * PAGE_BYTES
        assert allocator.trim() == 0
        assert allocator.stats().held_bytes == PAGE_BYTES
        assert memoryview(keep)[0] == 1
        keep.close()
        assert allocator.trim() == PAGE_BYTES
        assert allocator.stats().reserved_bytes == 0


def test_large_requests_are_kept_warm_for_two_collections():
    with PageAllocator(backing="base", arena_bytes="4MiB") as allocator:
        with allocator.alloc("100MiB") as large:
            touch(large)
            (arena,) = allocator.stats().arenas
            assert arena.dedicated
            assert arena.held_bytes == 100 << 20
            address = large.address
        assert allocator.stats().idle_bytes == 100 << 20
        n_mapped = call_counts()["mmap"]
        with allocator.alloc("100MiB") as large:
            assert large.address == address
            assert not large.fresh
        assert call_counts()["mmap"] == n_mapped
        for _ in range(4):
            allocator.collect()
        assert allocator.stats().reserved_bytes == 0
        allocator.check()


def test_what_lies_idle_serves_other_sizes_before_the_kernel_is_asked():
    with PageAllocator(backing="base", arena_bytes="4MiB") as allocator:
        for block in [allocator.alloc("64KiB") for _ in range(64)]:  # all of an arena
            block.close()
        assert allocator.stats().idle_bytes == 4 << 20
        whole = allocator.alloc("2MiB")
        assert allocator.stats().reserved_bytes == 4 << 20
        whole.close()


def test_hot_allocations_make_no_call_and_no_fault(allocator):
    sizes = [100, PAGE_BYTES, 64 << 10, 2 << 20, 40 << 20]
    for nbytes in sizes:
        allocator.alloc(nbytes).close()
    calls = call_counts()
    for nbytes in sizes:
        for _ in range(100):
            allocator.alloc(nbytes).close()
    assert call_counts() == calls


def test_an_idle_threads_magazines_are_taken_after_two_collections():
    allocator = PageAllocator(backing="base")
    start, end = threading.Event(), threading.Event()

    def hoard():
        for block in [allocator.alloc("64KiB") for _ in range(40)]:
            block.close()
        start.set()
        end.wait()

    with running(end, threading.Thread(target=hoard)):
        start.wait()
        allocator.collect()
        allocator.collect()
        assert allocator.stats().idle_bytes == 40 * (64 << 10)
        allocator.collect()
        assert allocator.stats().idle_bytes == 0
    allocator.check()
    allocator.close()


def test_blocks_freed_by_another_thread_come_back():
    with PageAllocator(backing="base", arena_bytes="64MiB") as allocator:
        for _ in range(20):
            blocks = [allocator.alloc("1MiB") for _ in range(50)]
            thread = threading.Thread(target=blocks.clear)
            thread.start()
            thread.join()
            # Python's thread has ended; the system's delivers what it freed, a moment later.
            while Path(f"/proc/self/task/{thread.native_id}").exists():
                time.sleep(0)
            allocator.check()
            assert allocator.stats().n_live == 0
        assert allocator.stats().reserved_bytes == 64 << 20


def test_a_living_thread_does_not_keep_large_blocks_that_it_freed():
    """64 MiB at most lie in its outbox, whether that is full or not."""
    work, done = queue.Queue(), queue.Queue()

    def free_all():
        while (blocks := work.get()) is not None:
            blocks.clear()
            done.put(None)

    thread = threading.Thread(target=free_all, daemon=True)
    thread.start()
    with PageAllocator(backing="base", arena_bytes="1GiB") as allocator:
        for _ in range(10):
            work.put([allocator.alloc("16MiB") for _ in range(16)])
            done.get()
        stats = allocator.stats()
        assert stats.n_live == 0
        assert stats.committed_bytes <= (16 + 4) * (16 << 20)
        work.put(None)
        thread.join()


def test_stats_are_exact_while_threads_end():
    """A block on its way from a thread that ends to the central list is counted once."""
    with PageAllocator(backing="base") as allocator:
        for _ in range(300):
            thread = threading.Thread(target=lambda: allocator.alloc_many(4096, 40).close())
            thread.start()
            thread.join()
            stats = allocator.stats()
            assert (stats.n_live, stats.live_bytes) == (0, 0)
            assert stats.n_allocs == stats.n_frees


def test_only_the_oldest_generation_collects():
    """With no purger, which collects by the clock, and no collection by Python's own count."""
    gc.disable()
    try:
        with PageAllocator(backing="base", purge_after_s=None) as allocator:
            allocator.alloc(1).close()
            n_before = allocator.stats().n_collections
            gc.collect(0)
            gc.collect(1)
            assert allocator.stats().n_collections == n_before
            gc.collect(2)
            assert allocator.stats().n_collections == n_before + 1
    finally:
        gc.enable()


@pytest.mark.parametrize("refused", [False, True])
def test_more_sizes_than_classes(refused):
    with PageAllocator(backing="base", arena_bytes="64MiB") as allocator:
        with refusing("membarrier", times=-1 if refused else 0):
            for n_pages in range(1, 1200):
                allocator.alloc(n_pages * PAGE_BYTES).close()
                if n_pages % 300 == 0:
                    allocator.collect()
        allocator.check()
        assert allocator.stats().n_live == 0


def test_more_threads_than_tags():
    with PageAllocator(backing="base") as allocator:
        ready, done = threading.Barrier(301), threading.Barrier(301)

        def live():
            block = allocator.alloc("8KiB")
            ready.wait()
            done.wait()
            block.close()

        threads = [threading.Thread(target=live, daemon=True) for _ in range(300)]
        for thread in threads:
            thread.start()
        ready.wait()
        assert allocator.stats().n_live == 300
        done.wait()
        for thread in threads:
            thread.join()
        allocator.check()
        assert allocator.stats().n_live == 0


# --- the ladder ---


def test_auto_says_what_it_achieved():
    with PageAllocator() as allocator, allocator.alloc("8MiB") as buffer:
        touch(buffer)
        (arena,) = allocator.stats().arenas
        assert arena.requested_backing == "auto"
        assert arena.achieved_backing in ("hugetlb", "thp", "base")
        assert arena.held_bytes >= 8 << 20


def test_thp_is_seen_in_the_fault_count():
    allocator = PageAllocator(backing="thp")
    try:
        buffer = allocator.alloc("32MiB")
    except BackingUnavailableError as error:
        pytest.skip(f"no THP here: {error}")
    faults_before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    touch(buffer)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults_before
    assert faults < (32 << 20) // PAGE_BYTES // 10


def test_base_takes_one_fault_a_page(allocator):
    buffer = allocator.alloc(1000 * PAGE_BYTES)
    faults_before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    touch(buffer)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults_before
    assert faults >= 1000


@pytest.mark.parametrize("backing", ["auto", "base"])
def test_the_ladder_is_walked_down_when_huge_pages_are_refused(backing):
    """Refusing the hugetlb mapping, then the advice, ends on base pages under "auto"."""
    with PageAllocator(backing=backing) as allocator:
        n_mmaps = 1 if backing == "auto" else 0
        with (
            os_memory.refusing("mmap", errno.ENOMEM, times=n_mmaps),
            os_memory.refusing("madvise", errno.EINVAL),
        ):
            buffer = allocator.alloc(PAGE_BYTES)
        assert allocator.stats().arenas[0].achieved_backing == "base"
        allocator.check()
        buffer.close()


def test_thp_refused_by_name_is_an_error_with_the_command():
    allocator = PageAllocator(backing="thp")
    with (
        os_memory.refusing("madvise", errno.EINVAL),
        pytest.raises(BackingUnavailableError, match="transparent_hugepage/enabled"),
    ):
        allocator.alloc(1)
    allocator.check()
    assert allocator.stats().reserved_bytes == 0


def test_huge_page_size_is_a_multiple_of_the_page():
    assert huge_page_size_bytes() % PAGE_BYTES == 0


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("PAGEALLOC_PAGE_BYTES", "2048", "must be a power of two between this machine's page"),
        ("PAGEALLOC_PAGE_BYTES", "12288", "must be a power of two between this machine's page"),
        ("PAGEALLOC_HUGE_PAGE_BYTES", "1MiB", "must be a power of two, and at least"),
        ("PAGEALLOC_HUGE_PAGE_BYTES", "6MiB", "must be a power of two, and at least"),
    ],
)
def test_sizes_that_cannot_be_simulated(name, value, message):
    run = subprocess.run(
        [sys.executable, "-P", "-c", "import pagealloc"],
        env=os.environ | {name: value},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    assert f"ValueError: {name}=" in run.stderr
    assert message in run.stderr


CONTIGUOUS_BYTES = {4 << 10: 64 << 10, 16 << 10: 2 << 20, 64 << 10: 2 << 20}
"""What arm64 can map by one TLB entry below a huge page, by the size of a page."""


@pytest.mark.parametrize("backing", ["base", "auto"])
@pytest.mark.parametrize("nbytes", [1, 3 << 20, 50 << 20])
def test_arenas_start_and_end_where_entries_of_a_translation_table_do(backing, nbytes):
    with PageAllocator(backing=backing) as allocator, allocator.alloc(nbytes) as buffer:
        (arena,) = allocator.stats().arenas
        unit_bytes = max(2 << 20, CONTIGUOUS_BYTES[PAGE_BYTES])
        if arena.achieved_backing != "base":
            unit_bytes = huge_page_size_bytes()
        assert arena.address % unit_bytes == arena.reserved_bytes % unit_bytes == 0
        assert buffer.address % PAGE_BYTES == arena.committed_bytes % PAGE_BYTES == 0


def test_a_new_thp_arena_holds_nothing():
    """The touch that proves the backing is given back."""
    with PageAllocator(backing="thp") as allocator:
        try:
            buffer = allocator.alloc(PAGE_BYTES)
        except BackingUnavailableError as error:
            pytest.skip(f"no THP here: {error}")
        assert buffer.fresh
        assert allocator.stats().held_bytes == 0
        buffer.close()


def test_base_pages_are_base_pages_wherever_thp_is_always(allocator):
    buffer = allocator.alloc(PAGE_BYTES)
    lines = Path("/proc/self/smaps").read_text(encoding="ascii").splitlines()
    starts = [i for i, line in enumerate(lines) if "-" in line.split(" ")[0]]
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        low, high = (int(part, 16) for part in lines[start].split(" ")[0].split("-"))
        if low <= buffer.address < high:
            flags = next(line for line in lines[start:end] if line.startswith("VmFlags"))
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("a kernel without THP")
    assert " nh" in flags


# --- the shared allocator ---


def test_the_default_allocator_is_one(monkeypatch):
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(pagealloc.default_allocator()))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(map(id, found))) == 1
