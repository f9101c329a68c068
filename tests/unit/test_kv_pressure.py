"""Warm windows, and what a cache gives up when its memory runs short."""

import gc
import os
import resource
import time

import numpy as np
import pytest

from pagealloc import page_size_bytes
from pagealloc.core.os_memory import call_counts, refusing
from pagealloc.errors import ClosedError, OutOfMemoryError
from pagealloc.kv import KVCache, KVLayout

ORDERS = ("interleaved", "split", "block")
N_LAYERS, N_HEADS, HEAD_DIM = 2, 2, 64
SCALE = page_size_bytes() // 4096
N_TOKENS = 128 * SCALE
NEVER = float("inf")


def make_layout(order="block"):
    return KVLayout(N_LAYERS, N_HEADS, HEAD_DIM, 4 * N_TOKENS, order=order)


def make_rows(n_tokens, seed=0):
    shape = (n_tokens, N_LAYERS, 2, N_HEADS, HEAD_DIM)
    return np.random.default_rng(seed).normal(size=shape).astype(np.float16)


def fill(seq, rows):
    for layer in range(N_LAYERS):
        seq.append(layer, rows[:, layer, 0], rows[:, layer, 1])


def read_k(seq, layer=0):
    return seq.k(layer, on_cross="copy")


@pytest.fixture(params=ORDERS)
def order(request):
    return request.param


def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


class TestWarmWindows:
    def test_the_next_sequence_finds_its_pages_there(self, order):
        rows, other = make_rows(N_TOKENS), make_rows(N_TOKENS, 1)
        with KVCache(make_layout(order), purge_after_s=NEVER) as cache:
            seq = cache.sequence()
            fill(seq, rows)
            address, committed = seq._window.address, seq.committed_bytes
            seq.close()
            assert cache.stats().warm_bytes == cache.stats().committed_bytes == committed
            again = cache.sequence()
            assert again._window.address == address
            assert len(again) == 0
            assert again.k(0).shape == (0, N_HEADS, HEAD_DIM)
            assert cache.stats().warm_bytes == 0
            cache.check()
            fill(again, other)
            assert cache.stats().committed_bytes == committed
            np.testing.assert_array_equal(read_k(again), other[:, 0, 0])
            cache.check()

    @pytest.mark.skipif(
        "PAGEALLOC_SANITIZE" in os.environ, reason="a sanitizer's own memory takes faults"
    )
    def test_it_costs_no_fault_and_no_call_of_the_kernel(self, order):
        rows = make_rows(N_TOKENS)
        with KVCache(make_layout(order), purge_after_s=NEVER) as cache:
            for _ in range(3):  # warm the code as well
                seq = cache.sequence()
                fill(seq, rows)
                seq.close()
            gc.collect()
            gc.disable()
            try:
                n_faults, n_calls = [], []
                for _ in range(5):  # meanwhile another allocator's idle pages may go back
                    calls_before = sum(call_counts().values())
                    seq = cache.sequence()
                    before = faults()
                    for token in rows:
                        seq.append_token(token)
                    n_faults.append(faults() - before)
                    n_calls.append(sum(call_counts().values()) - calls_before)
                    seq.close()
            finally:
                gc.enable()
            assert (min(n_faults), min(n_calls)) == (0, 0)

    def test_a_fork_shares_the_prefix_and_keeps_the_rest_warm(self, order):
        unit = make_layout(order).remap_tokens
        with KVCache(make_layout(order), purge_after_s=NEVER) as cache:
            prompt, rows = cache.sequence(), make_rows(2 * unit)
            fill(prompt, rows)
            child = prompt.fork()
            fill(child, make_rows(unit, 1))
            child.close()
            warm = cache.stats().warm_bytes
            unit_bytes = cache.layout.block_bytes or unit * cache.layout.token_bytes
            assert 0 < warm <= 1.6 * unit_bytes
            before = cache.stats().committed_bytes
            child = prompt.fork()
            more = make_rows(unit, 2)
            fill(child, more)
            np.testing.assert_array_equal(read_k(child), np.concatenate([rows, more])[:, 0, 0])
            np.testing.assert_array_equal(read_k(prompt), rows[:, 0, 0])
            assert cache.stats().committed_bytes == before
            cache.check()

    def test_they_go_by_themselves(self):
        with KVCache(make_layout(), purge_after_s=0.05) as cache:
            seq = cache.sequence()
            fill(seq, make_rows(N_TOKENS))
            seq.close()
            assert cache.stats().warm_bytes > 0
            deadline = time.monotonic() + 20
            while cache.stats().file_bytes and time.monotonic() < deadline:
                time.sleep(0.01)
            assert cache.stats().file_bytes == 0

    def test_none_are_kept_if_asked(self):
        with KVCache(make_layout(), purge_after_s=0) as cache:
            seq = cache.sequence()
            fill(seq, make_rows(N_TOKENS))
            seq.close()
            assert cache.stats().file_bytes == 0

    def test_trim_says_what_went(self):
        with KVCache(make_layout(), purge_after_s=NEVER) as cache:
            seq = cache.sequence()
            fill(seq, make_rows(N_TOKENS))
            committed = seq.committed_bytes
            seq.close()
            assert cache.trim() == committed
            assert cache.trim() == 0

    def test_a_closed_sequence_is_closed(self):
        with KVCache(make_layout("interleaved"), purge_after_s=NEVER) as cache:
            seq = cache.sequence()
            fill(seq, make_rows(N_TOKENS))
            seq.close()
            seq.close()
            heir = cache.sequence()
            fill(heir, make_rows(9))
            assert seq.closed
            assert len(seq) == 0
            for call in (
                lambda: seq.k(0),
                lambda: seq.append_token(make_rows(1)[0]),
                lambda: seq.read_word(0),
                seq.fork,
                lambda: seq.truncate(0),
                lambda: seq.rm(0, 1),
            ):
                with pytest.raises(ClosedError, match="is closed"):
                    call()
            assert repr(seq) == "<Sequence closed>"
            seq.close()
            assert len(heir) == 9

    def test_a_live_array_keeps_a_sequence_open(self):
        with KVCache(make_layout("interleaved"), purge_after_s=NEVER) as cache:
            seq, rows = cache.sequence(), make_rows(N_TOKENS)
            fill(seq, rows)
            array = seq.k(0)
            with pytest.raises(BufferError, match="still alive"):
                seq.close()
            assert not seq.closed
            np.testing.assert_array_equal(seq.k(0), array)
            del array

    @pytest.mark.parametrize("call", ["mmap", "munmap", "fallocate", "madvise"])
    def test_refusals(self, order, call):
        with KVCache(make_layout(order), purge_after_s=NEVER) as cache:
            seq = cache.sequence()
            fill(seq, make_rows(N_TOKENS))
            child = seq.fork()
            fill(child, make_rows(N_TOKENS, 1))
            with refusing(call):
                for closing in (child, seq):
                    try:
                        closing.close()
                    except (OutOfMemoryError, OSError):
                        assert not closing.closed
                try:
                    fresh = cache.sequence()
                    fill(fresh, make_rows(N_TOKENS, 2))
                except (OutOfMemoryError, OSError):
                    pass
            cache.check()
            for left in cache.sequences:
                left.close()
            cache.trim()
            assert cache.stats().file_bytes == 0

    def test_the_child_of_a_fork_reuses_none(self):
        with KVCache(make_layout(), purge_after_s=NEVER) as cache:
            seq, warm = cache.sequence(), cache.sequence()
            fill(warm, make_rows(N_TOKENS, 1))
            fill(seq, make_rows(N_TOKENS))
            warm.close()
            pid = os.fork()
            if pid == 0:
                seq.close()
                os._exit(0 if len(cache._warm) == 1 else 1)
            assert os.waitpid(pid, 0)[1] == 0
            assert len(read_k(seq)) == N_TOKENS
            cache.check()

    @pytest.mark.parametrize("purge_after_s", [-1, float("nan")])
    def test_bad_times(self, purge_after_s):
        with pytest.raises(ValueError, match="purge_after_s"):
            KVCache(make_layout(), purge_after_s=purge_after_s)


class TestPressure:
    def make_cache(self, n_full, **options):
        """A cache with room for so many sequences of N_TOKENS."""
        layout = make_layout()
        n_bytes = layout.n_blocks(N_TOKENS) * layout.block_bytes
        return KVCache(layout, budget_bytes=n_full * n_bytes, **options)

    def filled(self, cache, **options):
        seq = cache.sequence(**options)
        fill(seq, make_rows(N_TOKENS))
        return seq

    def test_warm_windows_go_first(self):
        with self.make_cache(2, purge_after_s=NEVER) as cache:
            keep = self.filled(cache, evictable=True)
            self.filled(cache).close()
            fork = keep.fork()
            fill(fork, make_rows(N_TOKENS))
            assert not keep.closed
            assert cache.stats().committed_bytes == cache.stats().budget_bytes

    def test_evictable_sequences_go_by_age_of_use(self):
        with self.make_cache(4, purge_after_s=0) as cache:
            old, used, pinned = (self.filled(cache, evictable=True) for _ in range(3))
            pinned.evictable = False
            old_rows = read_k(old)
            used.fork().close()
            kept = [self.filled(cache)]
            newest = self.filled(cache)
            assert old.closed
            assert not used.closed
            with pytest.raises(ClosedError, match="evicted this sequence to make room"):
                old.k_blocks(0)
            kept.append(self.filled(cache))
            assert used.closed
            assert not pinned.closed
            assert not newest.closed
            assert len(old_rows) == N_TOKENS

    def test_an_array_keeps_a_sequence(self):
        with self.make_cache(2, purge_after_s=0) as cache:
            held, free = (self.filled(cache, evictable=True) for _ in range(2))
            array = held.k_blocks(0)
            kept = self.filled(cache)
            assert free.closed
            assert not kept.closed
            assert not held.closed
            del array

    def test_the_sequence_appended_to_stays_whole(self):
        with self.make_cache(2, purge_after_s=0) as cache:
            rows = make_rows(N_TOKENS)
            seq, other = (self.filled(cache, evictable=True) for _ in range(2))
            fill(seq, rows[: N_TOKENS // 2])
            assert other.closed
            with pytest.raises(OutOfMemoryError, match="budget"):
                fill(seq, np.concatenate([rows] * 2))
            seq.rollback()
            expected = np.concatenate([rows, rows[: N_TOKENS // 2]])[:, 0, 0]
            np.testing.assert_array_equal(read_k(seq), expected)
            cache.check()

    def test_the_watermark_is_told_once_until_below(self):
        told = []
        with self.make_cache(
            10, high_watermark=0.45, on_pressure=told.append, purge_after_s=0
        ) as cache:
            sequences = [self.filled(cache) for _ in range(4)]
            assert told == []
            sequences += [self.filled(cache) for _ in range(3)]
            assert told == [cache]
            for seq in sequences[:4]:
                seq.close()
            kept = [self.filled(cache)]
            assert told == [cache]
            kept += [self.filled(cache) for _ in range(3)]
            assert told == [cache, cache]
            del kept

    def test_the_callback_may_close_what_it_likes(self):
        def close_oldest(cache):
            calls.append(cache.stats().committed_bytes)
            cache.sequences[0].close()

        calls = []
        with self.make_cache(
            2, high_watermark=1.0, on_pressure=close_oldest, purge_after_s=0
        ) as cache:
            kept = [self.filled(cache) for _ in range(5)]
            assert [seq.closed for seq in kept] == [True] * 3 + [False] * 2
            assert len(calls) == 3

    def test_a_callback_that_does_nothing_ends_in_the_error(self):
        calls = []
        with self.make_cache(1, high_watermark=1.0, on_pressure=calls.append) as cache:
            keep = self.filled(cache)
            with pytest.raises(OutOfMemoryError):
                self.filled(cache)
            assert len(calls) == 1
            assert len(keep) == N_TOKENS

    def test_a_callback_that_cuts_what_is_appended_to(self):
        with self.make_cache(
            1, high_watermark=0.5, on_pressure=lambda cache: cache.sequences[0].truncate(3)
        ) as cache:
            seq, rows = cache.sequence(), make_rows(N_TOKENS)
            n_tokens = cache.layout.block_tokens * (cache.layout.n_blocks(N_TOKENS) // 2)
            for token in rows[:n_tokens]:
                seq.append_token(token)
            with pytest.raises(ValueError, match="changed the sequence"):
                seq.append_token(rows[n_tokens])
            assert len(seq) == 3
            np.testing.assert_array_equal(read_k(seq), rows[:3, 0, 0])
            cache.check()

    def test_what_the_callback_raises_comes_out(self):
        def refuse(cache):
            raise RuntimeError("no")

        with self.make_cache(1, high_watermark=0.1, on_pressure=refuse) as cache:
            seq = cache.sequence()
            with pytest.raises(RuntimeError, match="no"):
                fill(seq, make_rows(N_TOKENS))
            assert seq.layer_lengths == (0,) * N_LAYERS
            cache.check()

    @pytest.mark.parametrize(
        ("options", "error"),
        [
            ({"high_watermark": 0}, ValueError),
            ({"high_watermark": 1.1}, ValueError),
            ({"on_pressure": 3}, TypeError),
        ],
    )
    def test_bad_options(self, options, error):
        with pytest.raises(error, match=next(iter(options))):
            KVCache(make_layout(), **options)
