"""Idle memory goes back by itself; trim() gives back all that is free, and says how much."""

import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from pagealloc import PageAllocator, huge_page_size_bytes, page_size_bytes
from pagealloc.core import os_memory

MIB = 1 << 20
PAGE_BYTES = page_size_bytes()
HUGE_BYTES = huge_page_size_bytes()
DEADLINE_S = 20
"""How long idle memory may take on a machine that is busy with other things."""

needs_thp = pytest.mark.skipif(
    HUGE_BYTES > 2 * MIB or not Path("/sys/kernel/mm/transparent_hugepage").exists(),
    reason="needs transparent huge pages of 2 MiB",
)


def fill(buffer, value=1):
    np.frombuffer(buffer, np.uint8)[::4096] = value


def alloc_filled(allocator, nbytes, n):
    buffers = [allocator.alloc(nbytes) for _ in range(n)]
    for i, buffer in enumerate(buffers):
        fill(buffer, i % 251)
    return buffers


def wait_until(condition):
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def thp_allocator(**settings):
    allocator = PageAllocator(backing="auto", **settings)
    allocator.alloc(1).close()
    if allocator.stats().arenas[0].achieved_backing != "thp":
        pytest.skip("no transparent huge pages are to be had here")
    allocator.trim()
    return allocator


def purger_threads():
    """Return the folders of this process's threads that are the purger."""
    tasks = Path("/proc/self/task").iterdir()
    return [task for task in tasks if (task / "comm").read_text().strip() == "pagealloc"]


# --- by itself ---


@pytest.mark.parametrize("backing", ["base", "auto"])
def test_idle_memory_goes_back_without_a_call(backing):
    allocator = PageAllocator(backing=backing, purge_after_s=0.1)
    process = psutil.Process()
    ready, go, freed = (threading.Barrier(3) for _ in range(3))
    asleep = threading.Event()

    def work():
        buffers = alloc_filled(allocator, 65536, 512)
        ready.wait()
        go.wait()
        buffers.clear()
        freed.wait()
        asleep.wait()

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    ready.wait()
    full_bytes = process.memory_info().rss
    go.wait()
    freed.wait()
    wait_until(lambda: process.memory_info().rss < full_bytes - 60 * MIB)
    stats = allocator.stats()
    assert stats.held_bytes == 0
    assert stats.purged_bytes >= 64 * MIB
    asleep.set()
    for thread in threads:
        thread.join()
    allocator.check()
    allocator.close()


def test_slots_go_back_too():
    with PageAllocator(backing="base", purge_after_s=0.05) as allocator:
        buffers = alloc_filled(allocator, 64, 20000)
        buffers.clear()
        wait_until(lambda: allocator.stats().held_bytes == 0)
        allocator.check()


def test_runs_without_a_class_go_back_too():
    with PageAllocator(backing="base", purge_after_s=0.05) as allocator:
        buffers = [allocator.alloc(n * PAGE_BYTES) for n in range(1, 300)]
        for buffer in buffers:
            fill(buffer)
        del buffer
        buffers.clear()
        wait_until(lambda: allocator.stats().held_bytes == 0)
        allocator.check()


def test_what_is_live_stays_as_it_is():
    with PageAllocator(backing="base", purge_after_s=0.02) as allocator:
        buffers = alloc_filled(allocator, 65536, 256)
        kept = buffers[::3]
        del buffers
        kept_bytes = len(kept) * 65536
        wait_until(lambda: allocator.stats().held_bytes == kept_bytes)
        assert [np.frombuffer(b, np.uint8)[4096] for b in kept] == [
            i % 251 for i in range(0, 256, 3)
        ]
        allocator.check()
        del kept


def test_never():
    with PageAllocator(backing="base", purge_after_s=None) as allocator:
        alloc_filled(allocator, 65536, 64)
        time.sleep(0.3)
        assert allocator.stats().held_bytes == 4 * MIB


def test_memory_in_steady_use_stays():
    """What is used again and again within the time is not taken from its user."""
    with PageAllocator(backing="base", purge_after_s=5) as allocator:
        for _ in range(20):
            alloc_filled(allocator, 65536, 64)
            time.sleep(0.01)
        stats = allocator.stats()
        assert stats.held_bytes == 4 * MIB
        assert stats.purged_bytes == 0


@needs_thp
def test_only_whole_huge_pages_in_the_background():
    with thp_allocator(purge_after_s=0.05) as allocator:
        buffers = alloc_filled(allocator, HUGE_BYTES // 4, 16)
        one_of_each = buffers[::4]
        del buffers
        time.sleep(0.4)
        assert allocator.stats().held_bytes >= 4 * HUGE_BYTES
        del one_of_each
        wait_until(lambda: allocator.stats().held_bytes == 0)
        allocator.check()


@pytest.mark.parametrize(
    ("value", "error"),
    [("soon", TypeError), (-1, ValueError), (0, ValueError), (1e9, ValueError), ([], TypeError)],
)
def test_a_wrong_purge_after_s(value, error):
    with pytest.raises(error, match="purge_after_s"):
        PageAllocator(purge_after_s=value)


# --- the thread ---


def test_one_thread_takes_no_signals():
    allocators = [PageAllocator(purge_after_s=0.2) for _ in range(3)]
    buffers = [allocator.alloc(65536) for allocator in allocators]
    (task,) = purger_threads()
    status = dict(line.split(":\t", 1) for line in (task / "status").read_text().splitlines())
    blocked = int(status["SigBlk"], 16)
    kill_and_stop = 1 << 8 | 1 << 18
    libc_own = 0b11 << 31  # glibc keeps two signals for itself
    assert blocked | kill_and_stop | libc_own == (1 << 64) - 1
    del buffers


def test_a_system_that_refuses_threads():
    program = """
import errno, time
from pagealloc import PageAllocator
from pagealloc.core import os_memory
allocator = PageAllocator(backing="base", purge_after_s=0.05)
with os_memory.refusing("pthread_create", errno.EAGAIN):
    allocator.alloc(65536).close()
    time.sleep(0.3)
    print(allocator.stats().reserved_bytes > 0)
time.sleep(1)       # the next attempt
allocator.alloc(1 << 20).close()
end = time.monotonic() + 20
while allocator.stats().reserved_bytes and time.monotonic() < end:
    time.sleep(0.02)
print(allocator.stats().reserved_bytes)
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == ["True", "0"]


def test_it_keeps_no_process_from_ending():
    program = """
from pagealloc import default_allocator
buffers = [default_allocator().alloc(65536) for _ in range(100)]
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_a_forked_child_has_its_own():
    with PageAllocator(backing="base", purge_after_s=0.05) as allocator:
        kept = alloc_filled(allocator, 65536, 4)
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                alloc_filled(allocator, 65536, 256)
                wait_until(lambda: allocator.stats().held_bytes <= 4 * 65536)
                assert len(purger_threads()) == 1
                allocator.check()
                status = 0
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        allocator.check()
        del kept


def test_closing_while_it_works():
    for _ in range(30):
        allocator = PageAllocator(backing="base", purge_after_s=0.01)
        alloc_filled(allocator, 65536, 64)
        time.sleep(0.004)
        allocator.close()


# --- trim ---


@pytest.mark.parametrize("stride", [4, 32])
@pytest.mark.parametrize("backing", ["base", "auto"])
def test_trim_gives_sparse_memory_back(backing, stride):
    with PageAllocator(backing=backing, purge_after_s=None) as allocator:
        nbytes = max(16384, PAGE_BYTES)
        buffers = alloc_filled(allocator, nbytes, 1024)
        full_bytes = allocator.stats().held_bytes
        kept = buffers[::stride]
        del buffers
        live_bytes = len(kept) * nbytes
        purged_bytes = allocator.trim()
        stats = allocator.stats()
        assert stats.held_bytes <= live_bytes * (1.05 if stride == 4 else 1.2)
        assert stats.committed_bytes == stats.held_bytes
        assert purged_bytes == full_bytes - stats.held_bytes == stats.purged_bytes
        assert all(
            np.frombuffer(buffer, np.uint8)[0] == i * stride % 251 for i, buffer in enumerate(kept)
        )
        allocator.check()
        del kept


@needs_thp
def test_what_was_split_becomes_huge_again():
    with thp_allocator(purge_after_s=None) as allocator:
        buffers = alloc_filled(allocator, HUGE_BYTES // 4, 8)
        if allocator.stats().huge_bytes is None:
            pytest.skip("the kernel does not say what is huge (before Linux 6.7)")
        assert allocator.stats().huge_bytes == 2 * HUGE_BYTES
        del buffers[1:4]
        allocator.trim()
        assert allocator.stats().huge_bytes == HUGE_BYTES
        pages = [allocator.alloc(HUGE_BYTES // 4) for _ in range(3)]  # into the holes, page by page
        for page in pages:
            fill(page)
        stats = allocator.stats()
        assert (stats.held_bytes, stats.huge_bytes) == (2 * HUGE_BYTES, HUGE_BYTES)
        del page
        pages.clear()
        buffers.pop(0)
        allocator.trim()
        buffers += alloc_filled(allocator, HUGE_BYTES // 4, 4)
        assert allocator.stats().huge_bytes == 2 * HUGE_BYTES
        allocator.check()
        buffers.clear()


@needs_thp
def test_a_split_that_the_kernel_does_not_count_is_not_counted():
    with thp_allocator(purge_after_s=None) as allocator:
        buffers = alloc_filled(allocator, HUGE_BYTES // 4, 4)
        del buffers[1:]
        with os_memory.refusing("vmstat", errno.EACCES):
            assert allocator.trim() == 0
        assert allocator.stats().purged_bytes == 0
        allocator.check()
        buffers.clear()


@needs_thp
def test_a_split_that_the_kernel_refuses():
    with thp_allocator(purge_after_s=None) as allocator:
        buffers = alloc_filled(allocator, HUGE_BYTES // 4, 4)
        del buffers[1:]
        with os_memory.refusing("madvise", errno.ENOMEM):
            assert allocator.trim() == 0
        assert allocator.stats().committed_bytes == HUGE_BYTES
        allocator.check()
        assert allocator.trim() == 3 * HUGE_BYTES // 4
        assert allocator.stats().committed_bytes == HUGE_BYTES // 4
        buffers.clear()


@needs_thp
def test_a_huge_page_that_is_nearly_full_is_left_whole():
    with thp_allocator(purge_after_s=None) as allocator:
        buffers = alloc_filled(allocator, HUGE_BYTES // 64, 64)
        del buffers[10]
        assert allocator.trim() == 0
        assert allocator.stats().committed_bytes == HUGE_BYTES
        buffers.clear()


def test_trim_counts_a_large_block_that_was_kept_warm():
    with PageAllocator(backing="base", purge_after_s=None) as allocator:
        fill(allocator.alloc("48MiB"))
        assert allocator.stats().held_bytes == 48 * MIB
        assert allocator.trim() == 48 * MIB
        assert allocator.stats().reserved_bytes == 0


def test_what_a_child_still_shares_has_not_gone_back():
    with PageAllocator(backing="base", purge_after_s=None) as allocator:
        buffer = allocator.alloc("1MiB")
        fill(buffer)
        read_end, write_end = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(write_end)
            os.read(read_end, 1)
            os._exit(0)
        buffer.close()
        purged_bytes = allocator.trim()
        os.close(write_end)
        os.waitpid(pid, 0)
        os.close(read_end)
        assert purged_bytes == 0


def test_without_a_pagemap_mincore_counts():
    with PageAllocator(backing="base", purge_after_s=None) as allocator:
        fill(allocator.alloc("1MiB"))
        with os_memory.refusing("pagemap", errno.EMFILE):
            assert allocator.trim() == MIB


# --- packing ---


def test_slots_come_from_the_fullest_slab():
    """So that the emptier ones run empty, and go back."""
    with PageAllocator(backing="base", purge_after_s=None) as allocator:
        slab_bytes = max(64 << 10, page_size_bytes())
        n_slots = slab_bytes // 1024
        blocks = [allocator.alloc(1024) for _ in range(4 * n_slots)]
        slabs = {}
        for block in blocks:
            slabs.setdefault(block.address // slab_bytes, []).append(block)
        blocks.clear()
        whole = [slab for slab in slabs.values() if len(slab) == n_slots]
        fullest, half, emptiest = whole[:3]
        kept = fullest[4:] + half[n_slots // 2 :] + emptiest[:2]
        room = {block.address for block in fullest[:4]}
        slabs.clear()
        # What is freed last would be taken first, if it were not for how full the slabs are.
        del whole, fullest, half, emptiest, block
        allocator.trim()
        taken = [allocator.alloc(1024) for _ in range(4)]
        assert {block.address for block in taken} == room
        allocator.check()
        del kept, taken
