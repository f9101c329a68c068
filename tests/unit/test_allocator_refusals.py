"""Every kernel call the allocator makes, refused in turn: a clear error, and nothing lost."""

import errno

import numpy as np
import pytest

from pagealloc import OutOfMemoryError, PageAllocator, page_size_bytes
from pagealloc.core import os_memory

PAGE_BYTES = page_size_bytes()
REQUESTS = [100, PAGE_BYTES, 100 * PAGE_BYTES, 10 << 20]  # slab, run, run, own arena


def use(allocator, nbytes):
    buffer = allocator.alloc(nbytes)
    np.frombuffer(buffer, np.uint8)[:] = 1
    return buffer


@pytest.mark.parametrize("skip", range(6))
@pytest.mark.parametrize("nbytes", REQUESTS)
@pytest.mark.parametrize("backing", ["base", "auto"])
def test_mmap_refused_at_any_step_of_growth(backing, nbytes, skip):
    allocator = PageAllocator(backing=backing, arena_bytes="4MiB")
    with os_memory.refusing("mmap", errno.ENOMEM, skip=skip):
        try:
            buffer = use(allocator, nbytes)
        except OutOfMemoryError as error:
            assert "the kernel refused" in str(error)
            assert allocator.stats().n_live == 0
            assert allocator.stats().reserved_bytes == 0
        else:
            buffer.close()
        allocator.check()
    use(allocator, nbytes).close()  # it works again
    allocator.check()
    allocator.close()


def test_munmap_refused_keeps_the_range_for_the_next_request():
    allocator = PageAllocator(backing="base", arena_bytes="4MiB")
    buffer = use(allocator, "10MiB")
    address = buffer.address
    with os_memory.refusing("munmap", errno.ENOMEM):
        buffer.close()
        allocator.check()
        assert allocator.stats().reserved_bytes == 10 << 20
        assert allocator.stats().n_live == 0
        with pytest.raises(OSError, match="refused to unmap"):
            allocator.close()
        allocator.check()
    again = allocator.alloc("1MiB")
    assert again.address == address
    again.close()
    allocator.close()


def test_trim_refused_keeps_what_it_could_not_purge_in_the_ledger():
    allocator = PageAllocator(backing="base")
    keep, hole = use(allocator, PAGE_BYTES), use(allocator, 50 * PAGE_BYTES)
    hole.close()
    with os_memory.refusing("madvise", errno.EINVAL):
        assert allocator.trim() == 0
        allocator.check()
        assert allocator.stats().committed_bytes == 51 * PAGE_BYTES
    assert allocator.trim() == 50 * PAGE_BYTES
    allocator.check()
    keep.close()


def test_purge_refused_under_budget_pressure_is_out_of_memory():
    allocator = PageAllocator(backing="base", budget_bytes=60 * PAGE_BYTES)
    keep, hole = use(allocator, PAGE_BYTES), use(allocator, 50 * PAGE_BYTES)
    hole.close()
    with os_memory.refusing("madvise", errno.EINVAL), pytest.raises(OutOfMemoryError):
        allocator.alloc(50 * PAGE_BYTES, align="1MiB")
    allocator.check()
    allocator.alloc(50 * PAGE_BYTES, align="1MiB").close()
    keep.close()


def test_mincore_refused_is_said_by_stats_and_harmless_to_trim():
    allocator = PageAllocator(backing="base")
    use(allocator, 10 * PAGE_BYTES).close()
    with os_memory.refusing("mincore", errno.ENOMEM):
        with pytest.raises(OSError, match="mincore"):
            allocator.stats()
        allocator.trim()
    allocator.check()
    assert allocator.stats().held_bytes == 0


def test_unknown_calls_cannot_be_refused():
    with pytest.raises(ValueError, match="mmap"):
        os_memory.refuse("sbrk")


def test_calls_are_counted():
    allocator = PageAllocator(backing="base")
    before = os_memory.call_counts()
    with allocator.alloc(PAGE_BYTES):
        pass
    with allocator.alloc(PAGE_BYTES):
        pass
    after = os_memory.call_counts()
    assert after["mmap"] > before["mmap"]
    grown = os_memory.call_counts()
    allocator.alloc(PAGE_BYTES).close()
    assert os_memory.call_counts() == grown  # served from what is there: no kernel call
