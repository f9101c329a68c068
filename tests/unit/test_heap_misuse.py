"""Double frees and foreign pointers, by address as a C caller would pass them."""

import ctypes
import threading

import numpy as np
import pytest

from pagealloc import PageAllocator, page_size_bytes
from pagealloc.core.heap_owner import alloc_address, free_address

PAGE_BYTES = page_size_bytes()
SIZES = [1, 64, 1344, PAGE_BYTES // 2, PAGE_BYTES, 10 * PAGE_BYTES, 3 << 20]


@pytest.fixture
def allocator():
    allocator = PageAllocator(backing="base", arena_bytes="4MiB")
    yield allocator
    allocator.check()


@pytest.mark.parametrize("nbytes", SIZES)
def test_a_double_free_is_caught(allocator, nbytes):
    keep = alloc_address(allocator, nbytes)
    address = alloc_address(allocator, nbytes)
    free_address(allocator, address)
    for _ in range(3):
        with pytest.raises(ValueError, match=r"double free|foreign pointer"):
            free_address(allocator, address)
        allocator.check()
    assert allocator.stats().n_live == 1
    assert alloc_address(allocator, nbytes) != keep
    free_address(allocator, keep)


@pytest.mark.parametrize("nbytes", SIZES)
def test_a_pointer_inside_is_caught(allocator, nbytes):
    address = alloc_address(allocator, nbytes)
    for offset in {1, 8, 64, nbytes // 2, nbytes - 1, PAGE_BYTES, nbytes - PAGE_BYTES} - {0}:
        if 0 < offset < nbytes:
            with pytest.raises(ValueError, match="foreign pointer"):
                free_address(allocator, address + offset)
    allocator.check()
    free_address(allocator, address)


def test_memory_of_others_is_caught(allocator):
    other = PageAllocator(backing="base")
    buffer = other.alloc(PAGE_BYTES)
    stack = ctypes.create_string_buffer(64)
    array = np.zeros(1 << 20)
    for address in (0, 1, 64, 1 << 46, (1 << 64) - 64, buffer.address, array.ctypes.data,
                    ctypes.addressof(stack)):  # fmt: skip
        with pytest.raises(ValueError, match="foreign pointer"):
            free_address(allocator, address)
    memoryview(buffer)[0] = 1
    assert other.stats().n_live == 1


def test_the_unused_end_of_a_page_is_no_slot(allocator):
    """Slots of 1,344 bytes leave 64 at the end of a 4 KiB page."""
    address = alloc_address(allocator, 1344)
    page = address // PAGE_BYTES * PAGE_BYTES
    slot_bytes = next(c.block_bytes for c in allocator.stats().classes if c.n_live)
    with pytest.raises(ValueError, match=r"foreign pointer|double free"):
        free_address(allocator, page + PAGE_BYTES // slot_bytes * slot_bytes)
    free_address(allocator, address)


@pytest.mark.parametrize("nbytes", [100, PAGE_BYTES, 5 * PAGE_BYTES])
def test_what_many_threads_free_is_freed_once(allocator, nbytes):
    barrier = threading.Barrier(4)
    n_conflicts_before = allocator.stats().n_conflicts
    outcomes = []

    def free(address):
        barrier.wait()
        try:
            free_address(allocator, address)
            outcomes.append("freed")
        except ValueError:
            outcomes.append("caught")

    for _ in range(50):
        address = alloc_address(allocator, nbytes)
        threads = [threading.Thread(target=free, args=(address,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    # In one instant more than one may be told so; what it freed is found to be free already.
    allocator.trim()
    n_freed = outcomes.count("freed")
    assert n_freed + outcomes.count("caught") == 200
    assert n_freed - 50 == allocator.stats().n_conflicts - n_conflicts_before
    assert allocator.stats().n_live == 0
    allocator.check()
