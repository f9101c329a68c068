"""What storing K and V in fewer bits costs: perplexity of a text, and its distance from float16.

The text is read through a KV cache, in chunks: each reads the rows of all before it.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pagealloc.demo.engine import Llama
from pagealloc.demo.kv_stores import PagedKV, paged_layout
from pagealloc.kv import KVCache

__all__ = ["Quality", "compare_with_float16", "perplexity", "pool"]

Doubles = npt.NDArray[np.float64]

CHUNK_TOKENS = 64


@dataclass(frozen=True)
class Quality:
    """A text read through a cache of one kind, and through a float16 one."""

    perplexity: float
    """exp of the mean negative log likelihood of each token after the first."""
    float16_perplexity: float
    mean_kl: float
    """Mean Kullback-Leibler divergence of the next token's distribution from float16's, in nats."""
    same_top_percent: float
    """How often the likeliest next token is the same."""

    @property
    def change_percent(self) -> float:
        """By how much perplexity lies above float16's."""
        return 100 * (self.perplexity / self.float16_perplexity - 1)


def pool(qualities: Sequence[Quality]) -> Quality:
    """Return what texts of the same length come to together."""

    def mean(values: Iterable[float]) -> float:
        return float(np.mean(list(values)))

    return Quality(
        perplexity=math.exp(mean(math.log(each.perplexity) for each in qualities)),
        float16_perplexity=math.exp(mean(math.log(each.float16_perplexity) for each in qualities)),
        mean_kl=mean(each.mean_kl for each in qualities),
        same_top_percent=mean(each.same_top_percent for each in qualities),
    )


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
    ids = _text(token_ids)
    with KVCache(paged_layout(model.shape, len(ids), kv_dtype)) as cache:
        kv = PagedKV(cache.sequence())
        total = sum(
            _negative_log_likelihood(_log_probabilities(model, kv, chunk), targets)
            for chunk, targets in _chunks(ids)
        )
    return math.exp(total / (len(ids) - 1))


def compare_with_float16(
    model: Llama,
    token_ids: Sequence[int],
    kinds: Mapping[str, Mapping[str, Any]],
) -> dict[str, Quality]:
    """Read a text through caches of several kinds, chunk by chunk beside a float16 one.

    Parameters
    ----------
    model : Llama
    token_ids : sequence of int
        The text, at least two tokens.
    kinds : mapping
        Arguments of `KVCache` by name.
    """
    ids = _text(token_ids)
    layout = paged_layout(model.shape, len(ids))
    with ExitStack() as stack:

        def open_store(arguments: Mapping[str, Any]) -> PagedKV:
            return PagedKV(stack.enter_context(KVCache(layout, **arguments)).sequence())

        base, stores = open_store({}), {name: open_store(kinds[name]) for name in kinds}
        base_loss, sums = 0.0, {name: np.zeros(3) for name in kinds}
        for chunk, targets in _chunks(ids):
            expected = _log_probabilities(model, base, chunk)  # (T, vocab)
            base_loss += _negative_log_likelihood(expected, targets)
            for name, kv in stores.items():
                found = _log_probabilities(model, kv, chunk)
                pairs = expected[: len(targets)], found[: len(targets)]
                sums[name] += (
                    _negative_log_likelihood(found, targets),
                    (np.exp(pairs[0]) * (pairs[0] - pairs[1])).sum(),
                    (pairs[0].argmax(axis=-1) == pairs[1].argmax(axis=-1)).sum(),
                )
    n_targets = len(ids) - 1
    base_perplexity = math.exp(base_loss / n_targets)
    return {
        name: Quality(
            perplexity=math.exp(loss / n_targets),
            float16_perplexity=base_perplexity,
            mean_kl=float(divergence / n_targets),
            same_top_percent=float(100 * n_same / n_targets),
        )
        for name, (loss, divergence, n_same) in sums.items()
    }


def _text(token_ids: Sequence[int]) -> npt.NDArray[np.int64]:
    if len(token_ids) < 2:
        raise ValueError("perplexity needs at least two tokens")
    return np.asarray(token_ids, np.int64)


def _chunks(
    ids: npt.NDArray[np.int64],
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Cut a text into tokens to read, and those that follow each of them."""
    for start in range(0, len(ids) - 1, CHUNK_TOKENS):
        chunk = ids[start : start + CHUNK_TOKENS]
        yield chunk, ids[start + 1 : start + 1 + len(chunk)]


def _log_probabilities(model: Llama, kv: PagedKV, chunk: npt.NDArray[np.int64]) -> Doubles:
    logits: Doubles = model.logits(model.forward(chunk, kv)).astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return logits  # (T, vocab)


def _negative_log_likelihood(log_probabilities: Doubles, targets: npt.NDArray[np.int64]) -> float:
    return -float(log_probabilities[np.arange(len(targets)), targets].sum())
