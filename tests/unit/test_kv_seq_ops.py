"""rm, cp, keep, add, div and slide, by position, as llama.cpp means them."""

import numpy as np
import pytest

from pagealloc.core.os_memory import page_size_bytes, refusing
from pagealloc.errors import OutOfMemoryError, PageBoundaryError
from pagealloc.kv import KVCache, KVLayout, Rope

ORDERS = ("interleaved", "split", "block")
N_LAYERS, N_HEADS, HEAD_DIM = 3, 2, 64
SCALE = page_size_bytes() // 4096
MAX_TOKENS = 400 * SCALE


def make_rows(n_tokens, seed=0):
    """Random rows (T, L, 2, H, D)."""
    shape = (n_tokens, N_LAYERS, 2, N_HEADS, HEAD_DIM)
    return np.random.default_rng(seed).normal(size=shape).astype(np.float16)


def fill(seq, rows):
    for layer in range(N_LAYERS):
        seq.append(layer, rows[:, layer, 0], rows[:, layer, 1])


def read(seq):
    """All rows (T, L, 2, H, D)."""
    layers = [
        np.stack([seq.k(i, on_cross="copy"), seq.v(i, on_cross="copy")], axis=1)
        for i in range(N_LAYERS)
    ]
    return np.stack(layers, axis=1)


@pytest.fixture(params=ORDERS)
def order(request):
    return request.param


@pytest.fixture
def cache(order):
    layout = KVLayout(
        N_LAYERS, N_HEADS, HEAD_DIM, MAX_TOKENS, order=order, rope=Rope(HEAD_DIM, pairs="halves")
    )
    with KVCache(layout) as cache:
        yield cache
        cache.check()


def filled(cache, n_tokens=100, seq_id=None):
    seq, rows = cache.sequence(seq_id=seq_id), make_rows(n_tokens)
    fill(seq, rows)
    return seq, rows


def unit_bytes(layout):
    """Bytes that `remap_tokens` tokens hold: whole pages of every layer, or a KV block."""
    return layout.block_bytes or layout.remap_tokens * layout.token_stride_bytes


# --- rm -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("p0", "p1", "kept"),
    [
        (-1, -1, []),
        (0, 0, range(100)),
        (50, 50, range(100)),
        (60, 40, range(100)),
        (200, 300, range(100)),
        (-5, 10, range(10, 100)),
        (90, -1, range(90)),
        (10, 26, [*range(10), *range(26, 100)]),
        (0, 16, range(16, 100)),
        (7, 20, [*range(7), *range(20, 100)]),
        (99, 2**40, range(99)),
    ],
)
def test_rm_keeps_the_other_tokens_and_their_positions(cache, p0, p1, kept):
    seq, rows = filled(cache)
    assert seq.rm(p0, p1) is True
    assert len(seq) == len(kept)
    assert seq.positions.tolist() == list(kept)
    np.testing.assert_array_equal(read(seq), rows[list(kept)])
    cache.check()
    more = make_rows(5, seed=1)
    fill(seq, more)
    first = max(kept, default=-1) + 1
    assert seq.positions.tolist() == [*kept, *range(first, first + 5)]
    np.testing.assert_array_equal(read(seq), np.concatenate([rows[list(kept)], more]))
    cache.check()


def test_rm_gives_pages_back(cache):
    n_tokens = 10 * cache.layout.remap_tokens
    seq, _ = filled(cache, n_tokens)
    before = cache.stats().file_bytes
    seq.rm(0, 8 * cache.layout.remap_tokens)
    assert cache.stats().file_bytes <= 0.35 * before
    assert cache.stats().needed_bytes == len(seq) * cache.layout.token_bytes


@pytest.mark.parametrize("n_head", [0, 3])
def test_rm_of_whole_pages_copies_none(cache, n_head):
    """A fork's pages stay shared where they are only mapped elsewhere."""
    unit = cache.layout.remap_tokens
    if not cache.layout.can_remap:
        pytest.skip("K and V of a layer share a page in this order")
    seq, rows = filled(cache, 8 * unit)
    child = seq.fork()
    before = cache.stats().file_bytes
    child.rm(n_head, n_head + 2 * unit)
    n_private = 0 if n_head == 0 else 1  # the unit whose first rows stay
    assert cache.stats().file_bytes - before <= n_private * 1.5 * unit_bytes(cache.layout)
    kept = [*range(n_head), *range(n_head + 2 * unit, 8 * unit)]
    np.testing.assert_array_equal(read(child), rows[kept])
    np.testing.assert_array_equal(read(seq), rows)


def test_rm_in_a_fork_leaves_the_parent(cache):
    seq, rows = filled(cache)
    child = seq.fork()
    child.rm(3, 50)
    np.testing.assert_array_equal(read(seq), rows)
    np.testing.assert_array_equal(read(child), rows[[*range(3), *range(50, 100)]])
    assert cache.stats().needed_bytes == 100 * cache.layout.token_bytes


def test_rm_under_a_live_array_is_refused(cache):
    seq, rows = filled(cache)
    read_k = seq.k_blocks if cache.layout.order == "block" else seq.k
    array = read_k(0)
    with pytest.raises(BufferError, match="live array reaches to token 100"):
        seq.rm(10, 26)
    np.testing.assert_array_equal(read(seq), rows)
    assert seq.positions.tolist() == list(range(100))
    del array
    seq.rm(10, 26)


def test_rm_wants_layers_of_equal_length(cache):
    seq, rows = filled(cache)
    seq.append(0, rows[:1, 0, 0], rows[:1, 0, 1])
    with pytest.raises(ValueError, match="cannot remove tokens"):
        seq.rm(0, 5)


@pytest.mark.parametrize("p0_p1", [(3, 19), (3, 40), (0, 16 * SCALE), (5, 5 + 64 * SCALE)])
@pytest.mark.parametrize("call", ["mmap", "fallocate", "madvise", "pwrite"])
def test_rm_that_the_kernel_refuses_changes_nothing(cache, p0_p1, call):
    seq, rows = filled(cache, 100 * SCALE)
    child = seq.fork()
    before = child.positions.tolist()
    with refusing(call):
        try:
            child.rm(*p0_p1)
        except (OutOfMemoryError, OSError):
            assert child.positions.tolist() == before
            np.testing.assert_array_equal(read(child), rows)
    child.rm(*p0_p1)
    cache.check()
    kept = [*range(p0_p1[0]), *range(p0_p1[1], 100 * SCALE)]
    np.testing.assert_array_equal(read(child), rows[kept])
    np.testing.assert_array_equal(read(seq), rows)
    child.truncate(0)
    cache._store.trim()
    cache.check()


def test_rm_again_and_again(cache):
    """Every removal shifts what earlier ones shifted; the mappings stay few."""
    unit = cache.layout.remap_tokens
    seq, rows = filled(cache, 6 * unit)
    kept = list(range(6 * unit))
    rng = np.random.default_rng(1)
    for step in range(60):
        start = int(rng.integers(0, len(kept) - unit))
        positions = seq.positions
        seq.rm(int(positions[start]), int(positions[start + unit]))
        del kept[start : start + unit]
        more = make_rows(unit, seed=step + 2)
        fill(seq, more)
        kept += range(len(rows), len(rows) + unit)
        rows = np.concatenate([rows, more])
        np.testing.assert_array_equal(read(seq), rows[kept])
        cache.check()


# --- cp -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("p0", "p1", "chosen"),
    [(-1, -1, range(100)), (0, 48, range(48)), (32, 64, range(32, 64)), (9, 13, range(9, 13))],
)
def test_cp_to_an_empty_sequence(cache, p0, p1, chosen):
    seq, rows = filled(cache)
    target = cache.sequence()
    seq.cp(target, p0, p1)
    assert target.positions.tolist() == list(chosen)
    np.testing.assert_array_equal(read(target), rows[list(chosen)])
    np.testing.assert_array_equal(read(seq), rows)
    assert cache.stats().needed_bytes == 100 * cache.layout.token_bytes


def test_cp_appends_what_the_target_has_not(cache):
    seq, rows = filled(cache)
    target = cache.sequence()
    seq.cp(target, 0, 20)
    own = make_rows(4, seed=5)
    fill(target, own)
    seq.cp(target, 10, 30)
    assert target.positions.tolist() == [*range(20), 20, 21, 22, 23, *range(20, 30)]
    np.testing.assert_array_equal(read(target), np.concatenate([rows[:20], own, rows[20:30]]))
    before = read(target)
    seq.cp(target, 0, 30)  # it has them all
    np.testing.assert_array_equal(read(target), before)
    assert cache.stats().needed_bytes == 104 * cache.layout.token_bytes


def test_cp_to_a_sequence_that_lost_its_rows(cache):
    """Pages made ready for rows that never came are no obstacle."""
    seq, rows = filled(cache)
    target = cache.sequence()
    target._make_ready(list(range(N_LAYERS)), 40)
    seq.cp(target)
    np.testing.assert_array_equal(read(target), rows)
    cache.check()


def test_cp_of_nothing_and_to_itself(cache):
    seq, rows = filled(cache)
    target = cache.sequence()
    seq.cp(target, 500, 600)
    seq.cp(seq)
    assert len(target) == 0
    np.testing.assert_array_equal(read(seq), rows)


def test_cp_wants_a_sequence_of_the_same_cache(cache):
    seq, _ = filled(cache)
    with KVCache(cache.layout) as other, pytest.raises(ValueError, match="another cache"):
        seq.cp(other.sequence())
    with pytest.raises(TypeError, match="must be a Sequence, not int"):
        seq.cp(3)


def test_cp_without_room_leaves_the_target(cache):
    seq, _ = filled(cache, MAX_TOKENS - 10)
    target, rows = filled(cache, 20)
    with pytest.raises(PageBoundaryError, match="leaves room"):
        seq.cp(target)
    np.testing.assert_array_equal(read(target), rows)


# --- add and div ----------------------------------------------------------------------------------


def rotated(k, positions, rope):
    """K (T, L, H, D) as the model would have cached it at these positions."""
    shape = k.shape
    flat = k.reshape(shape[0], -1, shape[-1]).astype(np.float32)
    return rope.rotate(flat, np.asarray(positions, np.int64)).reshape(shape)


@pytest.mark.parametrize("pairs", ["halves", "neighbours"])
def test_add_is_as_if_the_rows_had_been_cached_there(order, pairs):
    rope = Rope(32, base=5000.0, pairs=pairs, scale=0.5)
    layout = KVLayout(N_LAYERS, N_HEADS, HEAD_DIM, MAX_TOKENS, order=order, rope=rope)
    with KVCache(layout) as cache:
        seq, raw = cache.sequence(), make_rows(40)
        rows = raw.copy()
        rows[:, :, 0] = rotated(raw[:, :, 0], np.arange(40), rope)
        fill(seq, rows)
        seq.add(10, 20, 100)
        positions = [*range(10), *range(110, 120), *range(20, 40)]
        assert seq.positions.tolist() == positions
        expected = rotated(raw[:, :, 0], positions, rope)
        np.testing.assert_allclose(read(seq)[:, :, 0].astype(np.float32), expected, atol=6e-3)
        np.testing.assert_array_equal(read(seq)[:, :, 1], rows[:, :, 1])
        assert seq.pos_max() == 119
        seq.div(-1, -1, 4)
        positions = [position // 4 for position in positions]
        assert seq.positions.tolist() == positions
        expected = rotated(raw[:, :, 0], positions, rope)
        np.testing.assert_allclose(read(seq)[:, :, 0].astype(np.float32), expected, atol=1e-2)
        cache.check()


def test_add_in_a_fork_leaves_the_parent(cache):
    seq, rows = filled(cache)
    child = seq.fork()
    child.add(90, -1, 7)
    np.testing.assert_array_equal(read(seq), rows)
    assert seq.pos_max() == 99
    assert child.pos_max() == 106
    assert cache.stats().needed_bytes == 110 * cache.layout.token_bytes


def test_add_below_zero_removes(cache):
    seq, rows = filled(cache)
    seq.add(0, 10, -4)
    assert seq.positions.tolist() == [*range(6), *range(10, 100)]
    np.testing.assert_array_equal(read(seq)[:, :, 1], rows[4:, :, 1])


@pytest.mark.parametrize("arguments", [(0, 10, 0), (10, 10, 5), (300, -1, 5)])
def test_add_of_nothing_needs_no_rope(order, arguments):
    with KVCache(KVLayout(N_LAYERS, N_HEADS, HEAD_DIM, MAX_TOKENS, order=order)) as cache:
        seq, rows = filled(cache)
        seq.add(*arguments)
        seq.div(-1, -1, 1)
        np.testing.assert_array_equal(read(seq), rows)
        with pytest.raises(ValueError, match="does not say how"):
            seq.add(0, 10, 1)
        with pytest.raises(ValueError, match="does not say how"):
            seq.div(0, 10, 2)


@pytest.mark.parametrize("d", [0, -2])
def test_div_wants_a_divisor(cache, d):
    with pytest.raises(ValueError, match=f"d={d}"):
        filled(cache)[0].div(0, 10, d)


def test_positions_are_32_bits(cache):
    seq, rows = filled(cache)
    with pytest.raises(ValueError, match="too large"):
        seq.add(0, -1, 2**31)
    np.testing.assert_array_equal(read(seq), rows)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_add_in_other_types(order, dtype):
    layout = KVLayout(
        1, 1, 8, MAX_TOKENS, order=order, dtype=dtype, rope=Rope(8), v_dtype="float16"
    )
    k = np.random.default_rng(2).normal(size=(9, 1, 8)).astype(np.float32)
    stored = k if dtype == "float32" else (k.view(np.uint32) >> 16).astype(np.uint16)
    with KVCache(layout) as cache:
        seq = cache.sequence()
        seq.append(0, stored, k.astype(np.float16))
        seq.add(0, -1, 5)
        found = seq.k(0, on_cross="copy").copy()
        if dtype == "bfloat16":
            found = (found.astype(np.uint32) << 16).view(np.float32)
        expected = Rope(8).rotate(k, np.full(9, 5))
        np.testing.assert_allclose(found, expected, rtol=0.02, atol=0.02)


# --- the sliding window ---------------------------------------------------------------------------


def test_slide_keeps_sinks_and_the_newest(cache):
    unit = cache.layout.remap_tokens
    window, sinks = 2 * unit, 4
    seq, rows = cache.sequence(), make_rows(MAX_TOKENS - 1)
    most_bytes, kept = 0, []
    for at in range(len(rows)):
        seq.append_token(rows[at])
        kept.append(at)
        n_dropped = seq.slide(window, sinks)
        del kept[sinks : sinks + n_dropped]
        assert seq.positions.tolist() == kept
        assert min(at + 1, sinks + window) <= len(seq) < sinks + window + unit
        most_bytes = max(most_bytes, cache.stats().file_bytes)
        if at % 37 == 0:
            cache.check()
    np.testing.assert_array_equal(read(seq), rows[kept])
    assert most_bytes <= 6 * unit_bytes(cache.layout)
    assert seq._window.n_mappings <= 8 * N_LAYERS


@pytest.mark.parametrize("arguments", [(-1,), (5, -1)])
def test_slide_wants_numbers(cache, arguments):
    with pytest.raises(ValueError, match="negative"):
        filled(cache)[0].slide(*arguments)


# --- by seq_id ------------------------------------------------------------------------------------


def test_by_seq_id(cache):
    _, rows = filled(cache, seq_id=0)
    cache.seq_cp(0, 7, 0, 50)
    assert [seq.seq_id for seq in cache.sequences] == [0, 7]
    assert cache.seq_pos_min(7) == 0
    assert cache.seq_pos_max(7) == 49
    assert cache.seq_rm(7, 0, 10)
    assert cache.seq_pos_min(7) == 10
    cache.seq_add(7, 10, -1, 5)
    assert cache.seq_pos_max(7) == 54
    cache.seq_div(7, 10, -1, 2)
    assert cache.seq_pos_max(7) == 27
    cache.seq_keep(0)
    assert len(cache.seq(7)) == 0
    np.testing.assert_array_equal(read(cache.seq(0)), rows)
    cache.seq_rm(-1)
    assert [len(seq) for seq in cache.sequences] == [0, 0]


def test_unknown_ids_have_no_tokens(cache):
    assert cache.seq_rm(5, 0, 10)
    assert cache.seq_pos_min(5) == cache.seq_pos_max(5) == -1
    cache.seq_cp(5, 6)
    cache.seq_add(5, 0, 10, 1)
    cache.seq_div(5, 0, 10, 2)
    assert cache.sequences == []
    with pytest.raises(KeyError, match="seq_id=5"):
        cache.seq(5)
    filled(cache, seq_id=1)
    cache.seq_keep(5)
    assert len(cache.seq(1)) == 0
    cache.seq_cp(1, 2)
    assert [seq.seq_id for seq in cache.sequences] == [1]


@pytest.mark.parametrize("seq_id", [-1, -2])
def test_negative_ids_are_refused(cache, seq_id):
    calls = [
        lambda: cache.sequence(seq_id=seq_id),
        lambda: cache.seq_cp(seq_id, 0),
        lambda: cache.seq_cp(0, seq_id),
        lambda: cache.seq_keep(seq_id),
        lambda: cache.seq_add(seq_id, 0, 1, 1),
        lambda: cache.seq_pos_max(seq_id),
    ]
    for call in [*calls, lambda: cache.seq_rm(-2)]:
        with pytest.raises(ValueError, match="must not be negative"):
            call()


def test_ids_are_given_out_and_taken_back(cache):
    first, named = cache.sequence(), cache.sequence(seq_id=1)
    second = cache.sequence()
    assert [seq.seq_id for seq in (first, named, second)] == [0, 1, 2]
    with pytest.raises(ValueError, match="seq_id=1: this sequence exists"):
        cache.sequence(seq_id=1)
    del named
    assert cache.seq(1).seq_id == 1  # the cache keeps what has a name
    del first
    with pytest.raises(KeyError):
        cache.seq(0)
    cache.seq(1).close()
    assert cache.sequence(seq_id=1).seq_id == 1


def test_keep_of_a_sequence(cache):
    seq, rows = filled(cache)
    other, _ = filled(cache, 50)
    seq.keep()
    assert len(other) == 0
    np.testing.assert_array_equal(read(seq), rows)


# --- positions on appending -----------------------------------------------------------------------


def test_positions_on_appending(cache):
    seq, rows = cache.sequence(), make_rows(10)
    assert seq.pos_min() == seq.pos_max() == -1
    for layer in range(N_LAYERS):
        seq.append(layer, rows[:4, layer, 0], rows[:4, layer, 1], position=20)
    seq.append_token(rows[4])
    seq.append_token(rows[5], position=3)
    seq.append_token(rows[6])
    assert seq.positions.tolist() == [20, 21, 22, 23, 24, 3, 25]
    assert (seq.pos_min(), seq.pos_max()) == (3, 25)
    seq.append(0, rows[:2, 0, 0], rows[:2, 0, 1], position=50)
    with pytest.raises(ValueError, match="token 7 at position 50, not 60"):
        seq.append(1, rows[:1, 1, 0], rows[:1, 1, 1], position=60)
    seq.rollback()
    assert seq.positions.tolist() == [20, 21, 22, 23, 24, 3, 25]
    with pytest.raises(ValueError, match="must not be negative"):
        seq.append_token(rows[7], position=-1)
    with pytest.raises(ValueError, match="too large"):
        seq.append_token(rows[7], position=2**31 - 1)
    assert len(seq) == 7
