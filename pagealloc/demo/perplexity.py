"""Perplexity of a text, read through a KV cache of a given type.

The one figure that says what storing K and V in fewer bits costs.
"""

import math
from collections.abc import Sequence

import numpy as np

from pagealloc.demo.engine import Llama
from pagealloc.demo.kv_stores import PagedKV, paged_layout
from pagealloc.kv import KVCache

__all__ = ["perplexity"]

PERPLEXITY_CHUNK_TOKENS = 64
"""Every chunk reads the rows of all chunks before it out of the cache."""


def perplexity(model: Llama, token_ids: Sequence[int], kv_dtype: str = "float16") -> float:
    """Return exp of the mean negative log likelihood of each token after the first.

    Parameters
    ----------
    model : Llama
    token_ids : sequence of int
        The text, at least two tokens.
    kv_dtype : str
        How the cache stores K and V: a type that `KVLayout` knows.
    """
    if len(token_ids) < 2:
        raise ValueError("perplexity needs at least two tokens")
    ids = np.asarray(token_ids, np.int64)  # (T,)
    cache = KVCache(paged_layout(model.shape, len(ids), kv_dtype))
    kv = PagedKV(cache.sequence())
    negative_log_likelihood = 0.0
    for start in range(0, len(ids) - 1, PERPLEXITY_CHUNK_TOKENS):
        chunk = ids[start : start + PERPLEXITY_CHUNK_TOKENS]
        targets = ids[start + 1 : start + 1 + len(chunk)]
        logits = model.logits(model.forward(chunk, kv))[: len(targets)].astype(np.float64)
        logits -= logits.max(axis=-1, keepdims=True)  # (T, vocab)
        log_total = np.log(np.exp(logits).sum(axis=-1))  # (T,)
        chosen = logits[np.arange(len(targets)), targets]
        negative_log_likelihood += float((log_total - chosen).sum())
    kv.close()
    cache.close()
    return math.exp(negative_log_likelihood / (len(ids) - 1))
