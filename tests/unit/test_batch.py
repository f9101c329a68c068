"""Batch: many blocks under one handle."""

import pickle
import threading

import numpy as np
import psutil
import pytest

from pagealloc import Batch, ClosedError, OutOfMemoryError, PageAllocator, page_size_bytes
from pagealloc.units import format_bytes

PAGE_BYTES = page_size_bytes()


@pytest.fixture
def allocator():
    allocator = PageAllocator(backing="base")
    yield allocator
    allocator.check()


@pytest.mark.parametrize("nbytes", [1, 100, PAGE_BYTES, 5 * PAGE_BYTES + 1, 3 << 20])
def test_blocks_are_apart_and_freed_together(allocator, nbytes):
    with allocator.alloc_many(nbytes, 70) as batch:
        assert len(batch) == 70
        assert allocator.stats().n_live == 70
        addresses = sorted(batch.addresses)
        gaps = np.diff(np.array(addresses, np.uint64))
        assert (gaps >= nbytes).all()
        assert all(
            address % (PAGE_BYTES if nbytes >= PAGE_BYTES else 64) == 0 for address in addresses
        )
    assert batch.closed
    assert allocator.stats().n_live == 0


def test_blocks_are_written_through_views(allocator):
    batch = allocator.alloc_many(4096, 8)
    for i in range(8):
        np.frombuffer(batch[i], np.uint8).fill(i)
    assert [batch[i][4095] for i in range(8)] == list(range(8))
    assert batch[-1][0] == 7
    view = batch[3]
    with pytest.raises(BufferError, match="1 view of this Batch"):
        batch.close()
    assert batch[3][0] == 3
    view.release()
    batch.close()
    batch.close()


def test_a_view_keeps_the_batch(allocator):
    view = allocator.alloc_many(100, 3)[1]
    view[:] = b"x" * 100
    assert allocator.stats().n_live == 3
    del view
    assert allocator.stats().n_live == 0


def test_there_is_no_block_behind_the_last(allocator):
    with allocator.alloc_many(100, 3) as batch:
        for i in (3, -4, 1 << 40):
            with pytest.raises(IndexError, match="this Batch has 3"):
                batch[i]


def test_use_after_close(allocator):
    batch = allocator.alloc_many(100, 3)
    batch.close()
    for use in (lambda: batch[0], lambda: batch.addresses, batch.__enter__):
        with pytest.raises(ClosedError, match="3 blocks of 100 B is closed"):
            use()


def test_all_or_none():
    with PageAllocator(
        backing="base", arena_bytes="2MiB", budget_bytes=32 * PAGE_BYTES
    ) as allocator:
        with pytest.raises(OutOfMemoryError) as refused:
            allocator.alloc_many(PAGE_BYTES, 33)
        asked, possible = str(refused.value).split(":", 1)
        total = format_bytes(33 * PAGE_BYTES)
        assert asked == f"asked for 33 blocks of {PAGE_BYTES} bytes ({total})"
        assert f"has {format_bytes(32 * PAGE_BYTES)} left" in possible
        assert allocator.stats().n_live == 0
        assert allocator.stats().committed_bytes == 0
        allocator.check()
        allocator.alloc_many(PAGE_BYTES, 32).close()


@pytest.mark.parametrize("n_blocks", [0, -1, 1 << 60])
def test_impossible_numbers(allocator, n_blocks):
    with pytest.raises(ValueError, match="n_blocks"):
        allocator.alloc_many(64, n_blocks)


@pytest.mark.parametrize("n_blocks", [None, 1.5, "3"])
def test_what_is_no_number(allocator, n_blocks):
    with pytest.raises(TypeError, match=f"n_blocks .* not {type(n_blocks).__name__}"):
        allocator.alloc_many(64, n_blocks)


@pytest.mark.parametrize(("nbytes", "align"), [(1 << 20, None), (1, 1 << 20)])
def test_more_than_the_machine_has(allocator, nbytes, align):
    memory = psutil.virtual_memory().total + psutil.swap_memory().total
    n_blocks = memory // (1 << 20) + 1
    with pytest.raises(OutOfMemoryError) as refused:
        allocator.alloc_many(nbytes, n_blocks, align=align)
    asked, possible = str(refused.value).split(":", 1)
    total = format_bytes(n_blocks << 20)
    assert asked == f"asked for {n_blocks} blocks that take 1.00 MiB each, {total} together"
    assert f"this machine has {format_bytes(memory)} of memory and swap" in possible
    assert allocator.stats().reserved_bytes == 0
    allocator.alloc(n_blocks << 20).close()


def test_alignment(allocator):
    with allocator.alloc_many(3 * PAGE_BYTES, 5, align="2MiB") as batch:
        assert all(address % (2 << 20) == 0 for address in batch.addresses)


def test_freed_in_another_thread(allocator):
    batch = allocator.alloc_many("64KiB", 200)
    thread = threading.Thread(target=batch.close)
    thread.start()
    thread.join()
    assert allocator.stats().n_live == 0


def test_only_alloc_many_makes_one(allocator):
    with pytest.raises(TypeError, match="alloc_many"):
        Batch()
    with allocator.alloc_many(64, 1) as batch, pytest.raises(TypeError, match="no pickle"):
        pickle.dumps(batch)
