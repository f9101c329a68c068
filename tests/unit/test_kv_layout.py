import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagealloc.core.os_memory import page_size_bytes
from pagealloc.errors import PageBoundaryError
from pagealloc.kv import KVLayout, Rope, is_page_safe
from pagealloc.kv.row_table import RowTable
from pagealloc.units import MAX_BYTES

ORDERS = ("interleaved", "split", "block")
PAGES = (4096, 16384, 65536)
SMOLLM2 = {"n_layers": 30, "n_kv_heads": 3, "head_dim": 64}


def per_layer(numbers):
    """One number, or one a layer."""
    return st.one_of(numbers, st.lists(numbers, min_size=4, max_size=4))


def layouts(page_bytes=PAGES):
    return st.builds(
        KVLayout,
        n_layers=st.just(4),
        n_kv_heads=per_layer(st.integers(1, 4)),
        head_dim=per_layer(st.integers(1, 70)),
        v_head_dim=st.none() | st.integers(1, 70),
        max_tokens=st.integers(1, 90),
        dtype=st.sampled_from(("float16", "float32", "bfloat16")),
        v_dtype=st.sampled_from((None, "float16", "float32")),
        order=st.sampled_from(ORDERS),
        block_tokens=st.integers(1, 20),
        page_bytes=st.sampled_from(page_bytes),
        pad_rows=st.booleans(),
    )


def test_sizes_of_a_real_model():
    layout = KVLayout(**SMOLLM2, max_tokens=8192, page_bytes=4096)
    assert layout.row_bytes(0, 0) == layout.row_bytes(29, 1) == 384
    assert {(rows.k_stride, rows.v_stride) for rows in layout.layers} == {(768, 768)}
    assert layout.token_bytes == layout.token_stride_bytes == 23040
    assert layout.window_bytes == 30 * 8192 * 768
    assert layout.remap_tokens == 16
    in_blocks = KVLayout(**SMOLLM2, max_tokens=8192, order="block", page_bytes=4096)
    assert in_blocks.block_bytes == 16 * 23040
    assert layout.order == "interleaved"
    assert KVLayout(**SMOLLM2, max_tokens=8192).page_bytes == page_size_bytes()


def test_sixteen_tokens_of_an_8b_model_are_one_huge_page():
    layout = KVLayout(32, 8, 128, 8192, order="block")
    assert layout.layers[0].token_bytes == 4096
    assert layout.block_bytes == 2 << 20


@pytest.mark.parametrize("page_bytes", PAGES)
def test_interleaved_offsets(page_bytes):
    layout = KVLayout(**SMOLLM2, max_tokens=100, page_bytes=page_bytes)
    layer_bytes = -(-100 * 768 // page_bytes) * page_bytes
    assert [rows.base for rows in layout.layers] == [layer * layer_bytes for layer in range(30)]
    assert layout.offset(0, 0, 0) == 0
    assert layout.offset(7, 9, 0, 2) == 7 * layer_bytes + 9 * 768 + 2 * 128
    assert layout.offset(7, 9, 1, 2) == 7 * layer_bytes + 9 * 768 + 384 + 2 * 128
    assert layout.strides(7, 1) == (768, 128, 2)


@pytest.mark.parametrize("page_bytes", PAGES)
def test_split_offsets(page_bytes):
    layout = KVLayout(**SMOLLM2, max_tokens=100, order="split", page_bytes=page_bytes)
    layer_bytes = -(-100 * 768 // page_bytes) * page_bytes
    assert layout.offset(7, 9, 0, 2) == 7 * layer_bytes + 9 * 384 + 2 * 128
    assert layout.offset(7, 9, 1, 2) == 7 * layer_bytes + (100 + 9) * 384 + 2 * 128
    assert layout.strides(7, 1) == (384, 128, 2)


@pytest.mark.parametrize("page_bytes", PAGES)
def test_block_offsets(page_bytes):
    layout = KVLayout(
        **SMOLLM2, max_tokens=100, order="block", block_tokens=8, page_bytes=page_bytes
    )
    block_bytes = -(-8 * 23040 // page_bytes) * page_bytes
    assert layout.block_bytes == block_bytes
    assert [rows.base for rows in layout.layers] == [layer * 8 * 768 for layer in range(30)]
    assert layout.window_bytes == 13 * block_bytes
    assert layout.offset(7, 9, 1, 2) == block_bytes + 7 * 8 * 768 + 768 + 384 + 2 * 128
    assert layout.strides(7, 1) == (block_bytes, 768, 128, 2)


@given(layouts())
def test_rows_never_overlap_and_stay_in_the_window(layout):
    owners = np.zeros(layout.window_bytes, np.uint8)
    for layer in range(layout.n_layers):
        assert layout.order == "block" or layout.layers[layer].base % layout.page_bytes == 0
        for token in range(layout.max_tokens):
            for kv in (0, 1):
                offset, nbytes = layout.offset(layer, token, kv), layout.row_bytes(layer, kv)
                assert 0 <= offset <= layout.window_bytes - nbytes
                owners[offset : offset + nbytes] += 1
    assert owners.max() == 1
    assert owners.sum() == layout.max_tokens * layout.token_bytes
    assert layout.window_bytes % layout.page_bytes == 0


@given(layouts())
def test_padded_rows_stay_inside_a_page_or_start_on_one(layout):
    layout = dataclasses.replace(layout, pad_rows=True)
    for layer in range(layout.n_layers):
        for token in range(layout.max_tokens):
            for kv in (0, 1):
                offset, nbytes = layout.offset(layer, token, kv), layout.row_bytes(layer, kv)
                if nbytes <= layout.page_bytes:
                    assert is_page_safe(offset, nbytes, layout.page_bytes)
                else:
                    assert offset % layout.page_bytes == 0


@given(layouts(), st.data())
def test_strides_agree_with_offset(layout, data):
    layer = data.draw(st.integers(0, layout.n_layers - 1))
    token = data.draw(st.integers(0, layout.max_tokens - 1))
    kv = data.draw(st.integers(0, 1))
    head = data.draw(st.integers(0, layout.row_shape(layer, kv)[0] - 1))
    index = (token,) if layout.order != "block" else divmod(token, layout.block_tokens)
    expected = layout.offset(layer, 0, kv) + sum(
        i * stride for i, stride in zip((*index, head), layout.strides(layer, kv), strict=False)
    )
    assert layout.offset(layer, token, kv, head) == expected


@given(layouts(), st.data())
def test_the_tables_in_c_agree_with_offset(layout, data):
    table = RowTable(layout)
    layer = data.draw(st.integers(0, layout.n_layers - 1))
    kv = data.draw(st.integers(0, 1))
    start = data.draw(st.integers(0, layout.max_tokens - 1))
    end = data.draw(st.integers(start + 1, layout.max_tokens))
    assert table.place(layer, start, kv) == layout.offset(layer, start, kv)
    last = layout.offset(layer, end - 1, kv) + layout.row_bytes(layer, kv)
    first_page, last_page = layout.offset(layer, start, kv), last - 1
    assert table.access(layer, start, end, kv, end) == (
        layout.offset(layer, start, kv),
        last,
        first_page // layout.page_bytes,
        last_page // layout.page_bytes,
    )
    with pytest.raises(PageBoundaryError, match=f"outside the {end - 1} committed rows"):
        table.access(layer, start, end, kv, end - 1)
    with pytest.raises(PageBoundaryError):
        table.access(layout.n_layers, start, end, kv, end)


@given(layouts())
def test_remap_tokens_are_whole_pages(layout):
    if layout.order == "block":
        assert layout.remap_tokens == layout.block_tokens
        return
    for rows in layout.layers:
        for stride in (rows.k_stride, rows.v_stride):
            assert layout.remap_tokens * stride % layout.page_bytes == 0


def test_page_safe_against_a_byte_by_byte_model():
    for offset in range(40):
        for nbytes in range(1, 20):
            pages = {(offset + byte) // 16 for byte in range(nbytes)}
            assert is_page_safe(offset, nbytes, 16) == (len(pages) == 1)
    assert is_page_safe(0, page_size_bytes())
    assert not is_page_safe(1, page_size_bytes())
    assert is_page_safe(7, 0)


@pytest.mark.parametrize("numbers", [(-1, 8), (0, -8), (0, 8, 5000), (0, 8, 0)])
def test_page_safe_refuses_nonsense(numbers):
    with pytest.raises(ValueError, match=r"negative|power of two"):
        is_page_safe(*numbers)


def test_layers_that_differ():
    layout = KVLayout(
        3, (8, 1, 2), (64, 128, 64), 100, v_head_dim=32, k_dtype="float32", page_bytes=4096
    )
    assert layout.row_shape(0, 0) == (8, 64)
    assert layout.row_shape(1, 1) == (1, 32)
    assert layout.row_bytes(0, 0) == 8 * 64 * 4
    assert layout.row_bytes(2, 1) == 2 * 32 * 2
    assert not layout.is_uniform
    text = repr(layout)
    assert "8/1/2 KV heads x 64/128 (V 32) K float32 V float16" in text


def test_layers_alike_are_one_number():
    layout = KVLayout(3, [8, 8, 8], (64,) * 3, 100, v_head_dim=64, v_dtype="float16")
    assert layout == KVLayout(3, 8, 64, 100)
    assert layout.is_uniform
    assert KVLayout(1, 1, 8, 8, k_dtype="float32", v_dtype="float32") == KVLayout(
        1, 1, 8, 8, dtype="float32"
    )


@pytest.mark.parametrize("name", ["n_kv_heads", "head_dim", "v_head_dim"])
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ([1, 2], ValueError, "2 numbers for 3 layers"),
        ([1, 2, 0], ValueError, r"\[2\]=0: at least 1"),
        ([1, 2, 1.5], TypeError, r"\[2\] must be an integer"),
        ("123", TypeError, "must be an integer"),
    ],
)
def test_bad_numbers_per_layer(name, value, error, message):
    shape = {"n_layers": 3, "n_kv_heads": 2, "head_dim": 8, "max_tokens": 9, name: value}
    with pytest.raises(error, match=rf"{name}.*{message}|{message}"):
        KVLayout(**shape)


def test_rope_fits_the_heads():
    rope = Rope(n_dims=64)
    assert KVLayout(2, 2, 64, 8, rope=rope).rope is rope
    with pytest.raises(ValueError, match="rotates 64 values of K heads of 32"):
        KVLayout(2, 2, (64, 32), 8, rope=rope)
    with pytest.raises(TypeError, match="rope must be a Rope, not int"):
        KVLayout(2, 2, 64, 8, rope=10000)


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
    assert layout.dtype == layout.k_dtype == layout.v_dtype == name
    assert layout.storage_dtypes == (storage, storage)
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
    with pytest.raises(ValueError, match="possible are 'float16', 'float32', 'bfloat16', 'q8_0'"):
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
