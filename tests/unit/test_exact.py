"""ExactClass: blocks of a caller's own size, not rounded."""

from collections import deque

import pytest

from pagealloc import ClosedError, ExactClass, PageAllocator, page_size_bytes

PAGE_BYTES = page_size_bytes()


@pytest.fixture
def allocator():
    allocator = PageAllocator(backing="base")
    yield allocator
    allocator.check()


@pytest.mark.parametrize("nbytes", [64, 65, 100, 1000, 1360, PAGE_BYTES // 2])
def test_slots_lie_side_by_side_within_pages(allocator, nbytes):
    n_slots_per_page = PAGE_BYTES // nbytes
    records = allocator.exact(nbytes)
    buffers = [records.alloc() for _ in range(4 * n_slots_per_page)]
    offsets = {buffer.address % PAGE_BYTES for buffer in buffers}
    assert offsets == {i * nbytes for i in range(n_slots_per_page)}
    # The last of them comes from a batch, of which the rest waits in the thread's magazine.
    pages = {buffer.address // PAGE_BYTES for buffer in buffers}
    assert len(pages) <= 4 + -(-64 // n_slots_per_page)
    for i, buffer in enumerate(buffers):
        memoryview(buffer)[:] = bytes([i % 256]) * nbytes
    assert all(bytes(buffer) == bytes([i % 256]) * nbytes for i, buffer in enumerate(buffers))
    slots = next(c for c in allocator.stats().classes if c.block_bytes == nbytes)
    assert slots.n_live == len(buffers)


def test_larger_blocks_take_their_pages(allocator):
    with allocator.exact(5 * PAGE_BYTES + 1).alloc() as buffer:
        assert buffer.address % PAGE_BYTES == 0
        assert allocator.stats().live_bytes == 6 * PAGE_BYTES


def test_a_size_has_one_class(allocator):
    n_classes = len(allocator.stats().classes)
    for _ in range(5):
        allocator.exact(1000)
    assert len(allocator.stats().classes) == n_classes + 1


def test_there_is_an_end_to_classes(allocator):
    sizes = [size for size in range(65, PAGE_BYTES // 2) if size % 64][:200]
    with pytest.raises(ValueError, match="as many classes"):
        deque(map(allocator.exact, sizes), maxlen=0)


@pytest.mark.parametrize("nbytes", [1, 63])
def test_small_blocks_are_refused(allocator, nbytes):
    with pytest.raises(ValueError, match="64 bytes at least"):
        allocator.exact(nbytes)


def test_only_exact_makes_one():
    with pytest.raises(TypeError, match="exact"):
        ExactClass()


def test_after_close():
    allocator = PageAllocator(backing="base")
    records = allocator.exact(100)
    allocator.close()
    with pytest.raises(ClosedError):
        records.alloc()
    with pytest.raises(ClosedError):
        allocator.exact(100)
    with pytest.raises(TypeError, match="made already"):
        allocator.__init__(backing="base")  # its classes would not be those of `records`


def test_one_that_nobody_made():
    with pytest.raises(TypeError, match="exact"):
        ExactClass.__new__(ExactClass).alloc()
