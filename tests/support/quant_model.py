"""What quantised rows must read back as, said in NumPy: slow, and plainly ggml's formulas."""

import numpy as np

BLOCK_VALUES = 32


def blocks_of(rows):
    return np.ascontiguousarray(rows, np.float32).reshape(-1, BLOCK_VALUES)


def inverse(scale):
    with np.errstate(divide="ignore"):
        return np.where(scale == 0, np.float32(0), np.float32(1) / scale)


def stored(scale):
    """A scale as float16 keeps it."""
    return scale.astype(np.float16).astype(np.float32)


def rounded_q8_0(rows):
    """Rows (..., H, D) as q8_0 gives them back."""
    blocks = blocks_of(rows)
    scale = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    exact = (blocks * inverse(scale)).astype(np.float64)
    quants = np.sign(exact) * np.floor(np.abs(exact) + 0.5)
    return (quants.astype(np.float32) * stored(scale)).reshape(rows.shape)


def nibbles(blocks, scale):
    shifted = blocks * inverse(scale) + np.float32(8.5)
    return np.minimum(np.trunc(shifted), 15).astype(np.float32)


def rounded_q4_0(rows):
    """Rows (..., H, D) as q4_0 gives them back."""
    blocks = blocks_of(rows)
    first = np.abs(blocks).argmax(axis=1)[:, None]
    scale = np.take_along_axis(blocks, first, axis=1) / np.float32(-8)
    return ((nibbles(blocks, scale) - 8) * stored(scale)).reshape(rows.shape)


def rounded_int4(rows):
    """Rows (..., H, D) as int4 gives them back."""
    blocks = blocks_of(rows)
    scale = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(7)
    return ((nibbles(blocks, scale) - 8) * stored(scale)).reshape(rows.shape)


ROUNDED = {"q8_0": rounded_q8_0, "q4_0": rounded_q4_0, "int4": rounded_int4}


def rotated(rows):
    """Rows (..., H, D), each head times a Hadamard matrix, in groups of a power of two."""
    head_dim = rows.shape[-1]
    group = min(head_dim & -head_dim, 512)
    values = np.ascontiguousarray(rows, np.float32).reshape(-1, group)
    width = group // 2
    while width:
        pairs = values.reshape(-1, 2, width)
        values = np.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], axis=1)
        width //= 2
    values = values.reshape(-1, group) * np.float32(1 / np.sqrt(np.float64(group)))
    return values.reshape(rows.shape)


def read_back(rows, kind, *, rotate=False):
    """Rows (..., H, D) of any float type as the cache gives them back, float32."""
    rows = np.asarray(rows, np.float32)
    if kind not in ROUNDED:
        return rows
    if rotate:
        return rotated(ROUNDED[kind](rotated(rows)))
    return ROUNDED[kind](rows)


def recommended(rows, kv, n_cold):
    """K (kv 0) or V rows (T, H, D) as a cache with quantize="recommended" gives them back."""
    kind, rotate = [("q8_0", False), ("q4_0", True)][kv]
    packed = read_back(rows[:n_cold], kind, rotate=rotate)
    return np.concatenate([packed, np.asarray(rows[n_cold:], np.float32)])


def assert_recommended(seq, layer, kv, rows):
    """The rows of a layer of such a cache are what is left of these."""
    found = (seq.v if kv else seq.k)(layer)
    np.testing.assert_array_equal(found, recommended(rows, kv, seq._cold.layer_lengths[layer]))
