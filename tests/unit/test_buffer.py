"""The handle: ownership, views, closing, and what is refused."""

import copy
import pickle
import weakref

import numpy as np
import pytest

import pagealloc
from pagealloc import Buffer, ClosedError, PageAllocator


@pytest.fixture
def allocator():
    allocator = PageAllocator(backing="base")
    yield allocator
    allocator.check()


def test_bytes_written_are_read_back(allocator):
    with allocator.alloc("64KiB") as buffer:
        assert len(buffer) == buffer.nbytes == 65536
        memoryview(buffer)[:] = bytes(range(256)) * 256
        assert bytes(buffer) == bytes(range(256)) * 256
    assert buffer.closed


def test_the_view_is_writable_bytes_at_the_address(allocator):
    buffer = allocator.alloc(1000)
    view = memoryview(buffer)
    assert (view.nbytes, view.format, view.itemsize, view.readonly) == (1000, "B", 1, False)
    assert np.frombuffer(buffer, np.uint8).ctypes.data == buffer.address


def test_dlpack_is_no_copy_and_keeps_the_buffer_open(allocator):
    buffer = allocator.alloc(1000)
    assert buffer.__dlpack_device__() == (1, 0)  # the CPU
    array = np.from_dlpack(buffer)
    assert (array.dtype, array.shape, array.ctypes.data) == (np.uint8, (1000,), buffer.address)
    memoryview(buffer)[:3] = b"abc"
    assert bytes(array[:3]) == b"abc"
    with pytest.raises(BufferError, match="1 view of this Buffer"):
        buffer.close()
    del array
    capsule = buffer.__dlpack__()
    with pytest.raises(BufferError, match="1 view of this Buffer"):
        buffer.close()
    del capsule  # nobody took it
    buffer.close()


@pytest.mark.skipif(
    np.lib.NumpyVersion(np.__version__) < "2.1.0", reason="NumPy 1.26 and 2.0 know no versions"
)
def test_dlpack_passes_on_what_the_consumer_asks(allocator):
    with allocator.alloc(64) as buffer:
        versioned = buffer.__dlpack__(max_version=(1, 0), stream=None, dl_device=(1, 0))
        assert '"dltensor_versioned"' in repr(versioned)
        assert '"dltensor"' in repr(buffer.__dlpack__())
        copied = np.from_dlpack(buffer, copy=True)
        assert copied.ctypes.data != buffer.address
        with pytest.raises(BufferError, match="device"):
            buffer.__dlpack__(dl_device=(2, 0))
        with pytest.raises((RuntimeError, ValueError), match="stream"):  # by NumPy's version
            buffer.__dlpack__(stream=1)
        del versioned


def test_close_with_a_live_view_is_refused_and_changes_nothing(allocator):
    buffer = allocator.alloc(4096)
    array = np.frombuffer(buffer, np.uint8)
    array[0] = 7
    with pytest.raises(BufferError, match="1 view of this Buffer"):
        buffer.close()
    assert array[0] == 7
    assert allocator.stats().n_live == 1
    del array
    buffer.close()
    assert allocator.stats().n_live == 0


def test_closing_twice_frees_once(allocator):
    buffer = allocator.alloc(4096)
    buffer.close()
    buffer.close()
    assert allocator.stats().n_frees == 1


@pytest.mark.parametrize(
    "use",
    [
        memoryview,
        np.from_dlpack,
        lambda b: b.address,
        lambda b: b.__enter__(),
        lambda b: b.__dlpack__(),
        lambda b: b.__dlpack_device__(),
    ],
)
def test_use_after_close_is_a_closed_error(allocator, use):
    buffer = allocator.alloc(4096)
    buffer.close()
    with pytest.raises(ClosedError, match="closed"):
        use(buffer)


def test_the_last_reference_gives_the_memory_back(allocator):
    buffer = allocator.alloc(4096)
    gone = weakref.ref(buffer)
    view = memoryview(buffer)
    del buffer
    assert allocator.stats().n_live == 1
    del view
    assert gone() is None
    assert allocator.stats().n_live == 0


def test_a_buffer_keeps_its_allocator_alive():
    buffer = PageAllocator(backing="base").alloc(4096)
    memoryview(buffer)[0] = 1
    assert buffer.allocator.stats().n_live == 1
    buffer.close()


def test_only_alloc_makes_one():
    with pytest.raises(TypeError, match="alloc"):
        Buffer()


@pytest.mark.parametrize("duplicate", [pickle.dumps, copy.copy, copy.deepcopy])
def test_no_copy_and_no_pickle(allocator, duplicate):
    with allocator.alloc(64) as buffer, pytest.raises(TypeError, match="no copy, no pickle"):
        duplicate(buffer)
    with pytest.raises(TypeError, match="no copy, no pickle"):
        duplicate(allocator)


def test_fresh_memory_is_zero_and_says_so(allocator):
    first = allocator.alloc("1MiB")
    assert first.fresh
    assert not any(memoryview(first))
    memoryview(first)[:] = b"\xff" * (1 << 20)
    first.close()
    assert not allocator.alloc("1MiB").fresh


def test_repr_shows_size_and_place(allocator):
    buffer = allocator.alloc("64KiB")
    assert repr(buffer) == f"<Buffer of 64.0 KiB at {buffer.address:#x}>"
    buffer.close()
    assert repr(buffer) == "<Buffer of 64.0 KiB, closed>"


def test_words_of_the_package_are_exported():
    assert set(pagealloc.__all__) <= set(dir(pagealloc))
