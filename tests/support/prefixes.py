"""Prompts, and the rows that a model would compute for them: each depends on all tokens before."""

import functools

import numpy as np

from pagealloc.kv import KVLayout

N_LAYERS, N_HEADS, HEAD_DIM, BLOCK = 2, 2, 64, 4
ROWS_OF_TOKEN = (N_LAYERS, 2, N_HEADS, HEAD_DIM)
ORDERS = ["interleaved", "split", "block"]


def layout_of(order="block", max_tokens=64, **options):
    return KVLayout(
        N_LAYERS, N_HEADS, HEAD_DIM, max_tokens, order=order, block_tokens=BLOCK, **options
    )


def rows_of(tokens, *, start=0):
    """Rows (T, L, 2, H, D) as a model's: each depends on all tokens up to its own."""
    rows = np.empty((len(tokens) - start, *ROWS_OF_TOKEN), np.float16)
    for i in range(start, len(tokens)):
        rows[i - start] = last_rows(tuple(int(token) for token in tokens[: i + 1]))
    return rows


@functools.lru_cache(maxsize=20_000)
def last_rows(tokens):
    return np.random.default_rng(tokens).normal(size=ROWS_OF_TOKEN).astype(np.float16)


def compute(seq, tokens):
    """Append the rows of the tokens that are not there yet."""
    for row in rows_of(tokens, start=len(seq)):
        seq.append_token(row)


def publish(cache, tokens, **options):
    with cache.sequence(tokens) as seq:
        compute(seq, tokens)
        return seq.publish(**options)


def n_cached(cache, tokens):
    with cache.sequence(tokens) as seq:
        return seq.n_cached


def assert_rows(seq, tokens):
    expected = rows_of(tokens)
    for layer in range(N_LAYERS):
        np.testing.assert_array_equal(seq.k(layer, on_cross="copy"), expected[:, layer, 0])
        np.testing.assert_array_equal(seq.v(layer, on_cross="copy"), expected[:, layer, 1])
