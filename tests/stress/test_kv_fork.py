"""os.fork() under load: the child reads, its mutators raise, the parent notices nothing."""

import ctypes
import faulthandler
import os
import signal
import threading
import time
import traceback

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from quant_model import assert_recommended
from stress import in_child, running

from pagealloc.errors import ForkedError
from pagealloc.kv import KVCache, KVLayout

N_LAYERS, N_HEADS, HEAD_DIM = 3, 3, 64

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="no os.fork() on this platform"),
    # From Python 3.12 on, fork() in a process with threads warns; that is what is tested here.
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning"),
]


def make_rows(n_tokens, seed):
    """Random rows (T, L, 2, H, D)."""
    shape = (n_tokens, N_LAYERS, 2, N_HEADS, HEAD_DIM)
    return np.random.default_rng(seed).normal(size=shape).astype(np.float16)


def append_rows(seq, rows):
    for layer in range(N_LAYERS):
        seq.append(layer, rows[:, layer, 0], rows[:, layer, 1])


def assert_rows(seq, rows):
    assert len(seq) == len(rows)
    for layer in range(N_LAYERS):
        for kv in (0, 1):
            if seq.cache.cold_layout is not seq.cache.layout:
                assert_recommended(seq, layer, kv, rows[:, layer, kv])
                continue
            if seq.cache.layout.order == "block":
                blocks = (seq.v_blocks if kv else seq.k_blocks)(layer)
                array = blocks.reshape(-1, N_HEADS, HEAD_DIM)[: len(seq)]
            else:
                array = (seq.v if kv else seq.k)(layer)
            assert_array_equal(array, rows[:, layer, kv])


def assert_frozen(seq, rows):
    """What would change a sequence raises; reading it goes on."""
    before = seq.layer_lengths
    for mutate in (
        lambda: seq.append(0, rows[:, 0, 0], rows[:, 0, 1]),
        lambda: seq.append_token(rows[0]),
        lambda: seq.truncate(1),
        seq.rollback,
        seq.fork,
        seq.cache.sequence,
    ):
        with pytest.raises(ForkedError, match=r"os\.fork\(\)"):
            mutate()
    assert seq.layer_lengths == before


def work(prompt, seed, stop, failures):
    """Fork, append, truncate and close sequences until told to stop."""
    generator = np.random.default_rng(seed)
    rows = make_rows(40, seed)
    try:
        while not stop.is_set():
            with prompt.cache.sequence() as own:
                append_rows(own, rows[:20])
                with own.fork() as child:
                    append_rows(child, rows[20:40])
                    append_rows(own, rows[20:30])
                    n_tokens = int(generator.integers(0, 20))
                    child.truncate(n_tokens)
                    append_rows(child, rows[n_tokens:])
                    assert_rows(child, rows)
                assert_rows(own, rows[:30])
    except BaseException:  # noqa: BLE001  whatever it is, the test must see it
        failures.append(traceback.format_exc())


QUANTISED = {"quantize": "recommended", "residual_tokens": 24}


@pytest.mark.fork_under_load
@pytest.mark.parametrize("options", [{}, QUANTISED], ids=["float16", "quantised"])
@pytest.mark.parametrize("order", ["interleaved", "block"])
def test_fork_under_load(duration_s, order, options):
    cache = KVCache(KVLayout(N_LAYERS, N_HEADS, HEAD_DIM, 300, order=order), **options)
    rows, more = make_rows(150, 0), make_rows(30, 1)
    prompt = cache.sequence()
    append_rows(prompt, rows[:100])
    heir = prompt.fork()
    append_rows(heir, rows[100:])
    stop, failures = threading.Event(), []
    threads = [
        threading.Thread(target=work, args=(prompt, seed, stop, failures)) for seed in range(3)
    ]

    def read_and_try_to_write():
        assert_rows(prompt, rows[:100])
        assert_rows(heir, rows)
        assert_frozen(prompt, more)
        assert_frozen(heir, more)
        cache._store.check()
        prompt.check()
        heir.check()
        assert cache.stats().n_tokens >= 250
        heir.close()  # gives the child's mapping back, and nothing of the parent's
        assert_rows(prompt, rows[:100])
        prompt.close()
        with KVCache(cache.layout) as own:  # a cache of its own works
            seq = own.sequence()
            append_rows(seq, more)
            assert_rows(seq, more)

    with running(stop, *threads):
        end = time.monotonic() + duration_s
        while time.monotonic() < end:
            assert in_child(read_and_try_to_write) == 0
            assert not failures, failures[0]
    assert not failures, failures[0]
    assert_rows(prompt, rows[:100])
    assert_rows(heir, rows)
    cache.check()
    append_rows(heir, more)
    append_rows(prompt, more)
    assert_rows(heir, np.concatenate([rows, more]))
    assert_rows(prompt, np.concatenate([rows[:100], more]))
    cache.check()
    cache.close()


@pytest.mark.parametrize("order", ["interleaved", "split", "block"])
def test_a_child_cannot_write_into_the_parent(order):
    """Even past all checks: the child's window is read-only, so writing is a crash of the child."""
    cache = KVCache(KVLayout(N_LAYERS, N_HEADS, HEAD_DIM, 300, order=order))
    seq = cache.sequence()
    rows = make_rows(30, 0)
    append_rows(seq, rows)

    def write_past_all_checks():
        faulthandler.disable()
        ctypes.memset(seq._window.address, 0xFF, 16)

    assert in_child(write_past_all_checks) == -signal.SIGSEGV
    assert_rows(seq, rows)
    cache.close()


def test_a_child_closes_the_cache():
    cache = KVCache(KVLayout(N_LAYERS, N_HEADS, HEAD_DIM, 300))
    seq = cache.sequence()
    rows = make_rows(30, 0)
    append_rows(seq, rows)
    held_bytes = cache.stats().file_bytes
    assert in_child(cache.close) == 0
    assert_rows(seq, rows)
    assert cache.stats().file_bytes == held_bytes
    cache.check()
    cache.close()


@pytest.mark.parametrize("options", [{}, QUANTISED], ids=["float16", "quantised"])
def test_threads_on_sequences_of_their_own(duration_s, options):
    """One writer a sequence, many sequences: threads share the store and nothing else."""
    cache = KVCache(KVLayout(N_LAYERS, N_HEADS, HEAD_DIM, 300, order="block"), **options)
    prompt = cache.sequence()
    rows = make_rows(100, 0)
    append_rows(prompt, rows)
    stop, failures = threading.Event(), []
    threads = [
        threading.Thread(target=work, args=(prompt, seed, stop, failures)) for seed in range(4)
    ]
    with running(stop, *threads):
        end = time.monotonic() + duration_s
        while time.monotonic() < end and not failures:
            assert cache.stats().n_sequences >= 1
            assert_rows(prompt, rows)
            repr(cache)
    assert not failures, failures[0]
    assert cache.sequences == [prompt]
    cache.check()
    cache.trim()
    assert cache.stats().file_bytes == prompt.committed_bytes
    cache.close()
