"""The two places the demo's engine keeps K and V in: what goes in comes out, as float32."""

import numpy as np
import pytest

from pagealloc.demo.kv_stores import PagedKV, PreallocatedKV, paged_layout
from pagealloc.demo.measure import resident_bytes
from pagealloc.demo.weights import LlamaShape
from pagealloc.kv import KVCache

SHAPE = LlamaShape(
    name="shape",
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    head_dim=8,
    hidden_dim=32,
    ffn_dim=64,
    vocab_tokens=10,
    max_tokens=200,
    norm_epsilon=1e-5,
    rope_base=1e4,
    rope_dim=8,
    rope_scale=1.0,
    weights_bytes=0,
)
MAX_TOKENS = 200


@pytest.fixture(params=["preallocated", "paged"])
def kv(request):
    if request.param == "preallocated":
        yield PreallocatedKV(SHAPE, MAX_TOKENS)
        return
    cache = KVCache(paged_layout(SHAPE, MAX_TOKENS))
    store = PagedKV(cache.sequence())
    yield store
    store.close()
    cache.close()


def rows(n_tokens, seed):
    values = np.random.default_rng(seed).standard_normal((2, n_tokens, 2, 8))
    return values.astype(np.float16).astype(np.float32)  # (2, T, H, D)


def read(kv, layer, n_tokens):
    k, v = np.full((2, n_tokens, 2, 8), np.nan, np.float32)
    kv.read(layer, k, v)
    return np.stack((k, v))


@pytest.mark.parametrize("pieces", [(1,), (16,), (5, 11, 1), (40, 1, 1, 30), (200,)])
def test_rows_come_back(kv, pieces):
    for layer in range(SHAPE.n_layers):
        written = []
        for i, n_tokens in enumerate(pieces):
            k, v = rows(n_tokens, seed=10 * layer + i)
            kv.append(layer, k, v)
            written.append(np.stack((k, v)))
            expected = np.concatenate(written, axis=1)
            np.testing.assert_array_equal(read(kv, layer, expected.shape[1]), expected)
    assert len(kv) == sum(pieces)


def test_length_is_what_every_layer_holds(kv):
    for layer in range(SHAPE.n_layers):
        assert len(kv) == 0
        kv.append(layer, *rows(3, seed=layer))
    assert len(kv) == 3


def test_a_strided_slice_of_the_engine_is_taken_as_it_is(kv):
    wide = np.random.default_rng(0).standard_normal((5, 8, 8)).astype(np.float16)
    wide = wide.astype(np.float32)
    kv.append(0, wide[:, 4:6], wide[:, 6:])
    np.testing.assert_array_equal(read(kv, 0, 5)[1], wide[:, 6:])


def test_a_full_context_refuses_more(kv):
    kv.append(0, *rows(MAX_TOKENS, seed=0))
    with pytest.raises((ValueError, IndexError)):
        kv.append(0, *rows(1, seed=1))


def test_the_preallocated_cache_is_resident_from_the_start():
    kv = PreallocatedKV(SHAPE, MAX_TOKENS)
    assert kv.mapped_bytes == MAX_TOKENS * SHAPE.kv_token_bytes
    assert resident_bytes(kv.address, kv.mapped_bytes) >= kv.mapped_bytes
