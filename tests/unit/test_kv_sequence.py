import copy
import pickle
import weakref

import numpy as np
import pytest

from pagealloc.core.os_memory import page_size_bytes
from pagealloc.errors import ClosedError, OutOfMemoryError, PageBoundaryError
from pagealloc.kv import KVCache, KVLayout

ORDERS = ("interleaved", "split", "block")
N_LAYERS, N_HEADS, HEAD_DIM = 4, 3, 64
PAGE = page_size_bytes()


def make_cache(order, *, dtype="float16", max_tokens=500, budget_bytes=None, **shape):
    shape = {"n_layers": N_LAYERS, "n_kv_heads": N_HEADS, "head_dim": HEAD_DIM, **shape}
    layout = KVLayout(**shape, max_tokens=max_tokens, dtype=dtype, order=order)
    return KVCache(layout, budget_bytes=budget_bytes)


@pytest.fixture(params=ORDERS)
def order(request):
    return request.param


@pytest.fixture
def cache(order):
    with make_cache(order) as cache:
        yield cache
        cache.check()


def make_rows(n_tokens, seed=0, n_layers=N_LAYERS, dtype=np.float16):
    """Random rows (T, L, 2, H, D)."""
    generator = np.random.default_rng(seed)
    shape = (n_tokens, n_layers, 2, N_HEADS, HEAD_DIM)
    if dtype == np.uint16:
        return generator.integers(0, 1 << 16, shape, np.uint16)
    return generator.normal(size=shape).astype(dtype)


def append_rows(seq, rows):
    for layer in range(rows.shape[1]):
        seq.append(layer, rows[:, layer, 0], rows[:, layer, 1])


def read_rows(seq):
    """All rows of a sequence with equal layers, copied: (T, L, 2, H, D)."""
    layout = seq.cache.layout
    rows = np.empty(
        (len(seq), layout.n_layers, 2, layout.n_kv_heads, layout.head_dim), layout.storage_dtypes[0]
    )
    for layer in range(layout.n_layers):
        if layout.order == "block":
            both = [seq.k_blocks(layer), seq.v_blocks(layer)]  # (B, b, H, D)
            both = [blocks.reshape(-1, *blocks.shape[2:])[: len(seq)] for blocks in both]
        else:
            both = [seq.k(layer), seq.v(layer)]
        rows[:, layer, 0], rows[:, layer, 1] = both
    return rows


def first_array(seq, layer=0):
    return seq.k_blocks(layer) if seq.cache.layout.order == "block" else seq.k(layer)


# --- appending and reading ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_rows_come_back(order, dtype):
    with make_cache(order, dtype=dtype) as cache:
        seq = cache.sequence()
        rows = make_rows(130, dtype=cache.layout.storage_dtypes[0].type)
        start = 0
        for n_tokens in (1, 7, 0, 50, 16, 33, 23):
            append_rows(seq, rows[start : start + n_tokens])
            start += n_tokens
            cache.check()
            np.testing.assert_array_equal(read_rows(seq), rows[:start])
        assert len(seq) == 130
        assert seq.layer_lengths == (130,) * N_LAYERS


def test_append_token(cache):
    seq = cache.sequence()
    rows = make_rows(40)
    for token in rows:
        seq.append_token(token)
    np.testing.assert_array_equal(read_rows(seq), rows)
    assert cache.stats().n_tokens == 40


def test_large_appends_release_the_gil_and_still_arrive(order):
    with make_cache(order, max_tokens=2000) as cache:
        seq = cache.sequence()
        rows = make_rows(2000)
        append_rows(seq, rows)
        np.testing.assert_array_equal(read_rows(seq), rows)
        cache.check()


def test_a_large_token_arrives(order):
    rows = make_rows(3, n_layers=100)
    with make_cache(order, n_layers=100) as cache:
        seq = cache.sequence()
        for token in rows:
            seq.append_token(token)
        np.testing.assert_array_equal(read_rows(seq), rows)
        cache.check()


def test_any_strides(cache):
    rows = make_rows(20)
    seq = cache.sequence()
    for layer in range(N_LAYERS):
        k, v = rows[:, layer, 0], rows[:, layer, 1]
        seq.append(layer, np.asfortranarray(k), v[::-1][::-1])
        seq.append(layer, k[::-1], np.repeat(v, 2, axis=2)[:, :, ::2])
        seq.append(layer, k.transpose(1, 0, 2).copy().transpose(1, 0, 2), v[..., ::-1])
        seq.append(layer, np.broadcast_to(k[:1], k.shape), v)
    k_rows = rows[:, :, 0]
    v_rows = rows[:, :, 1]
    expected_k = [k_rows, k_rows[::-1], k_rows, np.broadcast_to(k_rows[:1], k_rows.shape)]
    expected_v = [v_rows, v_rows, v_rows[..., ::-1], v_rows]
    got = read_rows(seq)
    np.testing.assert_array_equal(got[:, :, 0], np.concatenate(expected_k))
    np.testing.assert_array_equal(got[:, :, 1], np.concatenate(expected_v))


def test_arrays_are_read_only_and_lie_in_the_window(cache):
    seq = cache.sequence()
    append_rows(seq, make_rows(20))
    layout = cache.layout
    arrays = {
        (layer, kv): getattr(seq, f"{'kv'[kv]}{'_blocks' * (layout.order == 'block')}")(layer)
        for layer in range(N_LAYERS)
        for kv in (0, 1)
    }
    base = arrays[0, 0].ctypes.data
    for (layer, kv), array in arrays.items():
        assert array.ctypes.data - base == layout.offset(layer, 0, kv)
        assert array.strides == layout.strides(layer, kv)
        assert not array.flags.writeable
        with pytest.raises(ValueError, match="WRITEABLE"):
            array.flags.writeable = True
    arrays.clear()
    del array


def test_a_token_range(order):
    with make_cache(order) as cache:
        seq = cache.sequence()
        rows = make_rows(30)
        append_rows(seq, rows)
        if order == "block":
            assert seq.k_blocks(2).shape == (2, 16, N_HEADS, HEAD_DIM)
            with pytest.raises(ValueError, match=r"use k_blocks\(layer\)"):
                seq.k(0)
            with pytest.raises(ValueError, match=r"use v_blocks\(layer\)"):
                seq.v(0)
        else:
            np.testing.assert_array_equal(seq.k(2, 10, 20), rows[10:20, 2, 0])
            np.testing.assert_array_equal(seq.v(2, 25), rows[25:, 2, 1])
            assert seq.v(2, 30).shape == (0, N_HEADS, HEAD_DIM)
            with pytest.raises(ValueError, match=r"use k\(layer\)"):
                seq.k_blocks(0)


def test_an_empty_sequence(cache):
    seq = cache.sequence()
    assert len(seq) == 0
    assert first_array(seq).shape[0] == 0
    assert not first_array(seq).flags.writeable
    child = seq.fork()
    append_rows(child, make_rows(3))
    assert (len(seq), len(child)) == (0, 3)
    seq.truncate(0)
    seq.rollback()


def test_numpy_integers_are_layers_and_lengths(cache):
    seq = cache.sequence()
    rows = make_rows(5)
    for layer in np.arange(N_LAYERS):
        seq.append(layer, rows[:, layer, 0], rows[:, layer, 1])
    seq.truncate(np.int64(3))
    assert seq.layer_lengths == (3,) * N_LAYERS
    assert type(len(seq)) is int


# --- memory ---------------------------------------------------------------------------------------


def test_ten_tokens_hold_the_pages_of_ten_tokens(order):
    with make_cache(order, max_tokens=8192) as cache:
        seq = cache.sequence()
        assert cache.stats().file_bytes == 0
        append_rows(seq, make_rows(10))
        layout = cache.layout
        touched = {
            offset // PAGE
            for layer in range(N_LAYERS)
            # In block order a block is committed whole: the pages of ten tokens, up to the block.
            for token in range(16 if order == "block" else 10)
            for kv in (0, 1)
            for offset in (
                layout.offset(layer, token, kv),
                layout.offset(layer, token, kv) + layout.row_bytes(layer, kv) - 1,
            )
        }
        assert cache.stats().file_bytes == len(touched) * PAGE == seq.committed_bytes
        cache.check()


def test_reading_holds_nothing_more(cache):
    seq = cache.sequence()
    append_rows(seq, make_rows(10))
    before = cache.stats().file_bytes
    for layer in range(N_LAYERS):
        first_array(seq, layer).copy()
    read_rows(seq)
    assert cache.stats().file_bytes == before


def test_truncate_releases_pages(cache):
    seq = cache.sequence()
    rows = make_rows(300)
    held = []
    for n_tokens in (5, 100, 300):
        append_rows(seq, rows[len(seq) : n_tokens])
        held.append(cache.stats().file_bytes)
    assert held[0] < held[2]
    seq.truncate(100)
    assert cache.stats().file_bytes == held[1]
    np.testing.assert_array_equal(read_rows(seq), rows[:100])
    seq.truncate(5)
    assert cache.stats().file_bytes == held[0]
    cache.check()
    append_rows(seq, rows[5:300])
    np.testing.assert_array_equal(read_rows(seq), rows)
    seq.truncate(0)
    assert cache.stats().file_bytes == 0
    seq.truncate(0)


def test_an_abandoned_sequence_gives_its_pages_back(cache):
    seq = cache.sequence()
    append_rows(seq, make_rows(50))
    array = first_array(seq)
    expected = array.copy()
    gone = weakref.ref(seq)
    del seq
    assert gone() is None
    assert cache.sequences == []
    np.testing.assert_array_equal(array, expected)  # the array keeps the window
    with pytest.raises(BufferError, match="still alive"):
        cache.close()
    del array
    assert cache.stats().file_bytes == 0


# --- fork -----------------------------------------------------------------------------------------


def test_fork_shares_everything(cache):
    seq = cache.sequence()
    rows = make_rows(100)
    append_rows(seq, rows)
    before = cache.stats()
    children = [seq.fork() for _ in range(5)]
    after = cache.stats()
    assert after.file_bytes == before.file_bytes
    assert after.shared_bytes == 5 * before.file_bytes
    assert after.needed_bytes == before.needed_bytes == 100 * cache.layout.token_bytes
    assert after.n_tokens == 600
    for child in children:
        np.testing.assert_array_equal(read_rows(child), rows)
    assert cache.stats().file_bytes == before.file_bytes
    cache.check()


def test_neither_side_sees_the_others_rows(cache):
    parent = cache.sequence()
    rows, for_parent, for_child = make_rows(37), make_rows(30, 1), make_rows(30, 2)
    append_rows(parent, rows)
    child = parent.fork()
    append_rows(parent, for_parent)
    cache.check()
    append_rows(child, for_child[:1])
    cache.check()
    grandchild = child.fork()
    append_rows(child, for_child[1:])
    grandchild.truncate(20)
    append_rows(grandchild, for_parent)
    cache.check()
    np.testing.assert_array_equal(read_rows(parent), np.concatenate([rows, for_parent]))
    np.testing.assert_array_equal(read_rows(child), np.concatenate([rows, for_child]))
    np.testing.assert_array_equal(read_rows(grandchild), np.concatenate([rows[:20], for_parent]))
    parent.close()
    cache.check()
    np.testing.assert_array_equal(read_rows(child), np.concatenate([rows, for_child]))
    child.close()
    cache.check()
    np.testing.assert_array_equal(read_rows(grandchild), np.concatenate([rows[:20], for_parent]))
    grandchild.close()
    cache.trim()
    assert cache.stats().file_bytes == 0


@pytest.mark.parametrize("writer", ["parent", "child"])
def test_rows_written_over_shared_ones(cache, writer):
    """Truncate and append on one side: the same places of the window, other rows."""
    parent = cache.sequence()
    rows, others = make_rows(37), make_rows(30, 1)
    append_rows(parent, rows)
    child = parent.fork()
    one, other = (parent, child) if writer == "parent" else (child, parent)
    one.truncate(20)
    append_rows(one, others)
    cache.check()
    np.testing.assert_array_equal(read_rows(one), np.concatenate([rows[:20], others]))
    np.testing.assert_array_equal(read_rows(other), rows)


def test_arrays_survive_what_the_other_side_does(cache):
    """An array over shared pages keeps its rows while either side makes its pages private."""
    parent = cache.sequence()
    append_rows(parent, make_rows(37))
    child = parent.fork()
    arrays = [first_array(parent), first_array(child)]
    valid = [
        array.reshape(-1, N_HEADS, HEAD_DIM)[:37] if array.ndim == 4 else array for array in arrays
    ]
    expected = [array.copy() for array in valid]
    append_rows(parent, make_rows(5, 1))
    append_rows(child, make_rows(5, 2))
    valid = [
        array.reshape(-1, N_HEADS, HEAD_DIM)[:37] if array.ndim == 4 else array for array in arrays
    ]
    for array, rows in zip(valid, expected, strict=True):
        np.testing.assert_array_equal(array, rows)
    del arrays, array, valid


def test_a_fork_costs_few_mappings_in_block_order():
    with make_cache("block", max_tokens=2000) as cache:
        seq = cache.sequence()
        append_rows(seq, make_rows(1000))
        before = cache._store.n_mappings
        children = [seq.fork() for _ in range(10)]
        assert cache._store.n_mappings - before <= 3 * len(children)
        for child in children:
            append_rows(child, make_rows(20))
        assert cache._store.n_mappings - before <= 4 * len(children)
        cache.check()


# --- layers of unequal length ---------------------------------------------------------------------


def test_unequal_layers(cache):
    seq = cache.sequence()
    rows = make_rows(40)
    append_rows(seq, rows[:30])
    seq.append(0, rows[30:, 0, 0], rows[30:, 0, 1])
    seq.append(2, rows[30:33, 2, 0], rows[30:33, 2, 1])
    assert seq.layer_lengths == (40, 30, 33, 30)
    assert len(seq) == 30
    cache.check()
    for call in (seq.fork, lambda: seq.truncate(3), lambda: seq.append_token(rows[0])):
        with pytest.raises(ValueError, match="layer 0: 40, layer 2: 33"):
            call()
    assert seq.layer_lengths == (40, 30, 33, 30)
    seq.rollback()
    assert seq.layer_lengths == (30,) * 4
    np.testing.assert_array_equal(read_rows(seq), rows[:30])
    cache.check()


# --- refusals -------------------------------------------------------------------------------------


def test_a_full_window(order):
    with make_cache(order, max_tokens=20) as cache:
        seq = cache.sequence()
        rows = make_rows(21)
        append_rows(seq, rows[:19])
        before = cache.stats().file_bytes
        for layer in (0, N_LAYERS - 1):
            with pytest.raises(PageBoundaryError, match="max_tokens=20 leaves room for 1"):
                seq.append(layer, rows[:2, layer, 0], rows[:2, layer, 1])
        seq.append_token(rows[19])
        with pytest.raises(PageBoundaryError, match="max_tokens=20 leaves room for 0"):
            seq.append_token(rows[20])
        assert seq.layer_lengths == (20,) * N_LAYERS
        assert cache.stats().file_bytes >= before
        np.testing.assert_array_equal(read_rows(seq), rows[:20])
        cache.check()


@pytest.mark.parametrize("place", ["k", "v"])
@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ([[1.0]], TypeError, "must be an array of float16, not list"),
        (None, TypeError, "must be an array of float16, not NoneType"),
        (
            np.zeros((2, N_HEADS, HEAD_DIM), np.float32),
            TypeError,
            r"float32, the cache stores float16 .* give x\.astype\(np\.float16\)",
        ),
        (np.zeros((2, N_HEADS, HEAD_DIM), ">f2"), TypeError, "dtype >f2"),
        (np.zeros((2, N_HEADS, HEAD_DIM), np.uint16), TypeError, "dtype uint16"),
        (np.zeros((2, N_HEADS, HEAD_DIM), object), TypeError, "dtype object"),
        (np.zeros((2, N_HEADS, HEAD_DIM), "M8[s]"), TypeError, "dtype datetime64"),
        (np.zeros((N_HEADS, HEAD_DIM), np.float16), ValueError, r"shape \(3, 64\), expected"),
        (np.zeros((2, HEAD_DIM, N_HEADS), np.float16), ValueError, r"\(2, 64, 3\), expected"),
        (np.zeros((2, N_HEADS, 63), np.float16), ValueError, r"expected \(tokens, 3, 64\)"),
        (np.float16(1), ValueError, r"shape \(\), expected"),
        (np.zeros((3, N_HEADS, HEAD_DIM), np.float16), ValueError, "every token has both"),
    ],
)
def test_bad_rows(cache, place, bad, error, message):
    seq = cache.sequence()
    good = np.zeros((2, N_HEADS, HEAD_DIM), np.float16)
    k, v = (bad, good) if place == "k" else (good, bad)
    with pytest.raises(error, match=message):
        seq.append(0, k, v)
    assert seq.layer_lengths == (0,) * N_LAYERS
    assert cache.stats().file_bytes == 0


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (np.zeros((N_LAYERS, 2, N_HEADS, HEAD_DIM)), TypeError, "kv has dtype float64"),
        (np.zeros((N_LAYERS, N_HEADS, HEAD_DIM), np.float16), ValueError, "expected"),
        (np.zeros((N_LAYERS, 1, N_HEADS, HEAD_DIM), np.float16), ValueError, "expected"),
        (np.zeros((1, 2, N_HEADS, HEAD_DIM), np.float16), ValueError, r"\(4, 2, 3, 64\)"),
        ("kv", TypeError, "not str"),
    ],
)
def test_bad_tokens(cache, bad, error, message):
    seq = cache.sequence()
    with pytest.raises(error, match=message):
        seq.append_token(bad)
    assert cache.stats().file_bytes == 0


def test_bfloat16_wants_its_bits(order):
    with make_cache(order, dtype="bfloat16") as cache:
        rows = np.zeros((1, N_HEADS, HEAD_DIM), np.float16)
        with pytest.raises(TypeError, match="bits as uint16"):
            cache.sequence().append(0, rows, rows)


@pytest.mark.parametrize("layer", [-1, N_LAYERS, 1 << 70])
def test_no_such_layer(cache, layer):
    seq = cache.sequence()
    rows = np.zeros((1, N_HEADS, HEAD_DIM), np.float16)
    for call in (lambda: seq.append(layer, rows, rows), lambda: first_array(seq, layer)):
        with pytest.raises(PageBoundaryError, match=f"layer {layer}"):
            call()


@pytest.mark.parametrize("layer", ["0", None, 0.0, 1.5])
def test_a_layer_is_an_integer(cache, layer):
    rows = np.zeros((1, N_HEADS, HEAD_DIM), np.float16)
    with pytest.raises(TypeError):
        cache.sequence().append(layer, rows, rows)


@pytest.mark.parametrize("tokens", [(0, 11), (-1, 3), (5, 4), (11, 12), (0, 1 << 70)])
@pytest.mark.parametrize("order", ["interleaved", "split"])
def test_tokens_outside_the_rows(order, tokens):
    with make_cache(order) as cache:
        seq = cache.sequence()
        append_rows(seq, make_rows(10))
        for read in (seq.k, seq.v):
            with pytest.raises(
                PageBoundaryError, match=r"outside the 10 committed rows|start 5 lies behind end 4"
            ):
                read(1, *tokens)


@pytest.mark.parametrize("n_tokens", [-1, 11, 1 << 70])
def test_truncate_outside_the_rows(cache, n_tokens):
    seq = cache.sequence()
    append_rows(seq, make_rows(10))
    with pytest.raises(PageBoundaryError, match="holds 10"):
        seq.truncate(n_tokens)
    for not_a_number in ("3", None, 2.5):
        with pytest.raises(TypeError):
            seq.truncate(not_a_number)
    assert len(seq) == 10


def test_live_arrays_refuse_truncate_and_close(cache):
    seq = cache.sequence()
    rows = make_rows(20)
    append_rows(seq, rows)
    array = first_array(seq, 1)
    part = array[0]
    del array  # a slice holds on as well
    append_rows(seq, rows)
    seq.truncate(30)
    seq.truncate(20)
    with pytest.raises(BufferError, match="reaches to token 20"):
        seq.truncate(19)
    with pytest.raises(BufferError):
        seq.close()
    with pytest.raises(BufferError, match="still alive"):
        cache.close()
    assert not seq.closed
    assert len(seq) == 20
    cache.check()
    del part
    seq.truncate(19)
    np.testing.assert_array_equal(read_rows(seq), rows[:19])
    seq.close()


def test_use_after_close(cache):
    seq = cache.sequence()
    append_rows(seq, make_rows(3))
    seq.close()
    seq.close()
    assert seq.closed
    rows = np.zeros((1, N_HEADS, HEAD_DIM), np.float16)
    for call in (
        lambda: seq.append(0, rows, rows),
        lambda: seq.append_token(make_rows(1)[0]),
        lambda: first_array(seq),
        lambda: seq.truncate(0),
        seq.rollback,
        seq.fork,
    ):
        with pytest.raises(ClosedError, match="closed"):
            call()
    seq.check()
    assert seq.committed_bytes == 0
    assert repr(seq) == "<Sequence closed>"


def test_context_manager(cache):
    with cache.sequence() as seq:
        append_rows(seq, make_rows(3))
    assert seq.closed
    assert cache.sequences == []


@pytest.mark.parametrize("do", [pickle.dumps, copy.copy, copy.deepcopy])
def test_it_cannot_be_pickled_or_copied(cache, do):
    with pytest.raises(TypeError, match="cannot be pickled or copied"):
        do(cache.sequence())


def test_repr(cache):
    seq = cache.sequence()
    append_rows(seq, make_rows(3))
    assert "of 3 tokens, at most 500" in repr(seq)
    seq.append(0, *make_rows(2)[:, 0].swapaxes(0, 1))
    assert "3 to 5 tokens" in repr(seq)


# --- budget ---------------------------------------------------------------------------------------


def test_the_budget_leaves_the_sequence_as_it_was(order):
    budget_bytes = 14 * PAGE
    with make_cache(order, budget_bytes=budget_bytes) as cache:
        seq = cache.sequence()
        rows = make_rows(500)
        lengths = seq.layer_lengths
        with pytest.raises(OutOfMemoryError):  # noqa: PT012
            while True:
                lengths, held = seq.layer_lengths, cache.stats().file_bytes
                seq.append_token(rows[len(seq)])
        assert seq.layer_lengths == lengths
        assert cache.stats().file_bytes == held <= budget_bytes
        cache.check()
        n_tokens = len(seq)
        np.testing.assert_array_equal(read_rows(seq), rows[:n_tokens])
        child = seq.fork()  # sharing costs nothing
        np.testing.assert_array_equal(read_rows(child), rows[:n_tokens])
        child.close()
        seq.truncate(n_tokens // 2)
        for token in rows[n_tokens // 2 : n_tokens]:
            seq.append_token(token)
        np.testing.assert_array_equal(read_rows(seq), rows[:n_tokens])


def test_the_budget_holds_for_bulk_appends(order):
    with make_cache(order, budget_bytes=4 * PAGE) as cache:
        seq = cache.sequence()
        rows = make_rows(500)
        with pytest.raises(MemoryError, match=r"tokens 0 to 499 .*budget .* 0 B committed"):
            seq.append(1, rows[:, 1, 0], rows[:, 1, 1])
        assert seq.layer_lengths == (0,) * N_LAYERS
        assert cache.stats().file_bytes == 0
        cache.check()
