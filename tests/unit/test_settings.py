"""What an allocator can be told: its budget, its node, what a fork and a reuse do."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest

from pagealloc import (
    BackingUnavailableError,
    OutOfMemoryError,
    PageAllocator,
    huge_page_size_bytes,
    page_size_bytes,
)
from pagealloc.core.machine_memory import available_bytes
from pagealloc.core.os_memory import refusing

MIB = 1 << 20
PAGE_BYTES = page_size_bytes()


def fill(buffer, value):
    np.frombuffer(buffer, np.uint8)[:] = value


def fill_all(buffers, value):
    for buffer in buffers:
        fill(buffer, value)


# --- on_pressure ---


def test_callbacks_free_before_anything_is_refused():
    with PageAllocator(backing="base", budget_bytes=8 * MIB) as allocator:
        cached = [allocator.alloc("1MiB") for _ in range(8)]
        asked = []

        def give_back(nbytes):
            asked.append(nbytes)
            cached.pop()

        allocator.on_pressure(give_back)
        buffers = [allocator.alloc("1MiB") for _ in range(8)]
        assert (asked, cached) == ([MIB] * 8, [])
        with pytest.raises(OutOfMemoryError) as caught:
            allocator.alloc("1MiB")
        assert isinstance(caught.value.__cause__, IndexError)  # pop from an empty list
        allocator.check()
        buffers.clear()


def test_callbacks_are_asked_in_turn_and_can_be_taken_back():
    with PageAllocator(backing="base", budget_bytes=MIB) as allocator:
        held = [allocator.alloc("1MiB")]
        asked = []
        remove = [allocator.on_pressure(lambda _n, i=i: asked.append(i)) for i in range(3)]
        with pytest.raises(OutOfMemoryError):
            allocator.alloc(1)
        assert asked == [0, 1, 2]
        remove[1]()
        remove[1]()
        allocator.on_pressure(lambda _n: held.clear())
        allocator.alloc_many(PAGE_BYTES, 4).close()
        assert asked == [0, 1, 2, 0, 2]


def test_a_callbacks_own_request_is_refused_at_once():
    with PageAllocator(backing="base", budget_bytes=MIB) as allocator:
        held = allocator.alloc("1MiB")
        allocator.on_pressure(lambda _n: allocator.alloc(1))
        with pytest.raises(OutOfMemoryError) as caught:
            allocator.alloc(1)
        assert isinstance(caught.value.__cause__, OutOfMemoryError)
        held.close()


def test_a_callback_that_cannot_be_called():
    with PageAllocator() as allocator, pytest.raises(TypeError, match="cannot be called"):
        allocator.on_pressure(3)


def test_pressure_of_the_kernels():
    with PageAllocator(backing="base") as allocator:
        asked = []
        allocator.on_pressure(asked.append)
        with refusing("mmap"), pytest.raises(OutOfMemoryError):
            allocator.alloc("48MiB")
        assert asked == [48 * MIB]


# --- budget_bytes="auto" ---


def test_the_budget_is_what_there_is():
    with PageAllocator(budget_bytes="auto") as allocator:
        assert allocator.budget_bytes % PAGE_BYTES == 0
        assert abs(allocator.budget_bytes - available_bytes()) < 2 << 30
        allocator.alloc("1MiB").close()


# --- NUMA ---


def nodes():
    folder = Path("/sys/devices/system/node")
    return sorted(int(path.name[4:]) for path in folder.glob("node[0-9]*")) or [0]


@pytest.mark.parametrize("backing", ["base", "auto"])
@pytest.mark.parametrize("setting", ["numa_node", "preferred"])
def test_memory_comes_from_the_node_asked_for(backing, setting):
    for node in nodes():
        with PageAllocator(backing=backing, **{setting: node}) as allocator:
            try:
                buffer = allocator.alloc("1MiB")
            except BackingUnavailableError:
                pytest.skip("this kernel, or a sandbox, does not let memory be bound to a node")
            assert allocator.stats().arenas[0].numa_node is None or backing == "auto"
            fill(buffer, 1)
            assert allocator.stats().arenas[0].numa_node in (node, None)
            buffer.close()


def test_what_is_said_of_a_node():
    with PageAllocator(numa_node=nodes()[0]) as bound, PageAllocator(preferred=nodes()[0]) as near:
        if len(nodes()) == 1:
            assert f"NUMA node {nodes()[0]} (the only one), no budget" in repr(bound)
            assert f"NUMA node {nodes()[0]} (the only one), no budget" in repr(near)
        else:
            assert f"NUMA node {nodes()[0]}, no budget" in repr(bound)
            assert f"NUMA node {nodes()[0]} (as long as it has memory)" in repr(near)
    with PageAllocator() as anywhere:
        assert "NUMA" not in repr(anywhere)


def test_a_node_that_is_not_there():
    with pytest.raises(ValueError, match=rf"numa_node=77: this machine has {len(nodes())} NUMA"):
        PageAllocator(numa_node=77)
    with pytest.raises(ValueError, match="preferred=-1"):
        PageAllocator(preferred=-1)
    with pytest.raises(TypeError):
        PageAllocator(preferred="near")
    with pytest.raises(ValueError, match="exclude each other"):
        PageAllocator(numa_node=0, preferred=0)


@pytest.mark.parametrize("backing", ["base", "auto", "thp"])
def test_a_kernel_that_refuses_to_bind(backing):
    with PageAllocator(
        backing=backing, numa_node=nodes()[0], arena_bytes=max(64 << 20, huge_page_size_bytes())
    ) as allocator:
        with refusing("mbind"), pytest.raises(BackingUnavailableError, match="mbind"):
            allocator.alloc(1)
        assert allocator.stats().reserved_bytes == 0


# --- on_fork ---


def in_child(check):
    """Run `check` in a forked child; whether it returned True."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            status = 0 if check() else 1
        except BaseException as error:  # noqa: BLE001
            print(repr(error), file=sys.stderr)
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.parametrize("backing", ["base", "auto"])
@pytest.mark.parametrize(("on_fork", "found"), [("inherit", 7), ("dontfork", 0)])
def test_what_a_child_finds(backing, on_fork, found):
    with PageAllocator(backing=backing, on_fork=on_fork) as allocator:
        buffers = [allocator.alloc(nbytes) for nbytes in (100, "64KiB", "48MiB")]
        fill_all(buffers, 7)

        def check():
            assert all(np.all(np.frombuffer(buffer, np.uint8) == found) for buffer in buffers)
            fill_all(buffers, 9)
            own = allocator.alloc("1MiB")
            fill(own, 3)
            buffers[1].close()
            allocator.check()
            allocator.trim()
            allocator.check()
            return True

        assert in_child(check)
        assert all(np.all(np.frombuffer(buffer, np.uint8) == 7) for buffer in buffers)
        allocator.check()
        buffers.clear()


def test_on_fork_is_one_of_two():
    with pytest.raises(ValueError, match="'inherit', 'dontfork'"):
        PageAllocator(on_fork="share")


# --- zero_on_reuse ---


@pytest.mark.parametrize("nbytes", [64, 1000, PAGE_BYTES, 100_000, 3 << 20, 40 << 20])
def test_what_was_in_use_comes_back_as_zeros(nbytes):
    with PageAllocator(backing="base", zero_on_reuse=True, time_every=3) as allocator:
        for _ in range(20):
            with allocator.alloc(nbytes) as buffer:
                assert not np.frombuffer(buffer, np.uint8).any()
                fill(buffer, 255)
        with allocator.alloc(nbytes, align=4096) as buffer:
            assert not np.frombuffer(buffer, np.uint8).any()
            fill(buffer, 255)
        with allocator.alloc_many(nbytes, 3) as batch:
            assert not any(np.frombuffer(batch[i], np.uint8).any() for i in range(3))


def test_exact_blocks_come_back_as_zeros():
    with PageAllocator(zero_on_reuse=True) as allocator:
        blocks = allocator.exact(1000)
        for _ in range(20):
            with blocks.alloc() as block:
                assert not np.frombuffer(block, np.uint8).any()
                fill(block, 255)
