import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagealloc.core.os_memory import page_size_bytes
from pagealloc.errors import PageBoundaryError
from pagealloc.kv import KVLayout
from pagealloc.units import MAX_BYTES

ORDERS = ("interleaved", "split", "block")
PAGES = (4096, 16384, 65536)
SMOLLM2 = {"n_layers": 30, "n_kv_heads": 3, "head_dim": 64}


def layouts(page_bytes=PAGES):
    return st.builds(
        KVLayout,
        n_layers=st.integers(1, 6),
        n_kv_heads=st.integers(1, 4),
        head_dim=st.integers(1, 70),
        max_tokens=st.integers(1, 90),
        dtype=st.sampled_from(("float16", "float32", "bfloat16")),
        order=st.sampled_from(ORDERS),
        block_tokens=st.integers(1, 20),
        page_bytes=st.sampled_from(page_bytes),
    )


def test_sizes_of_a_real_model():
    layout = KVLayout(**SMOLLM2, max_tokens=8192, page_bytes=4096)
    assert layout.item_bytes == 2
    assert layout.head_bytes == 128
    assert layout.k_row_bytes == layout.v_row_bytes == 384
    assert layout.token_stride == 768
    assert layout.token_bytes == 23040
    assert layout.window_bytes == 30 * 8192 * 768
    assert layout.block_bytes == 16 * 23040
    assert layout.order == "interleaved"
    assert KVLayout(**SMOLLM2, max_tokens=8192).page_bytes == page_size_bytes()


def test_sixteen_tokens_of_an_8b_model_are_one_huge_page():
    layout = KVLayout(32, 8, 128, 8192, order="block")
    assert layout.token_stride == 4096
    assert layout.block_bytes == 2 << 20


@pytest.mark.parametrize("page_bytes", PAGES)
def test_interleaved_offsets(page_bytes):
    layout = KVLayout(**SMOLLM2, max_tokens=100, page_bytes=page_bytes)
    layer_bytes = -(-100 * 768 // page_bytes) * page_bytes
    assert layout.layer_base == tuple(layer * layer_bytes for layer in range(30))
    assert layout.offset(0, 0, 0) == 0
    assert layout.offset(7, 9, 0, 2) == 7 * layer_bytes + 9 * 768 + 2 * 128
    assert layout.offset(7, 9, 1, 2) == 7 * layer_bytes + 9 * 768 + 384 + 2 * 128
    assert layout.strides == (768, 128, 2)


@pytest.mark.parametrize("page_bytes", PAGES)
def test_split_offsets(page_bytes):
    layout = KVLayout(**SMOLLM2, max_tokens=100, order="split", page_bytes=page_bytes)
    layer_bytes = -(-100 * 768 // page_bytes) * page_bytes
    assert layout.offset(7, 9, 0, 2) == 7 * layer_bytes + 9 * 384 + 2 * 128
    assert layout.offset(7, 9, 1, 2) == 7 * layer_bytes + (100 + 9) * 384 + 2 * 128
    assert layout.strides == (384, 128, 2)


@pytest.mark.parametrize("page_bytes", PAGES)
def test_block_offsets(page_bytes):
    layout = KVLayout(
        **SMOLLM2, max_tokens=100, order="block", block_tokens=8, page_bytes=page_bytes
    )
    block_bytes = -(-8 * 23040 // page_bytes) * page_bytes
    assert layout.block_bytes == block_bytes
    assert layout.layer_base_in_block == tuple(layer * 8 * 768 for layer in range(30))
    assert layout.window_bytes == 13 * block_bytes
    assert layout.offset(7, 9, 1, 2) == block_bytes + 7 * 8 * 768 + 768 + 384 + 2 * 128
    assert layout.strides == (block_bytes, 768, 128, 2)


@given(layouts())
def test_rows_never_overlap_and_stay_in_the_window(layout):
    owners = np.zeros(layout.window_bytes, np.uint8)
    for layer in range(layout.n_layers):
        assert layout.order == "block" or layout.layer_base[layer] % layout.page_bytes == 0
        for token in range(layout.max_tokens):
            for kv in (0, 1):
                offset = layout.offset(layer, token, kv)
                assert 0 <= offset <= layout.window_bytes - layout.k_row_bytes
                owners[offset : offset + layout.k_row_bytes] += 1
    assert owners.max() == 1
    assert owners.sum() == layout.max_tokens * layout.token_bytes
    assert layout.window_bytes % layout.page_bytes == 0


@given(layouts(), st.data())
def test_strides_agree_with_offset(layout, data):
    layer = data.draw(st.integers(0, layout.n_layers - 1))
    token = data.draw(st.integers(0, layout.max_tokens - 1))
    kv = data.draw(st.integers(0, 1))
    head = data.draw(st.integers(0, layout.n_kv_heads - 1))
    index = (token,) if layout.order != "block" else divmod(token, layout.block_tokens)
    expected = layout.offset(layer, 0, kv) + sum(
        i * stride for i, stride in zip((*index, head), layout.strides, strict=False)
    )
    assert layout.offset(layer, token, kv, head) == expected


@pytest.mark.parametrize(
    ("dtype", "name", "storage"),
    [
        ("float16", "float16", np.float16),
        (np.float16, "float16", np.float16),
        (np.dtype(np.float32), "float32", np.float32),
        ("bfloat16", "bfloat16", np.uint16),
    ],
)
def test_dtypes(dtype, name, storage):
    layout = KVLayout(1, 1, 8, 8, dtype=dtype)
    assert layout.dtype == name
    assert layout.storage_dtype == storage
    assert layout == KVLayout(1, 1, 8, 8, dtype=name)
    assert hash(layout) == hash(KVLayout(1, 1, 8, 8, dtype=name))


def test_numpy_integers_become_ints():
    layout = KVLayout(np.int32(2), np.uint8(3), np.int64(4), np.int16(5))
    assert type(layout.offset(1, 4, 1, 2)) is int


def test_it_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        KVLayout(1, 1, 1, 1).max_tokens = 2


def test_repr_shows_what_a_token_and_a_sequence_cost():
    text = repr(KVLayout(**SMOLLM2, max_tokens=8192, order="block", page_bytes=4096))
    assert "22.5 KiB a token" in text
    assert "180 MiB a full sequence" in text
    assert "block_tokens=16" in text


@pytest.mark.parametrize(
    "name", ["n_layers", "n_kv_heads", "head_dim", "max_tokens", "block_tokens", "page_bytes"]
)
@pytest.mark.parametrize(
    ("value", "error"),
    [
        (0, ValueError),
        (-1, ValueError),
        (1 << 62, ValueError),
        pytest.param(10**5000, ValueError, id="5,001 digits"),
        (1.0, TypeError),
        ("8", TypeError),
        (True, TypeError),
        (None, TypeError),
    ],
)
def test_bad_counts(name, value, error):
    counts = {**SMOLLM2, "max_tokens": 64, name: value}
    with pytest.raises(error, match=name):
        KVLayout(**counts)


@pytest.mark.parametrize("dtype", ["float64", "f8", np.int8, np.uint16, None, [], {}, ">f2"])
def test_bad_dtypes(dtype):
    with pytest.raises(ValueError, match=r"'float16', 'float32' and 'bfloat16' are possible"):
        KVLayout(1, 1, 1, 1, dtype=dtype)


def test_uint16_is_pointed_to_bfloat16():
    with pytest.raises(ValueError, match="say 'bfloat16'"):
        KVLayout(1, 1, 1, 1, dtype=np.uint16)


def test_bad_order_and_page():
    with pytest.raises(ValueError, match="order='rows'"):
        KVLayout(1, 1, 1, 1, order="rows")
    with pytest.raises(ValueError, match="power of two"):
        KVLayout(1, 1, 1, 1, page_bytes=5000)


@pytest.mark.parametrize("order", ORDERS)
def test_a_window_past_the_address_space_says_what_is_possible(order):
    with pytest.raises(ValueError, match=r"at most .* are possible, which is (\d+) tokens") as info:
        KVLayout(**SMOLLM2, max_tokens=1 << 45, order=order)
    most_tokens = int(str(info.value).split("which is ")[1].split()[0])
    fits = KVLayout(**SMOLLM2, max_tokens=most_tokens, order=order)
    assert fits.window_bytes <= MAX_BYTES
    with pytest.raises(ValueError, match="are possible"):
        KVLayout(**SMOLLM2, max_tokens=most_tokens + fits.page_bytes, order=order)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "place", [(-1, 0, 0, 0), (30, 0, 0, 0), (0, -1, 0, 0), (0, 64, 0, 0), (0, 0, 0, 3)]
)
def test_offset_outside_the_layout(order, place):
    with pytest.raises(PageBoundaryError, match=r"outside|has 3 KV heads"):
        KVLayout(**SMOLLM2, max_tokens=64, order=order).offset(*place)


def test_offset_knows_k_and_v_only():
    with pytest.raises(ValueError, match="kv=2"):
        KVLayout(**SMOLLM2, max_tokens=64).offset(0, 0, 2)
