"""Buffer.resize: what stays is the content; where it can, no byte is copied."""

import ctypes
import mmap
import os

import numpy as np
import pytest

from pagealloc import (
    BackingUnavailableError,
    ClosedError,
    OutOfMemoryError,
    PageAllocator,
    huge_page_size_bytes,
    page_size_bytes,
)
from pagealloc.core import os_memory
from pagealloc.core.buffer import Buffer
from pagealloc.core.os_memory import call_counts

PAGE_BYTES = page_size_bytes()
MIB = 1 << 20


def pattern(nbytes, seed=0):
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)


def fill(buffer, seed=0):
    np.frombuffer(buffer, np.uint8)[:] = pattern(buffer.nbytes, seed)


def holds(buffer, nbytes, seed=0):
    n = min(nbytes, buffer.nbytes)
    return np.array_equal(np.frombuffer(buffer, np.uint8)[:n], pattern(nbytes, seed)[:n])


@pytest.fixture(params=["base", "auto"])
def allocator(request):
    with PageAllocator(backing=request.param, purge_after_s=None) as made:
        yield made
        made.check()


SIZES = [1, 64, 100, 2000, PAGE_BYTES, 3 * PAGE_BYTES, 40 * PAGE_BYTES, 5 * MIB, 40 * MIB, 70 * MIB]


@pytest.mark.parametrize("after", SIZES)
@pytest.mark.parametrize("before", SIZES)
def test_from_any_length_to_any(allocator, before, after):
    with allocator.alloc(before) as buffer:
        fill(buffer)
        buffer.resize(after)
        assert buffer.nbytes == len(buffer) == after
        assert holds(buffer, before)
        assert not buffer.fresh
        fill(buffer, 1)
        allocator.check()
        buffer.resize(before)
        assert holds(buffer, after, 1)
        assert allocator.stats().n_live == 1
    allocator.trim()
    assert allocator.stats().reserved_bytes == 0


def test_a_run_grows_into_the_free_pages_behind_it_and_gives_them_back():
    with PageAllocator(backing="base", purge_after_s=None) as allocator:
        buffer = allocator.alloc(8 * PAGE_BYTES)
        address = buffer.address
        fill(buffer)
        for n_pages in (9, 64, 100, 17, 1):
            buffer.resize(n_pages * PAGE_BYTES)
            assert buffer.address == address
            allocator.check()
        assert holds(buffer, 8 * PAGE_BYTES)
        assert allocator.stats().active_bytes == PAGE_BYTES
        fence = allocator.alloc(PAGE_BYTES)
        assert fence.address == address + PAGE_BYTES
        fill(fence, 7)
        buffer.resize(2 * PAGE_BYTES)  # what follows is in use
        assert buffer.address != address
        assert holds(buffer, PAGE_BYTES)
        assert holds(fence, PAGE_BYTES, 7)
        del buffer, fence


def test_a_large_block_moves_by_its_page_tables():
    """Faults are counted: a copy would touch every page."""
    with PageAllocator(backing="base", purge_after_s=None) as allocator:
        buffer = allocator.alloc("64MiB")
        fill(buffer)
        for nbytes in (80 * MIB, 160 * MIB, 200 * MIB + 1, 64 * MIB):
            before = call_counts()["mremap"]
            n_faults = allocator.stats().n_faults
            buffer.resize(nbytes)
            assert call_counts()["mremap"] == before + 1
            if "PAGEALLOC_SANITIZE" not in os.environ:  # whose own memory is touched as well
                assert allocator.stats().n_faults - n_faults < 64 * MIB // PAGE_BYTES // 8
            assert allocator.stats().live_bytes == -(-nbytes // PAGE_BYTES) * PAGE_BYTES
            allocator.check()
        assert holds(buffer, 64 * MIB)
        held = allocator.stats().held_bytes
        assert held <= 65 * MIB
        del buffer


@pytest.mark.parametrize("refused", ["mremap", "mmap"])
def test_a_refused_move(refused):
    with PageAllocator(backing="base", purge_after_s=None) as allocator:
        buffer = allocator.alloc("40MiB")
        fill(buffer)
        address = buffer.address
        with os_memory.refusing(refused):
            if refused == "mmap":
                with pytest.raises(OutOfMemoryError, match="asked for 83886080"):
                    buffer.resize("80MiB")
                assert (buffer.address, buffer.nbytes) == (address, 40 * MIB)
            else:
                buffer.resize("80MiB")  # copied
        assert holds(buffer, 40 * MIB)
        allocator.check()
        del buffer


def test_within_the_budget_by_what_it_adds_alone():
    with PageAllocator(backing="base", budget_bytes="100MiB", purge_after_s=None) as allocator:
        buffer = allocator.alloc("60MiB")
        fill(buffer)
        buffer.resize("100MiB")
        assert holds(buffer, 60 * MIB)
        assert allocator.stats().committed_bytes == 100 * MIB
        with pytest.raises(OutOfMemoryError, match="budget"):
            buffer.resize(100 * MIB + 1)
        assert buffer.nbytes == 100 * MIB
        allocator.check()
        buffer.resize("40MiB")
        small = allocator.alloc("30MiB")
        small.resize("31MiB")  # within its arena
        with pytest.raises(OutOfMemoryError, match="budget"):
            allocator.alloc("40MiB")
        allocator.check()
        del buffer, small


def test_the_alignment_stays():
    with PageAllocator(purge_after_s=None) as allocator:
        for align in (64, 512, PAGE_BYTES, 2 * PAGE_BYTES, MIB, 4 * MIB):
            with allocator.alloc(1000, align=align) as buffer:
                fill(buffer)
                for nbytes in (3000, 5 * PAGE_BYTES, 3 * MIB, 40 * MIB, 100 * MIB, 900):
                    buffer.resize(nbytes)
                    assert buffer.address % align == 0
                assert holds(buffer, 900)
                allocator.check()


def test_zeros_behind_what_was_there():
    with PageAllocator(zero_on_reuse=True, purge_after_s=None) as allocator:
        for nbytes in (100, 5000, 40 * MIB):
            with allocator.alloc(2 * nbytes) as buffer:
                fill(buffer)
            with allocator.alloc(nbytes) as buffer:
                for more in (nbytes + 20, 2 * nbytes, 4 * nbytes):
                    buffer.resize(more)
                    assert not np.frombuffer(buffer, np.uint8).any()
        allocator.check()


def test_not_while_there_are_views():
    with PageAllocator() as allocator:
        buffer = allocator.alloc(100)
        view = memoryview(buffer)
        with pytest.raises(BufferError, match="1 view of this Buffer"):
            buffer.resize(200)
        assert buffer.nbytes == 100
        view.release()
        for wrong in (0, -1, "much"):
            with pytest.raises(ValueError, match="nbytes"):
                buffer.resize(wrong)
        buffer.close()
        with pytest.raises(ClosedError):
            buffer.resize(200)


def test_what_on_pressure_frees_serves_a_resize():
    with PageAllocator(backing="base", budget_bytes="8MiB", purge_after_s=None) as allocator:
        cache = [allocator.alloc("4MiB")]
        buffer = allocator.alloc("3MiB")
        fill(buffer)
        allocator.on_pressure(lambda _nbytes: cache.clear())
        buffer.resize("6MiB")
        assert holds(buffer, 3 * MIB)
        assert not cache
        allocator.check()
        del buffer


def test_a_large_block_of_huge_pages():
    with PageAllocator(backing="thp", purge_after_s=None) as allocator:
        try:
            buffer = allocator.alloc("48MiB")
        except BackingUnavailableError:
            pytest.skip("no transparent huge pages here")
        fill(buffer)
        for nbytes in (200 * MIB, 100 * MIB + 5, 64 * MIB):
            buffer.resize(nbytes)
            assert buffer.address % huge_page_size_bytes() == 0
            allocator.check()
        assert holds(buffer, 48 * MIB)
        del buffer


# --- memory that somebody else owns ---


class Owner:
    """Memory mapped by somebody else."""

    def __init__(self, nbytes):
        self.mapping = mmap.mmap(-1, nbytes)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.mapping))


def test_foreign_memory_is_written_in_place_and_kept():
    owner = Owner(3 * PAGE_BYTES)
    mapping = owner.mapping
    n_allocs = call_counts()["munmap"]
    buffer = Buffer.from_foreign(owner.address, 2 * PAGE_BYTES, owner, align=256)
    assert (buffer.address, buffer.nbytes, buffer.fresh) == (owner.address, 2 * PAGE_BYTES, False)
    assert buffer.allocator is None
    np.frombuffer(buffer, np.uint8)[:] = 5
    assert mapping[: 2 * PAGE_BYTES] == b"\5" * (2 * PAGE_BYTES)
    assert mapping[2 * PAGE_BYTES] == 0
    del owner
    assert memoryview(buffer)[0] == 5  # the mapping is there, for its owner is
    with pytest.raises(TypeError, match="foreign"):
        buffer.resize(10)
    view = memoryview(buffer)
    with pytest.raises(BufferError):
        buffer.close()
    view.release()
    buffer.close()
    with pytest.raises(ClosedError):
        memoryview(buffer)
    assert mapping[0] == 5  # not freed
    assert call_counts()["munmap"] == n_allocs


def test_foreign_memory_that_is_none():
    owner = Owner(2 * PAGE_BYTES)
    with pytest.raises(ValueError, match=r"no multiple of align=256, but of 64"):
        Buffer.from_foreign(owner.address + 64, 64, owner, align=256)
    with pytest.raises(ValueError, match="a power of two"):
        Buffer.from_foreign(owner.address, 64, owner, align=48)
    with pytest.raises(TypeError, match="owner=None"):
        Buffer.from_foreign(owner.address, 64, None)
    with pytest.raises(ValueError, match="not all of this memory is mapped"):
        Buffer.from_foreign(owner.address, 1 << 40, owner)
    with pytest.raises(ValueError, match="not all of this memory is mapped"):
        Buffer.from_foreign(PAGE_BYTES, 64, owner)
    for address, nbytes in ((0, 64), (-64, 64), (1 << 64, 64), ((1 << 64) - 64, 65)):
        with pytest.raises(ValueError, match="no such range"):
            Buffer.from_foreign(address, nbytes, owner)
    with pytest.raises(ValueError, match="too small"):
        Buffer.from_foreign(owner.address, 0, owner)
    with pytest.raises(TypeError):
        Buffer.from_foreign("here", 64, owner)


def test_foreign_memory_goes_back_to_its_owner_with_the_last_view():
    owner = Owner(PAGE_BYTES)
    alive = []

    class Keeper:
        def __del__(self):
            alive.append("gone")

    buffer = Buffer.from_foreign(owner.address, 100, Keeper())
    array = np.frombuffer(buffer, np.uint8)
    del buffer
    assert not alive
    del array
    assert alive == ["gone"]
