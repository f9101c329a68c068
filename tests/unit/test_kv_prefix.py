"""The prefix index: what is found, kept, evicted, and never served to anybody else."""

import gc
import threading

import numpy as np
import pytest
from benches import import_bench
from prefixes import (
    BLOCK,
    N_LAYERS,
    ORDERS,
    assert_rows,
    compute,
    layout_of,
    n_cached,
    publish,
    rows_of,
)

from pagealloc.core.os_memory import huge_page_size_bytes, page_size_bytes
from pagealloc.errors import ClosedError, OutOfMemoryError
from pagealloc.kv import KVCache, KVLayout, PrefixEvent, Rope
from pagealloc.kv.prefix_hash import hash_key, token_bytes

import_bench()
from bench.prefix_simulator import PrefixSimulator  # noqa: E402

PAGE_BYTES = page_size_bytes()
HUGE_PAGES_OF_2_MIB = pytest.mark.skipif(
    huge_page_size_bytes() > 2 << 20, reason="the blocks of this test fill huge pages, of 2 MiB"
)


def published_paths(cache):
    """Published blocks of a token each, as tuples of tokens from the first on."""
    paths = set()
    for last in cache.prefixes._nodes.values():
        path, node = (), last
        while node.parent is not None:
            path = (int.from_bytes(node.tokens, "little"), *path)
            node = node.parent
        paths.add(path)
    return paths


@pytest.fixture(params=ORDERS)
def cache(request):
    with KVCache(layout_of(request.param), purge_after_s=0) as cache:
        yield cache
        cache.check()


class TestFinding:
    def test_the_longest_prefix_in_whole_blocks(self, cache):
        tokens = list(range(100, 119))
        assert publish(cache, tokens) == 16
        for n_tokens in range(len(tokens) + 1):
            with cache.sequence(tokens[:n_tokens]) as seq:
                assert len(seq) == seq.n_cached == min(n_tokens, 16) // BLOCK * BLOCK
                assert seq.positions.tolist() == list(range(seq.n_cached))
                assert_rows(seq, tokens[: seq.n_cached])
                cache.check()
        assert n_cached(cache, [*tokens[:9], 7, 7, 7, 7, 7]) == 8
        assert n_cached(cache, [7, *tokens]) == 0

    def test_prefixes_of_several_publishers(self, cache):
        """Each later prompt shares a part with an earlier one; rows come from all of them."""
        prompts = [[1] * 8 + [2] * 8, [1] * 8 + [2] * 4 + [3] * 12, [1] * 8 + [2] * 4 + [3] * 40]
        for prompt in prompts:
            publish(cache, prompt)
        for prompt in prompts:
            with cache.sequence(prompt) as seq:
                assert seq.n_cached == len(prompt)
                assert_rows(seq, prompt)
                seq.truncate(len(prompt) - 1)
                compute(seq, [*prompt[:-1], 9, 9])
                assert_rows(seq, [*prompt[:-1], 9, 9])
        for prompt in prompts:  # what was written then, was written to copies
            with cache.sequence(prompt) as seq:
                assert_rows(seq, prompt)

    def test_rows_computed_twice_are_published_once(self, cache):
        tokens = [5] * 24
        first, second = cache.sequence(tokens), cache.sequence(tokens[:8])
        compute(first, tokens)
        compute(second, tokens)
        assert first.publish() == 24
        assert second.publish(tokens) == 24
        assert cache.prefixes.stats().n_blocks == 6
        compute(second, [*tokens, *range(8)])
        assert second.publish([*tokens, *range(8)]) == 32
        first.close()
        second.close()
        with cache.sequence([*tokens, *range(8)]) as seq:
            assert_rows(seq, [*tokens, *range(8)])

    def test_memory_is_shared(self, cache):
        tokens = [3] * 48
        publish(cache, tokens)
        before_bytes = cache.stats().committed_bytes
        sequences = [cache.sequence(tokens) for _ in range(8)]
        stats = cache.stats()
        assert stats.committed_bytes == before_bytes
        assert stats.shared_bytes >= 8 * before_bytes
        assert stats.needed_bytes == 48 * cache.layout.token_bytes
        del sequences

    @pytest.mark.parametrize(
        "kind", [list, tuple, iter, np.asarray, lambda ids: np.asarray(ids, np.uint8)]
    )
    def test_kinds_of_token_ids(self, cache, kind):
        publish(cache, [1, 2, 3, 4])
        assert n_cached(cache, kind([1, 2, 3, 4, 5])) == 4

    @pytest.mark.parametrize(
        ("token_ids", "error", "words"),
        [
            (7, TypeError, "seq_id=7"),
            ([1.5, 2], TypeError, "float64"),
            ([[1, 2]], TypeError, "shape"),
            ("abc", TypeError, "U"),
            ([1, 2, -1], ValueError, r"token_ids\[2\]=-1"),
            ([2**31], ValueError, "2147483647"),
        ],
    )
    def test_what_are_no_token_ids(self, cache, token_ids, error, words):
        with pytest.raises(error, match=words):
            cache.sequence(token_ids)
        assert not cache.sequences

    def test_with_a_number(self, cache):
        publish(cache, [1] * 8)
        seq = cache.sequence([1] * 8, seq_id=3)
        assert cache.seq(3) is seq
        assert seq.n_cached == 8
        seq.close()

    def test_a_prompt_longer_than_a_window(self, cache):
        publish(cache, [1] * 64)
        assert n_cached(cache, [1] * 1000) == 64


class TestPublishing:
    def test_of_which_tokens(self, cache):
        seq = cache.sequence()
        compute(seq, [1] * 8)
        with pytest.raises(ValueError, match="token_ids="):
            seq.publish()
        assert seq.publish([1] * 7) == 4
        with pytest.raises(
            ValueError, match=r"token_ids\[6\]=2, but this row was made for token 1"
        ):
            seq.publish([1] * 6 + [2] * 2)
        assert seq.publish([1] * 8) == 8
        assert seq.publish() == 8
        seq.close()

    def test_nothing_to_publish(self, cache):
        with cache.sequence([1, 2, 3, 4]) as seq:
            assert seq.publish() == 0
            compute(seq, [1, 2, 3])
            assert seq.publish() == 0
        assert cache.prefixes.stats().n_blocks == 0

    @pytest.mark.parametrize(
        ("change", "left"),
        [
            (lambda seq: seq.truncate(9), 8),
            (lambda seq: seq.rm(9, 10), 8),
            (lambda seq: seq.rm(0, 1), 0),
            (lambda seq: seq.slide(4, 3), 0),
            (lambda seq: seq.add(9, -1, 3), 8),
            (lambda seq: seq.div(5, -1, 2), 4),
        ],
    )
    def test_rows_that_depend_on_others_are_not(self, change, left):
        """What was removed or moved leaves rows that no prompt would have."""
        with KVCache(layout_of(rope=Rope(64, base=50.0))) as cache:
            tokens = [4] * 20
            seq = cache.sequence(tokens)
            compute(seq, tokens)
            change(seq)
            n_kept = len(seq)
            compute(seq, tokens) if n_kept < 20 else None
            assert seq.publish() == left
            cache.check()
            seq.close()

    def test_positions_of_one_s_own(self, cache):
        with cache.sequence([1] * 12) as seq:
            for i, row in enumerate(rows_of([1] * 12)):
                seq.append_token(row, position=i if i < 6 else i + 1)
            assert seq.publish() == 4

    def test_copied_tokens_are_not_the_prompt_s(self, cache):
        source, target = cache.sequence([1] * 8), cache.sequence([2] * 16)
        compute(source, [1] * 8)
        compute(target, [2] * 5)
        source.cp(target, 5, 8)
        assert target.positions.tolist() == [*range(8)]
        assert target.publish() == 4
        source.close()
        target.close()

    def test_a_fork_knows_its_tokens(self, cache):
        tokens = [1] * 12
        seq = cache.sequence(tokens)
        compute(seq, tokens)
        fork = seq.fork(9)
        seq.close()
        assert fork.publish() == 8
        fork.close()
        assert n_cached(cache, tokens) == 8

    def test_an_array_over_the_rows(self, cache):
        with cache.sequence([1] * 8) as seq:
            compute(seq, [1] * 8)
            array = seq.k(0, 0, BLOCK)
            assert seq.publish() == 8
            np.testing.assert_array_equal(array, rows_of([1] * BLOCK)[:, 0, 0])
            del array

    def test_after_close(self, cache):
        seq = cache.sequence([1] * 8)
        seq.close()
        with pytest.raises(ClosedError):
            seq.publish()


class TestQuantised:
    @pytest.mark.parametrize("order", ORDERS)
    def test_packed_rows_are_published(self, order):
        layout = layout_of(order, max_tokens=64)
        tokens = [*range(40)]
        with KVCache(layout, quantize="recommended", residual_tokens=8) as cache:
            seq = cache.sequence(tokens)
            compute(seq, tokens)
            assert seq.n_cold == 32
            assert seq.publish() == 32
            expected = [seq.k(layer, 0, 32, dtype=np.float32) for layer in range(N_LAYERS)]
            seq.close()
            with cache.sequence(tokens) as again:
                assert again.n_cached == again.n_cold == len(again) == 32
                for layer in range(N_LAYERS):
                    read = again.k(layer, dtype=np.float32)
                    np.testing.assert_array_equal(read, expected[layer])
                compute(again, tokens)
                assert again.publish() == 32
                compute(again, [*tokens, *range(8)])
                assert again.publish([*tokens, *range(8)]) == 40
                cache.check()
            cache.check()


class TestOwners:
    def test_the_same_tokens_under_another_salt(self):
        layout = layout_of()
        keys = {
            hash_key("rows", model, salt)
            for model in (None, "", "a", b"b")
            for salt in (None, "", "a", b"b")
        }
        assert len(keys) == 16
        assert hash_key("rows", "a", "bc") != hash_key("rows", "ab", "c")
        with KVCache(layout, salt="a") as one, KVCache(layout, salt="b") as other:
            publish(one, [1] * 8)
            assert n_cached(other, [1] * 8) == 0
            assert one.prefixes._root.key != other.prefixes._root.key

    def test_a_collision_serves_nobody(self):
        """Two prompts of one hash: the second one is not found, and not published."""
        cache = KVCache(layout_of())
        index = cache.prefixes
        index._hash = lambda _: b"the same"
        assert publish(cache, [1] * 4) == 4
        assert n_cached(cache, [2] * 4) == 0
        assert publish(cache, [2] * 4) == 0
        assert n_cached(cache, [1] * 8) == 4
        assert index.stats().n_collisions == 4
        cache.close()

    def test_the_parent_is_compared_too(self, cache):
        index = cache.prefixes
        publish(cache, [1] * 4 + [9] * 4)
        publish(cache, [2] * 4)
        other = index._nodes[index._hash(index._root.key + token_bytes([2] * 4))]
        fake = index._hash(other.key + token_bytes([9] * 4))
        honest = index._hash(index._nodes[index._hash(index._root.key + token_bytes([1] * 4))].key
                             + token_bytes([9] * 4))  # fmt: skip
        index._nodes[fake] = index._nodes[honest]
        assert n_cached(cache, [2] * 4 + [9] * 4) == 4
        del index._nodes[fake]


class TestPins:
    def test_a_pinned_prompt_stays(self, cache):
        publish(cache, [1] * 8, pin=True)
        publish(cache, [1] * 8 + [2] * 8)
        publish(cache, [3] * 8)
        assert cache.prefixes.stats().n_pinned_blocks == 2
        assert cache.prefixes.clear() == 4
        assert n_cached(cache, [1] * 16) == 8
        assert cache.prefixes.unpin([1] * 16) == 1
        assert cache.prefixes.clear() == 2
        assert cache.stats().committed_bytes == 0

    def test_pin_later(self, cache):
        publish(cache, [1] * 16)
        assert cache.prefixes.pin([1] * 11) == 8
        cache.prefixes.clear()
        assert n_cached(cache, [1] * 16) == 8
        assert cache.prefixes.pin([5] * 8) == 0


class TestEviction:
    def test_what_a_sequence_has_stays(self, cache):
        publish(cache, [1] * 16)
        publish(cache, [1] * 8 + [2] * 8)
        seq = cache.sequence([1] * 12)
        assert cache.prefixes.clear() == 3
        assert n_cached(cache, [1] * 16) == 12
        fork = seq.fork(8)
        seq.close()
        assert cache.prefixes.clear() == 1
        fork.truncate(3)
        assert cache.prefixes.clear() == 1
        assert n_cached(cache, [1] * 16) == 4
        assert_rows(fork, [1] * 3)
        del fork
        gc.collect()
        assert cache.prefixes.clear() == 1
        assert cache.stats().committed_bytes == 0

    @pytest.mark.parametrize("order", ORDERS)
    def test_published_rows_give_way_to_new_ones(self, order):
        layout = layout_of(order)
        with KVCache(layout, budget_bytes=24 * PAGE_BYTES, purge_after_s=0) as cache:
            for prompt in range(30):
                assert publish(cache, [prompt] * 20) == 20
                cache.check()
            stats = cache.prefixes.stats()
            assert stats.n_evicted_blocks + stats.n_blocks == stats.n_stored_blocks == 150
            assert n_cached(cache, [29] * 20) == 20
            assert n_cached(cache, [0] * 20) == 0

    def test_the_sequence_that_asks_keeps_its_prefix(self):
        layout = layout_of()
        with KVCache(layout, budget_bytes=6 * layout.block_bytes, purge_after_s=0) as cache:
            publish(cache, [1] * 16)
            publish(cache, [2] * 8)
            seq = cache.sequence([1] * 16)
            compute(seq, [1] * 24)  # the other prompt goes
            assert_rows(seq, [1] * 24)
            with pytest.raises(OutOfMemoryError):
                compute(seq, [1] * 28)
            assert_rows(seq, [1] * 24)
            seq.close()

    @HUGE_PAGES_OF_2_MIB
    def test_ends_go_first_and_chunks_whole(self):
        """Of one branch a whole chunk goes at a time."""
        page_bytes = huge_page_size_bytes() >> 2
        layout = layout_of(page_bytes=page_bytes)
        assert layout.block_bytes == page_bytes
        with KVCache(layout) as cache:
            publish(cache, [1] * 4 * 11)  # 4 + 4 + 3 blocks
            left = []
            while cache.prefixes.evict():
                left.append(cache.prefixes.stats().n_blocks)
            assert left == [8, 4, 0]

    @HUGE_PAGES_OF_2_MIB
    @pytest.mark.parametrize("policy", ["lru", "lfu", "bytes"])
    @pytest.mark.parametrize("blocks_per_chunk", [1, 4])
    def test_as_the_plain_simulator(self, policy, blocks_per_chunk):
        """The same blocks after every step, for some hundred random steps."""
        page_bytes = huge_page_size_bytes() // blocks_per_chunk
        layout = KVLayout(1, 1, 8, 64, order="block", block_tokens=1, page_bytes=page_bytes)
        capacity = 40
        rng = np.random.default_rng(blocks_per_chunk)
        model = PrefixSimulator(capacity, policy, blocks_per_chunk)
        row = np.zeros((1, 2, 1, 8), np.float16)
        with KVCache(
            layout, backing="base", purge_after_s=0, prefix_eviction=policy,
            budget_bytes=capacity * page_bytes,
        ) as cache:  # fmt: skip
            for _ in range(500):
                path = tuple(int(token) for token in rng.zipf(2.5, rng.integers(1, 12)) % 5)
                seq = cache.sequence(path)
                n_found = model.find(path)
                assert seq.n_cached == n_found or policy == "bytes"
                assert model.compute(len(path) - n_found)
                for _ in range(len(path) - seq.n_cached):
                    seq.append_token(row)
                assert seq.publish() == len(path)
                model.publish(path, n_found)
                seq.close()
                model.close(path)
                if policy != "bytes":  # which looks at the oldest of each size only
                    assert published_paths(cache) == set(model.blocks)
            cache.check()
            stats = cache.prefixes.stats()
            assert stats.n_evicted_blocks > 250
            assert stats.n_hit_tokens == pytest.approx(model.n_hit, rel=0.02)

    def test_an_unknown_policy(self):
        with pytest.raises(ValueError, match="'lru'"):
            KVCache(layout_of(), prefix_eviction="fifo")


class TestEvents:
    def test_what_happens_is_told(self):
        events = []
        with KVCache(layout_of(), on_prefix_event=events.append) as cache:
            publish(cache, [1] * 12)
            n_cached(cache, [1] * 9)
            publish(cache, [1] * 8 + [2] * 8)
            cache.prefixes.clear()
        told = [(event.kind, event.first_token, event.n_tokens) for event in events]
        assert told[:4] == [("stored", 0, 12), ("hit", 0, 8), ("hit", 0, 8), ("stored", 8, 8)]
        assert {kind for kind, _, _ in told[4:]} == {"evicted"}
        assert sum(n_tokens for _, _, n_tokens in told[4:]) == 20
        assert all(isinstance(event, PrefixEvent) and len(event.key) == 16 for event in events)

    def test_what_it_raises_comes_out(self):
        def refuse(event):
            raise KeyError(event.kind)

        with KVCache(layout_of(), on_prefix_event=refuse) as cache:
            seq = cache.sequence([1] * 4)
            compute(seq, [1] * 4)
            with pytest.raises(KeyError, match="stored"):
                seq.publish()
            assert cache.prefixes.stats().n_blocks == 1
            cache.check()
            seq.close()

    def test_nothing_that_can_be_called(self):
        with pytest.raises(TypeError, match="on_prefix_event"):
            KVCache(layout_of(), on_prefix_event=3)

    def test_it_may_use_the_cache(self):
        with KVCache(layout_of(), on_prefix_event=lambda _: cache.prefixes.stats()) as cache:
            publish(cache, [1] * 8)
            assert n_cached(cache, [1] * 8) == 8


class TestStats:
    def test_numbers(self, cache):
        publish(cache, [1] * 10)
        n_cached(cache, [1] * 10)
        n_cached(cache, [2] * 10)
        stats = cache.prefixes.stats()
        assert (stats.n_blocks, stats.n_tokens, stats.n_stored_blocks) == (2, 8, 2)
        assert stats.nbytes == 8 * cache.layout.token_bytes
        assert (stats.n_lookups, stats.n_hits) == (3, 1)
        assert (stats.n_asked_tokens, stats.n_hit_tokens) == (30, 8)
        assert stats.hit_rate == 8 / 30
        assert cache.stats().needed_bytes == 8 * cache.layout.token_bytes


def test_close_gives_everything_back():
    cache = KVCache(layout_of())
    publish(cache, [1] * 16, pin=True)
    seq = cache.sequence([1] * 16)
    cache.close()
    assert seq.closed
    cache.close()


def test_threads_publish_and_find():
    """Four threads under a budget: rows are always those of the prompt."""
    layout = layout_of()
    failures = []
    with KVCache(layout, budget_bytes=60 * layout.block_bytes, purge_after_s=0) as cache:

        def work(seed):
            rng = np.random.default_rng(seed)
            try:
                for _ in range(60):
                    tokens = [int(token) for token in rng.integers(0, 3, 5).repeat(BLOCK)]
                    with cache.sequence(tokens) as seq:
                        compute(seq, tokens)
                        assert_rows(seq, tokens)
                        seq.publish(pin=bool(rng.integers(50) == 0))
                    cache.prefixes.unpin(tokens)
            except BaseException as error:
                failures.append(error)
                raise

        threads = [threading.Thread(target=work, args=[seed]) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        cache.check()
        stats = cache.prefixes.stats()
        assert stats.n_hits > 50
        assert stats.n_evicted_blocks > 50
