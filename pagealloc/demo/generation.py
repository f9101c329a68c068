"""From a prompt to tokens: prefill in chunks, then one token after another."""

from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np

from pagealloc.demo.engine import Llama
from pagealloc.demo.kv_stores import KVStore
from pagealloc.demo.weights import Floats

__all__ = ["CHUNK_TOKENS", "Sampler", "generate", "prefill"]

CHUNK_TOKENS = 256
"""Prompts are computed this many tokens at a time."""


class Sampler:
    """Picks the next token: the likeliest at temperature 0, else a random one by weight."""

    def __init__(self, temperature: float = 0.0, seed: int | Sequence[int] = 0) -> None:
        if temperature < 0:
            raise ValueError(f"the temperature is at least 0, not {temperature}")
        self._temperature = temperature
        self._random = np.random.default_rng(seed)

    def __call__(self, logits: Floats) -> int:
        """Pick from the scores of one position: (vocab,) -> token id."""
        if self._temperature == 0:
            return int(logits.argmax())
        weights = np.exp((logits - logits.max()).astype(np.float64) / self._temperature)
        return int(self._random.choice(len(weights), p=weights / weights.sum()))


def prefill(
    model: Llama,
    kv: KVStore,
    token_ids: Sequence[int],
    on_chunk: Callable[[int], None] | None = None,
) -> Floats:
    """Compute a prompt in chunks.

    Parameters
    ----------
    model : Llama
    kv : KVStore
        Receives the K and V of the prompt, after the rows it already has.
    token_ids : sequence of int
        At least one token.
    on_chunk : callable, optional
        Called with the number of tokens of each chunk that is done.

    Returns
    -------
    (C,) float32
        The hidden state of the last token.
    """
    if not token_ids:
        raise ValueError("a prompt has at least one token")
    for start in range(0, len(token_ids), CHUNK_TOKENS):
        chunk = token_ids[start : start + CHUNK_TOKENS]
        hidden = model.forward(chunk, kv)  # (T, C)
        if on_chunk is not None:
            on_chunk(len(chunk))
    last: Floats = hidden[-1]
    return last


def generate(
    model: Llama,
    kv: KVStore,
    hidden: Floats,
    sampler: Sampler,
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
) -> Iterator[int]:
    """Yield the tokens of an answer, a stop token included.

    `hidden` is the hidden state of the prompt's last token, (C,).
    """
    for n_tokens in range(1, max_new_tokens + 1):
        token_id = sampler(model.logits(hidden[None])[0])
        yield token_id
        if token_id in stop_ids or n_tokens == max_new_tokens:
            return
        hidden = model.forward([token_id], kv)[0]
