"""Packed rows: ggml's bytes, whatever the processor; rotation; what cannot be packed."""

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_np
from quant_model import ROUNDED, read_back, rotated

from pagealloc.kv import quant

KINDS = ("q8_0", "q4_0", "int4")
GGML = {"q8_0": GGMLQuantizationType.Q8_0, "q4_0": GGMLQuantizationType.Q4_0}
BLOCK_BYTES = {"q8_0": 34, "q4_0": 18, "int4": 18}

# Smaller ones have a test of their own: what their scale's inverse is, no formula says.
sizes = st.floats(2.0**-100, 60000, width=32)
floats = st.just(0.0) | sizes | sizes.map(lambda size: -size)


def make_rows(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


@pytest.mark.parametrize("kind", GGML)
@pytest.mark.parametrize("scale", [1e-7, 1e-3, 1.0, 1e4])
def test_the_bytes_are_ggmls(kind, scale):
    rows = make_rows(1000, 4, 64) * np.float32(scale)
    packed = quant.quantize(rows, kind)
    expected = quants.quantize(rows.reshape(1000, 256), GGML[kind])
    np.testing.assert_array_equal(packed, expected)
    unpacked = quant.dequantize(packed, kind, (4, 64))
    expected = quants.dequantize(expected, GGML[kind]).reshape(rows.shape)
    np.testing.assert_array_equal(unpacked.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("kind", GGML)
def test_ties_go_as_ggmls(kind):
    """Halves between two steps, and two values that are the largest."""
    rows = np.random.default_rng(1).integers(-8, 9, (4000, 1, 32)).astype(np.float32) / 2
    expected = quants.quantize(rows[:, 0], GGML[kind])
    np.testing.assert_array_equal(quant.quantize(rows, kind), expected)


@pytest.mark.parametrize("kind", KINDS)
@given(block=st_np.arrays(np.float32, (1, 32), elements=floats))
def test_a_block_is_what_the_formula_says(kind, block):
    unpacked = quant.dequantize(quant.quantize(block, kind), kind, (1, 32))
    np.testing.assert_array_equal(unpacked, ROUNDED[kind](block))


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zeros(kind):
    rows = np.zeros((3, 2, 32), np.float32)
    rows[1] = -0.0
    assert not quant.dequantize(quant.quantize(rows, kind), kind, (2, 32)).any()


@pytest.mark.parametrize("kind", KINDS)
def test_next_to_nothing_becomes_zero(kind):
    """Values whose scale has no inverse, or none that float16 can hold."""
    for size in (1e-45, 1e-39, 1e-38, 1e-30, 1e-9):
        rows = make_rows(5, 1, 64) * np.float32(size)
        unpacked = quant.dequantize(quant.quantize(rows, kind), kind, (1, 64))
        assert np.abs(unpacked - rows).max() <= np.abs(rows).max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_block_with_no_number_is_no_number(kind, bad, dtype):
    rows = make_rows(2, 2, 64, dtype=dtype)
    rows[0, 1, 40] = bad
    unpacked = quant.dequantize(quant.quantize(rows, kind), kind, (2, 64))
    is_nan = np.zeros(rows.shape, bool)
    is_nan[0, 1, 32:] = True
    np.testing.assert_array_equal(np.isnan(unpacked), is_nan)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_dim", [16, 32, 64, 80, 96, 128, 512, 576, 1024])
@pytest.mark.parametrize("rotate", [False, True], ids=["plain", "rotated"])
def test_any_head(kind, head_dim, rotate):
    rows = make_rows(20, 4, head_dim)
    packed = quant.quantize(rows, kind, rotate=rotate)
    assert packed.shape == (20, 4 * head_dim // 32 * BLOCK_BYTES[kind])
    unpacked = quant.dequantize(packed, kind, (4, head_dim), rotate=rotate)
    np.testing.assert_array_equal(unpacked, read_back(rows, kind, rotate=rotate))


def test_a_rotation_is_its_own_inverse():
    rows = make_rows(10, 2, 64)
    np.testing.assert_allclose(rotated(rotated(rows)), rows, atol=1e-5)
    assert np.abs(rotated(rows) - rows).max() > 1


@pytest.mark.parametrize("kind", ["q4_0", "int4"])
def test_a_rotation_spreads_outliers(kind):
    rows = make_rows(100, 4, 64)
    rows[:, :, 3] *= 20
    errors = [
        np.sqrt(np.mean((read_back(rows, kind, rotate=rotate) - rows) ** 2))
        for rotate in (False, True)
    ]
    assert errors[1] < 0.6 * errors[0]


def test_the_symmetric_scale_is_the_worse_one():
    rows = make_rows(1000, 1, 128)
    q4_0, int4 = (np.mean((read_back(rows, kind) - rows) ** 2) for kind in ("q4_0", "int4"))
    assert 1.1 < int4 / q4_0 < 2


@pytest.mark.parametrize("kind", KINDS)
def test_all_float_types(kind):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    rows = make_rows(50, 2, 64).astype(ml_dtypes.bfloat16).astype(np.float32)  # all can hold these
    rows = rows.astype(np.float16).astype(np.float32)
    expected = quant.quantize(rows, kind)
    for dtype in (np.float16, ml_dtypes.bfloat16):
        packed = quant.quantize(rows.astype(dtype), kind)
        np.testing.assert_array_equal(packed, expected)
        unpacked = quant.dequantize(packed, kind, (2, 64), dtype=dtype)
        exact = quant.dequantize(packed, kind, (2, 64))
        assert unpacked.dtype == dtype
        np.testing.assert_array_equal(unpacked, exact.astype(dtype))


def test_every_half_is_read_and_written_as_numpy_does():
    bits = np.arange(65536, dtype=np.uint16)
    halves = bits.view(np.float16)[np.isfinite(bits.view(np.float16))]
    from pagealloc.kv import KVCache, KVLayout

    rows = np.resize(halves, (-(-len(halves) // 64), 1, 64))
    with KVCache(KVLayout(1, 1, 64, len(rows))) as cache:
        seq = cache.sequence()
        seq.append(0, rows, rows)
        np.testing.assert_array_equal(seq.k(0, dtype=np.float32), rows.astype(np.float32))


def test_any_layout_of_the_array():
    rows = make_rows(20, 4, 64)
    expected = quant.quantize(rows, "q8_0")
    strided = np.empty((40, 8, 128), np.float32)[::2, ::2, ::2]
    strided[:] = rows
    np.testing.assert_array_equal(quant.quantize(strided, "q8_0"), expected)
    np.testing.assert_array_equal(quant.quantize(rows[3], "q8_0"), expected[3])
    assert quant.quantize(rows[:0], "q8_0").shape == (0, 272)


CHECK = """
import sys
import numpy as np
from pagealloc.kv import quant

rows = np.random.default_rng(0).normal(size=(300, 3, 96)).astype(np.float32)
rows *= np.exp(np.random.default_rng(1).normal(size=rows.shape) * 3).astype(np.float32)
out = sys.stdout.buffer
for dtype in (np.float32, np.float16):
    for kind in ("q8_0", "q4_0", "int4"):
        for rotate in (False, True):
            packed = quant.quantize(rows.astype(dtype), kind, rotate=rotate)
            out.write(packed.tobytes())
            for back in (np.float32, np.float16):
                unpacked = quant.dequantize(packed, kind, (3, 96), rotate=rotate, dtype=back)
                out.write(unpacked.tobytes())
"""


def run_with(level, code=CHECK):
    return subprocess.run(
        [sys.executable, "-P", "-c", code],
        env=os.environ | {"PAGEALLOC_SIMD": level},
        capture_output=True,
    )


@pytest.mark.parametrize("level", quant.simd_levels())
def test_all_processors_make_the_same_bytes(level):
    made, expected = run_with(level), run_with("auto")
    assert made.returncode == expected.returncode == 0, made.stderr
    assert len(made.stdout) > 1_000_000
    assert made.stdout == expected.stdout


def test_loops_that_the_processor_cannot_run_are_refused():
    result = run_with("sse9", "import pagealloc.kv")
    assert b"PAGEALLOC_SIMD=sse9: this processor can run plain" in result.stderr
    assert result.returncode == 1


def test_what_cannot_be_packed():
    rows = make_rows(3, 2, 64)
    with pytest.raises(ValueError, match="kind='q5_0': 'q8_0', 'q4_0', 'int4' are possible"):
        quant.quantize(rows, "q5_0")
    with pytest.raises(ValueError, match="kind='float16'"):
        quant.quantize(rows, "float16")
    with pytest.raises(TypeError, match="float32, float16 and bfloat16 are possible"):
        quant.quantize(rows.astype(np.float64), "q8_0")
    with pytest.raises(ValueError, match=r"3 heads of 16 values: a multiple of 32"):
        quant.quantize(make_rows(2, 3, 16), "q8_0")
    with pytest.raises(ValueError, match=r"expected \(\.\.\., heads, head_dim\)"):
        quant.quantize(rows.ravel(), "q8_0")
    packed = quant.quantize(rows, "q8_0")
    with pytest.raises(ValueError, match=r"expected \(\.\.\., 272\)"):
        quant.dequantize(packed, "q8_0", (4, 64))
    with pytest.raises(TypeError, match="uint8"):
        quant.dequantize(packed.astype(np.int16), "q8_0", (2, 64))
    with pytest.raises(TypeError, match="are possible"):
        quant.dequantize(packed, "q8_0", (2, 64), dtype=np.int32)


def test_the_rounding_of_halves_near_all_steps():
    """Where value / scale is next to n + 1/2: the last bits of float32 decide."""
    edges = [n + half for n, half in itertools.product(range(-126, 127), (0.5,))]
    values = np.array(edges, np.float32)
    values = np.concatenate([np.nextafter(values, -1000), values, np.nextafter(values, 1000)])
    blocks = np.zeros((len(values), 1, 32), np.float32)
    blocks[:, 0, 0], blocks[:, 0, 1] = 127, values  # a scale of 1
    quantised = quant.dequantize(quant.quantize(blocks, "q8_0"), "q8_0", (1, 32))[:, 0, 1]
    exact = values.astype(np.float64)
    np.testing.assert_array_equal(quantised, np.sign(exact) * np.floor(np.abs(exact) + 0.5))
