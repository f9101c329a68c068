"""One step of many sequences, and their rows in one array."""

import os

import numpy as np
import pytest

from pagealloc.errors import ClosedError, ForkedError, OutOfMemoryError, PageBoundaryError
from pagealloc.kv import KVCache, KVLayout, batches

ORDERS = ("interleaved", "split", "block")
N_LAYERS, N_HEADS, HEAD_DIM = 3, 2, 32


def make_layout(order="block", **options):
    return KVLayout(N_LAYERS, N_HEADS, HEAD_DIM, 200, order=order, **options)


def make_tokens(n_steps, n_sequences, seed=0):
    """Tokens (T, S, L, 2, H, D)."""
    shape = (n_steps, n_sequences, N_LAYERS, 2, N_HEADS, HEAD_DIM)
    return np.random.default_rng(seed).normal(size=shape).astype(np.float16)


@pytest.fixture(params=ORDERS)
def cache(request):
    with KVCache(make_layout(request.param)) as cache:
        yield cache
        cache.check()


@pytest.fixture(params=[1 << 20, 1], ids=["one thread", "threads"])
def threads(request, monkeypatch):
    monkeypatch.setattr(batches, "THREAD_BYTES", request.param)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)


def test_a_step_is_a_token_of_each(cache, threads):
    prompt = cache.sequence()
    first = make_tokens(20, 1)
    for token in first[:, 0]:
        prompt.append_token(token)
    sequences = [prompt.fork() for _ in range(7)]
    tokens = make_tokens(40, 7, seed=1)
    for i, sequence in enumerate(sequences):  # of different lengths
        for token in tokens[: 2 * i, i]:
            sequence.append_token(token)
    for step in range(20):
        kv = np.stack([tokens[2 * i + step, i] for i in range(7)])
        cache.append_batch(sequences, kv)
    for i, sequence in enumerate(sequences):
        expected = np.concatenate([first[:, 0], tokens[: 2 * i + 20, i]])
        assert len(sequence) == len(expected)
        assert sequence.positions.tolist() == list(range(len(expected)))
        for layer in range(N_LAYERS):
            for read, kv in ((sequence.k, 0), (sequence.v, 1)):
                np.testing.assert_array_equal(read(layer, on_cross="copy"), expected[:, layer, kv])
    for layer in range(N_LAYERS):
        for kind, kv in (("k", 0), ("v", 1)):
            gathered = cache.gather(sequences, layer, kind)
            expected = np.concatenate(
                [
                    np.concatenate([first[:, 0], tokens[: 2 * i + 20, i]])[:, layer, kv]
                    for i in range(7)
                ]
            )
            np.testing.assert_array_equal(gathered, expected)
            out = np.zeros_like(gathered)
            assert cache.gather(sequences, layer, kind, out=out) is out
            np.testing.assert_array_equal(out, expected)


def test_arrays_of_any_strides(cache):
    sequences = [cache.sequence() for _ in range(3)]
    kv = np.asfortranarray(make_tokens(1, 3)[0])
    cache.append_batch(sequences, kv)
    np.testing.assert_array_equal(cache.gather(sequences, 1, "v"), kv[:, 1, 1])


def test_positions(cache):
    sequences = [cache.sequence() for _ in range(2)]
    tokens = make_tokens(3, 2)
    cache.append_batch(sequences, tokens[0], positions=[5, 9])
    cache.append_batch(sequences, tokens[1])
    assert [sequence.positions.tolist() for sequence in sequences] == [[5, 6], [9, 10]]
    with pytest.raises(ValueError, match="must not be negative"):
        cache.append_batch(sequences, tokens[2], positions=[7, -1])
    with pytest.raises(ValueError, match="1 positions for 2 sequences"):
        cache.append_batch(sequences, tokens[2], positions=[7])
    assert [len(sequence) for sequence in sequences] == [2, 2]


def test_empty_batches(cache):
    cache.append_batch([], np.empty((0, N_LAYERS, 2, N_HEADS, HEAD_DIM), np.float16))
    assert cache.gather([], 0, "k").shape == (0, N_HEADS, HEAD_DIM)
    assert cache.gather([cache.sequence()], 0, "k").shape == (0, N_HEADS, HEAD_DIM)


def test_all_or_none_without_memory():
    layout = make_layout()
    with KVCache(layout, budget_bytes=3 * layout.block_bytes) as cache:
        sequences = [cache.sequence(evictable=True) for _ in range(4)]
        tokens = make_tokens(2, 4)
        cache.append_batch(sequences[:3], tokens[0, :3])
        with pytest.raises(OutOfMemoryError):
            cache.append_batch(sequences, tokens[1])
        assert [len(sequence) for sequence in sequences] == [1, 1, 1, 0]
        assert not any(sequence.closed for sequence in sequences)
        cache.append_batch(sequences[:3], tokens[1, :3])
        np.testing.assert_array_equal(cache.gather(sequences[:1], 0, "k"), tokens[:, 0, 0, 0])
        cache.check()


def test_all_or_none_without_room(cache):
    full, other = cache.sequence(), cache.sequence()
    tokens = make_tokens(1, 2)
    for _ in range(200):
        full.append_token(tokens[0, 0])
    with pytest.raises(PageBoundaryError):
        cache.append_batch([other, full], tokens[0])
    assert (len(other), len(full)) == (0, 200)


def test_what_does_not_fit(cache):
    sequence, kv = cache.sequence(), make_tokens(1, 1)[0]
    with (
        KVCache(cache.layout) as another,
        pytest.raises(ValueError, match="no sequence of this cache"),
    ):
        cache.append_batch([another.sequence()], kv)
    with pytest.raises(ValueError, match="no sequence of this cache"):
        cache.gather([3], 0, "k")
    with pytest.raises(ValueError, match="twice"):
        cache.append_batch([sequence, sequence], make_tokens(1, 2)[0])
    with pytest.raises(ValueError, match=r"kv has shape \(1, 3, 2, 2, 32\), expected \(0,"):
        cache.append_batch([], kv)
    with pytest.raises(TypeError, match="array of float16, not float32"):
        cache.append_batch([sequence], kv.astype(np.float32))
    with pytest.raises(TypeError, match="array of float16, not list"):
        cache.append_batch([sequence], kv.tolist())
    with pytest.raises(ValueError, match="kv='q'"):
        cache.gather([sequence], 0, "q")
    with pytest.raises(PageBoundaryError, match="layer 3"):
        cache.gather([sequence], 3, "k")
    for out in (np.empty((1, 2, 32), np.float16), np.empty((0, 2, 31), np.float32)):
        with pytest.raises(ValueError, match="out must be"):
            cache.gather([sequence], 0, "k", out=out)
    with pytest.raises(TypeError, match="cannot be read as float64"):
        cache.gather([sequence], 0, "k", out=np.empty((0, 2, 32)))
    closed = cache.sequence()
    closed.close()
    with pytest.raises(ClosedError):
        cache.append_batch([sequence, closed], make_tokens(1, 2)[0])
    sequence.append(0, kv[:, 0, 0], kv[:, 0, 1])
    with pytest.raises(ValueError, match="cannot append a token"):
        cache.append_batch([sequence], kv)


def test_layers_that_differ_go_token_by_token():
    with (
        KVCache(KVLayout(2, (1, 2), 8, 20)) as cache,
        pytest.raises(ValueError, match="append_token"),
    ):
        cache.append_batch([cache.sequence()], np.empty((1, 2, 2, 1, 8), np.float16))


def test_the_child_of_a_fork_may_gather(cache, threads):
    sequences = [cache.sequence() for _ in range(3)]
    kv = make_tokens(1, 3)[0]
    cache.append_batch(sequences, kv)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            assert (cache.gather(sequences, 1, "k") == kv[:, 1, 0]).all()
            try:
                cache.append_batch(sequences, kv)
            except ForkedError:
                status = 0
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
