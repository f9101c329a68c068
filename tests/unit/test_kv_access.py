"""What an access gets that crosses into a page of another run; single words; tokens in pairs."""

import threading

import numpy as np
import pytest
from stress import running, switching_often

from pagealloc import page_size_bytes
from pagealloc.errors import ClosedError, PageBoundaryError
from pagealloc.kv import KVCache, KVLayout

ORDERS = ("interleaved", "split", "block")
PAGE = page_size_bytes()
N_TOKENS = 3 * PAGE // 128  # K rows of some pages


def make_layout(order, **options):
    return KVLayout(2, 2, 32, 2 * N_TOKENS, order=order, **options)


def make_rows(n_tokens, seed=0):
    return np.random.default_rng(seed).normal(size=(n_tokens, 2, 2, 2, 32)).astype(np.float16)


def fill(seq, rows):
    for layer in range(2):
        seq.append(layer, rows[:, layer, 0], rows[:, layer, 1])


@pytest.fixture(params=ORDERS)
def order(request):
    return request.param


@pytest.fixture
def family(order):
    """A sequence, a fork of it that wrote on, and all rows of the fork."""
    with KVCache(make_layout(order)) as cache:
        seq, rows = cache.sequence(), make_rows(2 * N_TOKENS)
        fill(seq, rows[:N_TOKENS])
        child = seq.fork()
        fill(child, rows[N_TOKENS:])
        yield seq, child, rows


class TestCrossing:
    def test_a_copy_where_runs_meet(self, family):
        _, child, rows = family
        for read, kv in ((child.k, 0), (child.v, 1)):
            array = read(1, on_cross="copy")
            np.testing.assert_array_equal(array, rows[:, 1, kv])
            assert array.shape == (2 * N_TOKENS, 2, 32)
            assert not array.flags.writeable
            assert array.flags.c_contiguous
            assert child._window.n_views == 0

    def test_a_copy_is_of_that_moment(self, family):
        _, child, rows = family
        array = child.k(0, on_cross="copy")
        child.truncate(10)
        fill(child, rows[:20])
        np.testing.assert_array_equal(array, rows[:, 0, 0])

    def test_no_copy_within_one_run(self, family):
        seq, child, rows = family
        array = child.k(1, 3, 7, on_cross="copy")
        np.testing.assert_array_equal(array, rows[3:7, 1, 0])
        assert child._window.n_views == 1
        np.testing.assert_array_equal(child.k(1, 3, 7, on_cross="raise"), array)
        np.testing.assert_array_equal(child.k(1, 3, 7), array)
        np.testing.assert_array_equal(seq.k(1, 3, 7), array)

    def test_a_view_where_the_window_is_contiguous(self, family, order):
        _, child, rows = family
        if order == "block":
            with pytest.raises(ValueError, match=r"one token axis.*on_cross='copy'"):
                child.k(1)
        else:
            array = child.k(1)
            np.testing.assert_array_equal(array, rows[:, 1, 0])
            assert child._window.n_views == 1

    def test_an_error_where_runs_meet(self, family, order):
        seq, child, _ = family
        if order == "block":
            with pytest.raises(ValueError, match="several KV blocks"):
                child.k(1, on_cross="raise")
            return
        with pytest.raises(PageBoundaryError, match=r"layer 1, tokens 0 to .*another run.*end \d+"):
            child.k(1, on_cross="raise")
        seq.k(1, on_cross="raise")

    def test_other_words_are_refused(self, family):
        with pytest.raises(ValueError, match="on_cross='wrap'"):
            family[1].k(0, on_cross="wrap")

    def test_copies_use_their_memory_again(self, family):
        """A pooled Buffer: what one copy let go of serves the next."""
        _, child, _ = family
        addresses = {child.k(0, on_cross="copy").ctypes.data for _ in range(20)}
        assert len(addresses) <= 2

    def test_copies_while_the_writer_cuts(self, family):
        """While one is made it pins its rows, as an array does: the writer waits its turn."""
        _, child, rows = family
        stop, cuts = threading.Event(), []

        def write():
            while not stop.is_set():
                try:
                    child.truncate(N_TOKENS)
                except BufferError:
                    continue
                cuts.append(len(child))
                fill(child, rows[N_TOKENS:])

        with switching_often(), running(stop, threading.Thread(target=write)):
            for _ in range(200):
                array = child.k(1, on_cross="copy")
                np.testing.assert_array_equal(array, rows[: len(array), 1, 0])
        assert cuts
        child.check()


class TestWords:
    def test_a_word_is_eight_bytes_of_the_rows(self, family):
        seq, child, rows = family
        offset = seq.cache.layout.offset(1, 5, 1)
        expected = int(rows[5, 1, 1].view(np.uint64).ravel()[0])
        assert seq.read_word(offset) == child.read_word(offset) == expected

    def test_writing_makes_the_page_private(self, family):
        seq, child, rows = family
        offset = seq.cache.layout.offset(1, 5, 1)
        before = seq.read_word(offset)
        child.write_word(offset, 2**64 - 1)
        assert child.read_word(offset) == 2**64 - 1
        assert seq.read_word(offset) == before
        np.testing.assert_array_equal(child.v(1, 6, 8, on_cross="copy"), rows[6:8, 1, 1])
        child.cache.check()

    @pytest.mark.parametrize("offset", [-8, 1, 4, PAGE - 4, PAGE - 1, 1 << 62, 10**30])
    def test_only_aligned_and_inside_the_window(self, family, offset):
        for access in (family[0].read_word, lambda at: family[0].write_word(at, 0)):
            with pytest.raises(PageBoundaryError, match="multiple of 8"):
                access(offset)

    def test_only_in_committed_pages(self, family):
        seq, _, _ = family
        held = seq.cache.stats().file_bytes
        with pytest.raises(PageBoundaryError, match="not committed"):
            seq.read_word(seq.cache.layout.window_bytes // PAGE * PAGE - PAGE)
        assert seq.cache.stats().file_bytes == held

    @pytest.mark.parametrize("value", [-1, 2**64])
    def test_a_word_has_64_bits(self, family, value):
        with pytest.raises(OverflowError):
            family[0].write_word(0, value)

    def test_not_once_closed(self, family):
        seq = family[0].cache.sequence()
        seq.close()
        for access in (lambda: seq.read_word(0), lambda: seq.write_word(0, 1)):
            with pytest.raises(ClosedError):
                access()

    def test_no_reader_sees_half_a_word(self, family):
        seq, _, _ = family
        words = [0x0101010101010101 * i for i in range(8)]
        seq.write_word(0, words[0])
        stop = threading.Event()

        def write():
            while not stop.is_set():
                for word in words:
                    seq.write_word(0, word)

        with running(stop, threading.Thread(target=write)):
            seen = {seq.read_word(0) for _ in range(20000)}
        assert seen <= set(words)


class TestTokensInPairs:
    @pytest.fixture
    def layout(self, order):
        return KVLayout(
            3, (4, 1, 2), (16, 32, 8), 100, v_head_dim=8, k_dtype="float32", order=order,
            pad_rows=True,
        )  # fmt: skip

    def make_token(self, layout, seed):
        rng = np.random.default_rng(seed)
        return [
            tuple(
                rng.normal(size=layout.row_shape(layer, kv)).astype(layout.storage_dtypes[kv])
                for kv in (0, 1)
            )
            for layer in range(layout.n_layers)
        ]

    def test_tokens_and_rows_agree(self, layout):
        with KVCache(layout) as cache:
            seq = cache.sequence()
            tokens = [self.make_token(layout, seed) for seed in range(40)]
            for token in tokens[:30]:
                seq.append_token(token)
            for layer in range(3):
                k, v = (np.stack([token[layer][kv] for token in tokens[30:]]) for kv in (0, 1))
                seq.append(layer, k, v)
            seq.rm(5, 21)
            kept = tokens[:5] + tokens[21:]
            for layer in range(3):
                for read, kv in ((seq.k, 0), (seq.v, 1)):
                    expected = np.stack([token[layer][kv] for token in kept])
                    np.testing.assert_array_equal(read(layer, on_cross="copy"), expected)
            assert cache.stats().needed_bytes == 24 * layout.token_bytes
            cache.check()

    def test_what_does_not_fit(self, layout):
        with KVCache(layout) as cache:
            seq, token = cache.sequence(), self.make_token(layout, 0)
            with pytest.raises(ValueError, match="3 pairs"):
                seq.append_token(token[:2])
            with pytest.raises(ValueError, match="3 pairs"):
                seq.append_token([(k, v, v) for k, v in token])
            wrong = [token[0], (token[1][0], token[1][1][:, :4]), token[2]]
            with pytest.raises(ValueError, match=r"v of layer 1 has shape \(1, 4\), expected"):
                seq.append_token(wrong)
            wrong = [token[0], token[1], (token[2][0].astype(np.float16), token[2][1])]
            with pytest.raises(TypeError, match="k of layer 2 has dtype float16"):
                seq.append_token(wrong)
            assert len(seq) == 0
            assert cache.stats().file_bytes == 0
