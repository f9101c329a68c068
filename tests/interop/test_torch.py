"""PyTorch over our memory, without a copy.  Runs in tox's env `torch`, and nowhere else."""

import numpy as np
import pytest

import pagealloc
from pagealloc import PageAllocator

torch = pytest.importorskip("torch", reason="torch is installed in the tox env `torch` alone")


@pytest.fixture
def allocator():
    with PageAllocator(backing="base") as allocator:
        yield allocator


def test_a_tensor_over_a_buffer_is_no_copy(allocator):
    with allocator.alloc(4096) as buffer:
        array = np.frombuffer(buffer, np.float32)
        tensor = torch.from_numpy(array)
        assert tensor.data_ptr() == buffer.address
        tensor.fill_(7)
        assert array[-1] == 7
        array[0] = 3
        assert tensor[0] == 3
        del tensor, array


def test_a_tensor_keeps_its_buffer(allocator):
    tensor = torch.from_numpy(np.frombuffer(allocator.alloc(4096), np.int64))
    others = [allocator.zeros((512,), np.int64) for _ in range(64)]
    tensor.fill_(-1)
    assert all(not other.any() for other in others)
    del tensor, others


def test_dlpack_both_ways(allocator):
    array = allocator.zeros((8, 16), np.float16)
    tensor = torch.from_dlpack(array)
    assert tensor.data_ptr() == array.ctypes.data
    assert np.from_dlpack(tensor).ctypes.data == array.ctypes.data
    del tensor, array


def test_a_buffer_itself_by_dlpack(allocator):
    with allocator.alloc(4096) as buffer:
        tensor = torch.from_dlpack(buffer)
        assert tensor.data_ptr() == buffer.address
        assert tensor.dtype == torch.uint8
        tensor.view(torch.float32).fill_(1.5)
        assert (np.frombuffer(buffer, np.float32) == 1.5).all()
        with pytest.raises(BufferError, match="1 view of this Buffer"):
            buffer.close()
        del tensor


def test_a_tensor_over_an_array_of_the_numpy_handler(allocator):
    with pagealloc.numpy_handler(allocator):
        array = np.zeros((16, 1024), np.float32)
    tensor = torch.from_numpy(array)
    assert tensor.data_ptr() == array.ctypes.data
    assert tensor.data_ptr() % pagealloc.page_size_bytes() == 0
    del array
    tensor += 1
    assert tensor.sum() == 16 * 1024
    del tensor


def test_bfloat16_travels_as_uint16(allocator):
    bits = allocator.zeros((4, 8), np.uint16)
    tensor = torch.from_dlpack(bits).view(torch.bfloat16)
    tensor.fill_(1.0)
    assert tensor.data_ptr() == bits.ctypes.data
    assert (bits == 0x3F80).all()
    del tensor, bits
