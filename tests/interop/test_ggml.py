"""Packed bytes are ggml's own, where llama-cpp-python brings its shared library."""

import importlib.util

import numpy as np
import pytest
from benches import import_bench

from pagealloc.kv import quant

import_bench()
from bench import bench_quant  # noqa: E402
from bench.ggml import BLOCK_BYTES, Ggml  # noqa: E402

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="needs the extra 'llama'"
)


@pytest.mark.parametrize("kind", BLOCK_BYTES)
@pytest.mark.parametrize("make", [bench_quant.random_blocks, bench_quant.edge_blocks])
def test_bytes_and_values(kind, make):
    ggml = Ggml()
    for blocks in make():
        packed = ggml.quantize(blocks, kind)
        ours = quant.quantize(blocks[:, None], kind).reshape(packed.shape)
        np.testing.assert_array_equal(ours, packed)
        values = quant.dequantize(packed, kind, (1, 32)).reshape(blocks.shape)
        expected = ggml.dequantize(packed, kind)
        np.testing.assert_array_equal(values.view(np.uint32), expected.view(np.uint32))
