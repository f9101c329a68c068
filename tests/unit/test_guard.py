"""guard=: an access behind a block, or of one that was freed, ends the process at once."""

import ctypes
import errno
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from pagealloc import OutOfMemoryError, PageAllocator, page_size_bytes
from pagealloc.core import os_memory

PAGE_BYTES = page_size_bytes()
MODES = ("slot", "freed", "slot+freed")

HEAD = """
import ctypes, faulthandler, sys
from pagealloc import PageAllocator, page_size_bytes
from pagealloc.core import os_memory

faulthandler.enable()
PAGE_BYTES = page_size_bytes()
ctypes.c_char.from_buffer  # loaded before anything can go wrong


def put(address):
    print("here", flush=True)
    ctypes.memset(address, 1, 1)
    print("survived", flush=True)

"""


def run(program, *arguments):
    if os.environ.get("PAGEALLOC_SANITIZE") == "address":
        pytest.skip("AddressSanitizer notices before the processor does")
    return subprocess.run(
        [sys.executable, "-P", "-c", HEAD + textwrap.dedent(program), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
    )


def assert_faulted(result):
    assert result.returncode == -signal.SIGSEGV, result
    assert result.stdout == "here\n"
    assert "Segmentation fault" in result.stderr
    assert "in put" in result.stderr  # faulthandler shows where


BEHIND = """
allocator = PageAllocator(guard=sys.argv[1])
if len(sys.argv) > 3:
    os_memory.refuse("madvise", 22)     # as a kernel without MADV_GUARD_INSTALL
nbytes = int(sys.argv[2])
buffer = allocator.alloc(nbytes)
memoryview(buffer)[-1] = 1
memoryview(buffer)[0] = 1
put(buffer.address + -(-nbytes // 64) * 64)
"""


@pytest.mark.parametrize("mode", ["slot", "slot+freed"])
@pytest.mark.parametrize("nbytes", [1, 64, 100, PAGE_BYTES - 64, PAGE_BYTES, 5 * PAGE_BYTES])
def test_behind_a_block(nbytes, mode):
    assert_faulted(run(BEHIND, mode, str(nbytes)))


def test_behind_a_block_where_guards_are_mappings():
    assert_faulted(run(BEHIND, "slot", "100", "refuse"))


AFTER = """
allocator = PageAllocator(guard=sys.argv[1])
if len(sys.argv) > 2:
    os_memory.refuse("madvise", 22)
buffers = [allocator.alloc(100) for _ in range(10)]
for buffer in buffers:
    memoryview(buffer)[:] = b"x" * 100
address = buffers[3].address
del buffer
buffers.clear()
put(address)
"""


@pytest.mark.parametrize("mode", ["freed", "slot+freed"])
def test_after_it_was_freed(mode):
    assert_faulted(run(AFTER, mode))


def test_after_it_was_freed_where_guards_are_mappings():
    assert_faulted(run(AFTER, "freed", "refuse"))


def test_a_pointer_kept_over_a_resize():
    program = """
    allocator = PageAllocator(guard="freed")
    buffer = allocator.alloc(PAGE_BYTES)
    address = buffer.address
    buffer.resize(2 * PAGE_BYTES)
    put(address)
    """
    assert_faulted(run(program))


def test_without_guards_nobody_notices():
    """The same accesses, so that the tests above test the guards and not the machine."""
    program = BEHIND.replace("guard=sys.argv[1]", "guard=None")
    result = run(program, "slot", "100")
    assert (result.returncode, result.stdout) == (0, "here\nsurvived\n")


@pytest.mark.parametrize("mode", MODES)
def test_blocks_as_others_have_them(mode):
    """Content, alignment, reuse, counts; also of arrays, batches and classes."""
    rng = np.random.default_rng(1)
    with PageAllocator(guard=mode, purge_after_s=0.05) as allocator:
        live = []
        for _ in range(600):
            if live and rng.random() < 0.5:
                fill, buffer = live.pop(int(rng.integers(len(live))))
                assert (np.frombuffer(buffer, np.uint8) == fill).all()
                buffer.close()
                continue
            align = 1 << int(rng.integers(0, 15))
            nbytes = int(2 ** rng.uniform(0, 18))
            buffer = allocator.alloc(nbytes, align=align)
            assert buffer.address % max(align, 64) == 0
            if nbytes >= PAGE_BYTES:
                assert buffer.address % PAGE_BYTES == 0
            view = np.frombuffer(buffer, np.uint8)
            if buffer.fresh:
                assert not view.any()
            fill = int(rng.integers(256))
            view[:] = fill
            live.append((fill, buffer))
            del view
        allocator.check()
        assert allocator.stats().n_live == len(live)
        del buffer
        live.clear()
        with allocator.alloc_many(1000, 20) as batch:
            assert len(batch) == 20
        with allocator.exact(192).alloc() as block:
            assert block.address % 64 == 0
        assert allocator.zeros(1000).sum() == 0
        with allocator.alloc("40MiB") as large:  # an arena of its own
            np.frombuffer(large, np.uint8)[:] = 1
        allocator.check()
        assert allocator.stats().n_live == 0
        allocator.trim()
        assert allocator.stats().reserved_bytes == 0


@pytest.mark.parametrize("mode", MODES)
def test_zeros_on_reuse(mode):
    with PageAllocator(guard=mode, zero_on_reuse=True) as allocator:
        for _ in range(5):
            with allocator.alloc(300) as buffer:
                view = np.frombuffer(buffer, np.uint8)
                assert not view.any()
                view[:] = 9
                del view


def test_a_guard_that_is_refused_is_an_error():
    with PageAllocator(guard="slot") as allocator:
        allocator.alloc(1).close()  # an arena is there
        with (
            os_memory.refusing("madvise", errno.ENOMEM),
            pytest.raises(OutOfMemoryError, match="refused"),
        ):
            allocator.alloc(1)
        allocator.check()
        assert allocator.stats().n_live == 0
        allocator.alloc(1).close()


def test_what_cannot_be_guarded():
    with pytest.raises(ValueError, match="possible are None, 'slot', 'freed', 'slot\\+freed'"):
        PageAllocator(guard="everything")
    with pytest.raises(ValueError, match="guards single pages: use backing='base', not 'thp'"):
        PageAllocator(guard="slot", backing="thp")


def test_freed_memory_is_not_held():
    with PageAllocator(guard="freed", purge_after_s=None) as allocator:
        buffer = allocator.alloc(64 * PAGE_BYTES)
        np.frombuffer(buffer, np.uint8)[:] = 1
        assert allocator.stats().held_bytes == 64 * PAGE_BYTES
        buffer.close()
        assert allocator.stats().held_bytes == 0


def test_native_callers_find_its_length():
    """`ctypes` writes all that is usable, and the guard behind is not touched."""
    with PageAllocator(guard="slot+freed") as allocator:
        buffer = allocator.alloc(1000)
        room = -buffer.address % PAGE_BYTES
        assert 1000 <= room < 1064
        ctypes.memset(buffer.address, 1, room)
        buffer.close()
        allocator.check()
