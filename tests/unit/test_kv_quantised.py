"""Quantised sequences: what is packed when, what it reads back as, and what must be refused."""

import numpy as np
import pytest
from quant_model import assert_recommended, read_back, recommended

from pagealloc.core.os_memory import page_size_bytes
from pagealloc.errors import OutOfMemoryError, PageBoundaryError
from pagealloc.kv import KVCache, KVLayout, Rope, quant

N_LAYERS, N_HEADS, HEAD_DIM = 2, 3, 64
ORDERS = ["interleaved", "split", "block"]


def layout_of(order="interleaved", max_tokens=400, **options):
    return KVLayout(N_LAYERS, N_HEADS, HEAD_DIM, max_tokens, order=order, **options)


def make_rows(n_tokens, seed=0, dtype=np.float16):
    """Random rows (T, L, 2, H, D)."""
    shape = (n_tokens, N_LAYERS, 2, N_HEADS, HEAD_DIM)
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def append_rows(seq, rows):
    for layer in range(N_LAYERS):
        seq.append(layer, rows[:, layer, 0], rows[:, layer, 1])


def assert_all(seq, rows):
    for layer in range(N_LAYERS):
        for kv in (0, 1):
            assert_recommended(seq, layer, kv, rows[:, layer, kv])


@pytest.fixture(params=ORDERS)
def cache(request):
    with KVCache(layout_of(request.param), quantize="recommended") as cache:
        yield cache


class TestWhatIsPacked:
    def test_the_newest_rows_stay_as_they_came(self, cache):
        rows, seq = make_rows(400), cache.sequence()
        for number, row in enumerate(rows, 1):
            seq.append_token(row)
            assert seq.n_cold == max(0, number - 128) // 16 * 16
            assert 0 <= len(seq) - seq.n_cold < 128 + 16
        recent = seq.k(1, seq.n_cold, dtype=np.float16)
        np.testing.assert_array_equal(recent, rows[seq.n_cold :, 1, 0])
        assert_all(seq, rows)

    @pytest.mark.parametrize("n_removed", range(1, 16))
    def test_after_rows_were_removed_the_next_append_packs(self, cache, n_removed):
        rows, seq = make_rows(400), cache.sequence()
        append_rows(seq, rows[:287])
        assert seq.n_cold == 144
        seq.rm(0, n_removed)
        cache.check()
        append_rows(seq, rows[:0])  # packs nothing: pages may be gone
        cache.check()
        assert seq.n_cold == 144 - n_removed
        append_rows(seq, rows[287:288])
        cache.check()
        assert seq.n_cold == 144
        recent = seq.k(1, 144, dtype=np.float16)
        np.testing.assert_array_equal(recent, rows[144 + n_removed : 288, 1, 0])

    @pytest.mark.parametrize("pieces", [(400,), (127, 1, 1, 271), (16,) * 25, (200, 3, 197)])
    def test_the_bytes_do_not_depend_on_how_rows_came(self, cache, pieces):
        rows, one_by_one, seq = make_rows(400), cache.sequence(), cache.sequence()
        for row in rows:
            one_by_one.append_token(row)
        start = 0
        for n_tokens in pieces:
            append_rows(seq, rows[start : start + n_tokens])
            start += n_tokens
        assert seq.n_cold == one_by_one.n_cold
        for layer in range(N_LAYERS):
            for ours, theirs in zip(seq.rows(layer), one_by_one.rows(layer), strict=True):
                np.testing.assert_array_equal(ours, theirs)

    def test_packed_rows_are_those_of_quantize(self, cache):
        rows, seq = make_rows(400), cache.sequence()
        append_rows(seq, rows)
        for layer in range(N_LAYERS):
            k, v = (array.reshape(-1, array.shape[-1]) for array in seq.rows(layer))
            old = rows[: seq.n_cold, layer]
            np.testing.assert_array_equal(k[: seq.n_cold], quant.quantize(old[:, 0], "q8_0"))
            packed_v = quant.quantize(old[:, 1], "q4_0", rotate=True)
            np.testing.assert_array_equal(v[: seq.n_cold], packed_v)

    @pytest.mark.parametrize("order", ORDERS)
    def test_every_row_at_once_without_residual_tokens(self, order):
        with KVCache(layout_of(order), quantize="recommended", residual_tokens=0) as cache:
            rows, seq = make_rows(50), cache.sequence()
            for number, row in enumerate(rows, 1):
                seq.append_token(row)
                assert seq.n_cold == number
            assert_all(seq, rows)

    def test_rows_that_are_no_numbers_read_as_none(self):
        rows = make_rows(20)
        rows[3, 1, 0, 2, 40] = np.inf
        with KVCache(layout_of(), k_type="q8_0", residual_tokens=0) as cache:
            seq = cache.sequence()
            append_rows(seq, rows)
            found = seq.k(1)
            assert np.isnan(found[3, 2, 32:]).all()
            assert np.isnan(found).sum() == 32

    def test_one_kind_of_rows_alone(self):
        rows = make_rows(40)
        with KVCache(layout_of(), v_type="q8_0", residual_tokens=0) as cache:
            seq = cache.sequence()
            append_rows(seq, rows)
            np.testing.assert_array_equal(seq.k(0, dtype=np.float16), rows[:, 0, 0])
            np.testing.assert_array_equal(seq.v(0), read_back(rows[:, 0, 1], "q8_0"))
            k, v = seq.rows(0)
            assert (k.dtype, k.shape) == (np.float16, (40, N_HEADS, HEAD_DIM))
            assert (v.dtype, v.shape) == (np.uint8, (40, 6 * 34))
            del k, v

    @pytest.mark.parametrize("head_dim", [32, 80, 96, 576])
    def test_heads_of_any_length(self, head_dim):
        layout = KVLayout(1, 2, head_dim, 64)
        rows = np.random.default_rng(0).normal(size=(2, 40, 2, head_dim)).astype(np.float16)
        with KVCache(layout, quantize="recommended", residual_tokens=0) as cache:
            seq = cache.sequence()
            seq.append(0, *rows)
            for kv in (0, 1):
                assert_recommended(seq, 0, kv, rows[kv])


class TestReading:
    @pytest.mark.parametrize("dtype", [np.float32, np.float16])
    @pytest.mark.parametrize("span", [(0, 400), (5, 300), (250, 290), (271, 273), (390, 400)])
    def test_a_part_as_any_type(self, cache, span, dtype):
        rows, seq = make_rows(400), cache.sequence()
        append_rows(seq, rows)
        start, end = span
        out = np.full((end - start, N_HEADS, HEAD_DIM), 7, dtype)
        for kv, read in enumerate((seq.k, seq.v)):
            expected = recommended(rows[:, 1, kv], kv, seq.n_cold)[start:end].astype(dtype)
            np.testing.assert_array_equal(read(1, start, end, dtype=dtype), expected)
            assert read(1, start, end, out=out) is out
            np.testing.assert_array_equal(out, expected)

    def test_rows_of_other_types(self):
        values = make_rows(30, dtype=np.float32)
        for dtype in ("float32", "bfloat16"):
            rows = values
            if dtype == "bfloat16":
                rows = (values.view(np.uint32) >> 16).astype(np.uint16)
                values = (rows.astype(np.uint32) << 16).view(np.float32)
            layout = layout_of(dtype=dtype)
            with KVCache(layout, quantize="recommended", residual_tokens=16) as cache:
                seq = cache.sequence()
                append_rows(seq, rows)
                assert_recommended(seq, 1, 1, values[:, 1, 1])

    def test_packed_rows_are_no_copy(self, cache):
        rows, seq = make_rows(200), cache.sequence()
        append_rows(seq, rows)
        k, _ = seq.rows(0)
        window = seq._cold._window
        assert window.address <= k.ctypes.data < window.address + window.nbytes
        with pytest.raises(ValueError, match="read-only"):
            k[0] = 0
        with pytest.raises(BufferError, match="live array"):
            seq.truncate(10)
        seq.truncate(seq.n_cold)
        with pytest.raises(BufferError):
            seq.close()

    def test_gather_converts(self, cache):
        rows, two = make_rows(300), [cache.sequence(), cache.sequence()]
        append_rows(two[0], rows)
        append_rows(two[1], rows[:7])
        expected = np.concatenate(
            [
                recommended(rows[:n, 0, 1], 1, seq.n_cold)
                for seq, n in zip(two, (300, 7), strict=True)
            ]
        )
        np.testing.assert_array_equal(cache.gather(two, 0, "v"), expected)

    def test_what_cannot_be_read(self, cache):
        seq = cache.sequence()
        append_rows(seq, make_rows(10))
        with pytest.raises(ValueError, match=r"k_blocks\(\).* use k\(layer\).* or rows\(layer\)"):
            seq.k_blocks(0)
        with pytest.raises(TypeError, match="float32 and float16 are possible"):
            seq.k(0, dtype=np.float64)
        with pytest.raises(ValueError, match=r"shape \(10, 3, 64\)"):
            seq.k(0, out=np.empty((9, 3, 64), np.float32))
        with pytest.raises(PageBoundaryError):
            seq.v(0, 0, 11)
        with pytest.raises(PageBoundaryError):
            seq.rows(2)


class TestErrorStats:
    def test_they_tell_what_packing_cost(self, cache):
        rows, seq = make_rows(400), cache.sequence()
        append_rows(seq, rows)
        stats = seq.error_stats()
        sampled = rows[: seq.n_cold : 64].astype(np.float32)  # (S, L, 2, H, D)
        assert stats.n_values == sampled.size
        for kv, relative, largest in (
            (0, stats.k_relative, stats.k_largest),
            (1, stats.v_relative, stats.v_largest),
        ):
            for layer in range(N_LAYERS):
                given = sampled[:, layer, kv]
                error = recommended(given, kv, len(given)) - given
                expected = np.sqrt((error**2).sum() / (given**2).sum())
                assert relative[layer] == pytest.approx(expected, rel=1e-5)
                assert largest[layer] == pytest.approx(np.abs(error).max(), rel=1e-5)
        assert 0.003 < stats.k_relative.max() < 0.01 < stats.v_relative.max() < 0.12
        assert "K 0." in repr(stats)

    def test_before_anything_is_packed(self, cache):
        stats = cache.sequence().error_stats()
        assert stats.n_values == 0
        assert np.isnan(stats.k_relative).all()
        assert "not sampled" in repr(stats)

    def test_a_float16_cache_has_none(self):
        with KVCache(layout_of()) as cache:
            seq = cache.sequence()
            with pytest.raises(ValueError, match="without an error"):
                seq.error_stats()
            with pytest.raises(ValueError, match="stored as they came"):
                seq.rows(0)


class TestSharing:
    def test_a_fork_shares_packed_and_recent_rows(self, cache):
        rows, seq = make_rows(300), cache.sequence()
        append_rows(seq, rows)
        before = cache.stats().file_bytes
        child = seq.fork()
        assert cache.stats().file_bytes == before
        for layer in range(N_LAYERS):
            np.testing.assert_array_equal(child.k(layer), seq.k(layer))
            np.testing.assert_array_equal(child.v(layer), seq.v(layer))
        more = make_rows(100, seed=1)
        append_rows(child, more)
        assert_all(child, np.concatenate([rows, more]))
        assert_all(seq, rows)
        append_rows(seq, more[::-1])
        assert_all(seq, np.concatenate([rows, more[::-1]]))
        assert_all(child, np.concatenate([rows, more]))
        cache.check()

    def test_a_fork_of_what_is_packed_already(self, cache):
        rows, seq = make_rows(300), cache.sequence()
        append_rows(seq, rows)
        child = seq.fork(100)
        assert child.n_cold == 100
        append_rows(child, rows[100:])
        assert_all(child, rows)

    def test_the_books(self, cache):
        seq = cache.sequence()
        append_rows(seq, make_rows(400))
        stats = cache.stats()
        n_recent = 400 - seq.n_cold
        cold, recent = cache.cold_layout.token_bytes, cache.layout.token_bytes
        assert stats.needed_bytes == seq.n_cold * cold + n_recent * recent
        assert stats.file_bytes == stats.committed_bytes == seq.committed_bytes
        seq.close()
        cache.trim()
        assert cache.stats().file_bytes == 0


class TestTheLimit:
    @pytest.mark.parametrize("order", ORDERS)
    @pytest.mark.parametrize("one_by_one", [True, False])
    def test_a_sequence_stays_whole(self, order, one_by_one):
        scale = max(1, page_size_bytes() // 4096)
        rows = make_rows(400 * scale)
        layout = layout_of(order, 400 * scale)
        with KVCache(layout, quantize="recommended", residual_tokens=32) as cache:
            seq = cache.sequence()
            append_rows(seq, rows)
            budget_bytes = cache.stats().file_bytes * 2 // 3
        with KVCache(
            layout, quantize="recommended", residual_tokens=32, budget_bytes=budget_bytes
        ) as cache:
            seq = cache.sequence()

            def append_all():
                if one_by_one:
                    for row in rows:
                        seq.append_token(row)
                else:
                    append_rows(seq, rows)

            with pytest.raises(OutOfMemoryError):
                append_all()
            n_tokens = len(seq)
            assert one_by_one == (n_tokens > 0)
            seq.rollback()
            assert_all(seq, rows[:n_tokens])
            cache.check()
            assert cache.stats().file_bytes <= budget_bytes
            seq.truncate(n_tokens // 2)
            append_rows(seq, rows[n_tokens // 2 : n_tokens // 2 + 5])
            assert len(seq) == n_tokens // 2 + 5


class TestPositions:
    def test_rotated_k_must_be_accepted_to_be_rounded_again(self):
        rope = Rope(HEAD_DIM)
        rows = make_rows(60)
        layout = layout_of(rope=rope)
        with KVCache(layout, quantize="recommended", residual_tokens=16) as cache:
            seq = cache.sequence()
            append_rows(seq, rows)
            with pytest.raises(ValueError, match="lossy=True"):
                seq.add(0, 20, 5)
            assert_all(seq, rows)
            seq.add(50, -1, 5)  # of these none is packed
            before = seq.k(0, 0, 20)
            seq.add(0, 20, 5, lossy=True)
            expected = rope.rotate(before, np.full(20, 5))
            error = np.abs(seq.k(0, 0, 20) - expected).max()
            assert 0 < error < 2 * np.abs(expected).max() / 127

    def test_k_that_is_not_packed_needs_no_word(self):
        layout = layout_of(rope=Rope(HEAD_DIM))
        with KVCache(layout, v_type="q4_0", residual_tokens=0) as cache:
            seq = cache.sequence()
            append_rows(seq, make_rows(20))
            seq.add(0, -1, 5)
            assert seq.pos_max() == 24


class TestArguments:
    def test_recommended_is_what_it_says(self):
        layout = layout_of()
        with (
            KVCache(layout, quantize="recommended") as short,
            KVCache(layout, k_type="q8_0", v_type="q4_0", rotate="v", residual_tokens=128) as long,
        ):
            assert short._quantisation == long._quantisation
            assert short.cold_layout.token_bytes == N_LAYERS * 6 * (34 + 18)

    def test_it_says_what_it_stores(self):
        with KVCache(layout_of(), quantize="recommended") as cache:
            assert "stored as q8_0 and q4_0" in repr(cache)
        with KVCache(layout_of()) as cache:
            assert "stored" not in repr(cache)

    def test_types_of_what_comes_are_no_quantisation(self):
        with KVCache(layout_of(), k_type="float16") as cache:
            assert cache.cold_layout is cache.layout

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"quantize": "best"}, "quantize='best': 'recommended' is possible"),
            ({"quantize": "recommended", "k_type": "q8_0"}, "leave them out"),
            ({"k_type": "q5_0"}, "k_type='q5_0': 'float16', 'q8_0', 'q4_0', 'int4' are possible"),
            ({"v_type": "float32"}, "v_type='float32': 'float16', "),
            ({"residual_tokens": 4}, "give k_type or v_type"),
            ({"rotate": "v"}, "give k_type or v_type"),
            ({"v_type": "float16", "rotate": "v"}, "rotate='v' is about quantised rows"),
            ({"v_type": "q4_0", "rotate": "k"}, "K rows are float16, not quantised"),
            ({"v_type": "q4_0", "rotate": "both"}, "'', 'k', 'v' and 'kv' are possible"),
            ({"v_type": "q4_0", "residual_tokens": -1}, "must not be negative"),
        ],
    )
    def test_what_cannot_be(self, options, message):
        with pytest.raises(ValueError, match=message):
            KVCache(layout_of(), **options)

    def test_rows_that_are_no_whole_blocks(self):
        with pytest.raises(ValueError, match="1 heads of 80 values are no multiple of 32"):
            KVCache(KVLayout(2, 1, 80, 64), quantize="recommended")

    def test_packed_layouts_say_where_they_lie_and_are_no_caches(self):
        with pytest.raises(ValueError, match="give a layout of the rows that come"):
            KVCache(layout_of(dtype="q8_0"))
