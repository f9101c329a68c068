"""Backings: hugetlb pools, their pages' sizes, what is achieved, and what a fork does to them."""

import errno
import os
import pickle
import resource
import sys
import traceback
from pathlib import Path

import numpy as np
import pytest
from hugetlb import NR_HUGEPAGES, SIMULATED, pool, set_or_skip

from pagealloc import (
    BackingUnavailableError,
    OutOfMemoryError,
    PageAllocator,
    huge_page_size_bytes,
    page_size_bytes,
)
from pagealloc.core import os_memory

MIB = 1 << 20
PAGE_BYTES = page_size_bytes()
HUGE_BYTES = huge_page_size_bytes()
GIGANTIC = Path("/sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages")
THP_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def touch(buffer, value=1):
    np.frombuffer(buffer, np.uint8)[::4096] = value


@pytest.fixture
def hugetlb_pool():
    with pool(NR_HUGEPAGES, 64):
        yield


def test_hugetlb_from_a_pool(hugetlb_pool):
    with PageAllocator(backing="hugetlb") as allocator:
        buffer = allocator.alloc("8MiB")
        faults_before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        touch(buffer)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults_before <= 64
        (arena,) = allocator.stats().arenas
        assert arena.achieved_backing == "hugetlb"
        assert arena.committed_bytes == arena.reserved_bytes  # it left the pool whole
        with pytest.raises(ValueError, match=r"aligned to 4\.00 MiB with backing='hugetlb'"):
            allocator.alloc(1, align="4MiB")
        with PageAllocator() as auto, auto.alloc(1):
            assert auto.stats().arenas[0].achieved_backing == "hugetlb"
        with pytest.raises(BackingUnavailableError, match=r"vm\.nr_hugepages="):
            allocator.alloc("1GiB")
        allocator.check()
        buffer.close()
        assert allocator.trim() == 64 << 20  # all of it had left the pool
    with PageAllocator(budget_bytes="1GiB") as budgeted, budgeted.alloc(1):
        assert budgeted.stats().arenas[0].achieved_backing != "hugetlb"
    with PageAllocator(backing="hugetlb", budget_bytes="32MiB") as small:
        with small.alloc(1):
            assert small.stats().reserved_bytes == 32 * MIB
            with pytest.raises(OutOfMemoryError, match="budget"):
                small.alloc("32MiB")
        small.check()
    with PageAllocator(backing="hugetlb", budget_bytes=HUGE_BYTES // 2) as tiny:
        with pytest.raises(OutOfMemoryError, match="budget"):
            tiny.alloc(1)
        assert tiny.stats().reserved_bytes == 0


def start_child(check):
    """Run `check` in a forked child that says on stderr what was wrong."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            check()
            status = 0
        finally:
            if status:
                traceback.print_exc()
                sys.stderr.flush()
            os._exit(status)
    return pid


def exit_status(pid):
    """0 if all was well; negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_child_of_an_emptied_pool_meets_no_sigbus(hugetlb_pool):
    """It writes everywhere, and so does its parent meanwhile, with no free huge page left."""
    n_arenas = 64 * HUGE_BYTES // (64 * MIB)
    with PageAllocator(backing="hugetlb", on_fork="inherit") as allocator:
        buffers = [allocator.alloc("16MiB") for _ in range(4 * n_arenas)]
        for i, buffer in enumerate(buffers):
            touch(buffer, i + 1)
        ready, go = os.pipe(), os.pipe()

        def check():
            os.write(ready[1], b"x")
            os.read(go[0], 1)
            for i, buffer in enumerate(buffers):
                view = np.frombuffer(buffer, np.uint8)
                assert np.all(view[::4096] == i + 1)
                view[::4096] = 99
            assert {arena.achieved_backing for arena in allocator.stats().arenas} == {"base"}
            allocator.check()

        pid = start_child(check)
        os.read(ready[0], 1)
        for buffer in buffers:
            touch(buffer, 55)
        os.write(go[1], b"x")
        assert exit_status(pid) == 0
        assert all(np.all(np.frombuffer(b, np.uint8)[::4096] == 55) for b in buffers)
        for end in (*ready, *go):
            os.close(end)
        del buffer
        buffers.clear()


def test_a_child_that_inherits_no_hugetlb_memory_finds_zeros(hugetlb_pool):
    with PageAllocator(backing="hugetlb", on_fork="dontfork") as allocator:
        buffer = allocator.alloc("16MiB")
        touch(buffer)

        def check():
            assert not np.frombuffer(buffer, np.uint8).any()
            touch(buffer)
            allocator.check()

        assert exit_status(start_child(check)) == 0
        buffer.close()


def test_an_arena_as_long_as_the_pool_allows():
    with pool(NR_HUGEPAGES, 12), PageAllocator(backing="hugetlb") as allocator:
        buffer = allocator.alloc("1MiB")
        (arena,) = allocator.stats().arenas
        assert arena.reserved_bytes == 16 * MIB  # of the pool's 24
        with pytest.raises(BackingUnavailableError, match="nr_hugepages"):
            allocator.alloc("30MiB")
        allocator.check()
        buffer.close()


def test_hugetlb_memory_that_is_free_serves_before_the_budget_refuses(hugetlb_pool):
    """A hugetlb arena is committed as a whole, and goes back as a whole."""
    with PageAllocator(backing="hugetlb", budget_bytes="100MiB", purge_after_s=None) as allocator:
        buffers = [allocator.alloc("8MiB") for _ in range(8)]
        del buffers[1:]
        buffers.append(allocator.alloc("36MiB"))  # an arena of its own, while the budget allows
        assert len(allocator.stats().arenas) == 2
        buffers.append(allocator.alloc("40MiB"))  # free in the first one
        assert len(allocator.stats().arenas) == 2
        with pytest.raises(OutOfMemoryError, match="budget"):
            allocator.alloc("40MiB")
        allocator.check()
        buffers.clear()
        large = allocator.alloc("96MiB")  # what is empty makes room
        assert allocator.stats().committed_bytes == 96 * MIB
        allocator.check()
        large.close()


def test_gigantic_pages():
    with pool(GIGANTIC, 1), PageAllocator(backing="hugetlb", huge_page_bytes="1GiB") as allocator:
        assert allocator.arena_bytes == 1 << 30
        buffer = allocator.alloc("600MiB")
        touch(buffer)
        (arena,) = allocator.stats().arenas
        assert (arena.achieved_backing, arena.held_bytes) == ("hugetlb", 1 << 30)
        assert arena.huge_bytes in (1 << 30, None)
        with pytest.raises(BackingUnavailableError, match="hugepages-1048576kB/nr_hugepages"):
            allocator.alloc("700MiB")
        allocator.check()
        buffer.close()


def test_hugetlb_without_a_pool_names_the_command():
    if NR_HUGEPAGES.exists() and int(NR_HUGEPAGES.read_text()):
        pytest.skip("huge pages are reserved here")
    allocator = PageAllocator(backing="hugetlb")
    n_pages = max(1, 64 * MIB // HUGE_BYTES)
    with pytest.raises(
        BackingUnavailableError, match=f"sysctl vm.nr_hugepages={n_pages}'"
    ) as caught:
        allocator.alloc(1)
    assert str(caught.value).startswith("asked for 1 bytes")
    # The kernel knows no such pages where they are simulated.
    assert caught.value.errno == (errno.EINVAL if SIMULATED else errno.ENOMEM)
    assert isinstance(caught.value, MemoryError)
    assert isinstance(caught.value, OSError)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert str(copy) == str(caught.value)
    allocator.check()


def test_a_pool_that_is_emptied_by_others_is_an_error_too(hugetlb_pool):
    """The pages are there before anybody may touch them: no SIGBUS later."""
    with PageAllocator(backing="hugetlb") as allocator:
        with (
            os_memory.refusing("madvise"),  # as MADV_POPULATE_WRITE does with no page on the node
            pytest.raises(BackingUnavailableError, match="nr_hugepages"),
        ):
            allocator.alloc(1)
        assert allocator.stats().reserved_bytes == 0
        allocator.check()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"huge_page_bytes": "1GiB"}, "is for backing='hugetlb', not 'auto'"),
        ({"backing": "thp", "huge_page_bytes": "2MiB"}, "is for backing='hugetlb', not 'thp'"),
        ({"backing": "hugetlb", "huge_page_bytes": "3MiB"}, "huge pages of this machine's kernel"),
    ],
)
def test_huge_pages_that_are_not_to_be_had(settings, message):
    with pytest.raises(ValueError, match=message):
        PageAllocator(**settings)


def test_thp_by_collapse_where_no_touch_gives_it():
    """With "never", a touch backs a page, and MADV_COLLAPSE a huge one all the same."""
    if HUGE_BYTES > 2 * MIB or not THP_ENABLED.exists():
        pytest.skip("needs transparent huge pages of 2 MiB")
    before = THP_ENABLED.read_text().partition("[")[2].partition("]")[0]
    set_or_skip(THP_ENABLED, "never")
    try:
        with PageAllocator(backing="thp", purge_after_s=None) as allocator:
            try:
                buffers = [allocator.alloc(HUGE_BYTES // 2) for _ in range(4)]
            except BackingUnavailableError:
                pytest.skip("this kernel's MADV_COLLAPSE makes no huge page (before Linux 6.1)")
            assert not any(np.frombuffer(buffer, np.uint8).any() for buffer in buffers)
            stats = allocator.stats()
            assert stats.huge_bytes in (2 * HUGE_BYTES, None)
            assert stats.held_bytes == stats.committed_bytes == 2 * HUGE_BYTES
            allocator.check()
            buffers.clear()
    finally:
        THP_ENABLED.write_text(before)
