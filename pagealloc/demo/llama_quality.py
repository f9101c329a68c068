"""What it costs a text that llama.cpp goes on with that its beginning was stored in fewer bits."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from pagealloc.demo.perplexity import Quality

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy.typing as npt
    from llama_cpp import Llama

__all__ = ["restored_quality"]


def restored_quality(llm: Llama, texts: Iterable[Sequence[int]], n_prefix_tokens: int) -> Quality:
    """Read texts with and without having their beginnings saved and restored.

    Parameters
    ----------
    llm : Llama
        Attached to a cache, with ``logits_all=True``.
    texts : iterable of sequence of int
        Tokens, more than `n_prefix_tokens` + 1 each.
    n_prefix_tokens : int
        How many are saved and restored.

    Returns
    -------
    Quality
        Of the tokens behind the beginnings.
    """
    losses, kl, n_same, n_targets = [0.0, 0.0], 0.0, 0, 0
    for tokens in texts:
        targets = np.array(tokens[n_prefix_tokens + 1 :])
        found = []
        for is_restored in (False, True):
            llm.reset()
            llm.eval(tokens[:n_prefix_tokens])
            if is_restored:
                llm.load_state(llm.save_state())
            llm.eval(tokens[n_prefix_tokens:])
            found.append(_log_probabilities(llm.scores[n_prefix_tokens : len(tokens) - 1]))
            losses[is_restored] -= float(found[-1][np.arange(len(targets)), targets].sum())
        kl += float((np.exp(found[0]) * (found[0] - found[1])).sum())
        n_same += int((found[0].argmax(axis=1) == found[1].argmax(axis=1)).sum())
        n_targets += len(targets)
    return Quality(
        perplexity=math.exp(losses[1] / n_targets),
        float16_perplexity=math.exp(losses[0] / n_targets),
        mean_kl=kl / n_targets,
        same_top_percent=100 * n_same / n_targets,
    )


def _log_probabilities(scores: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    logits = scores.astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    normal: npt.NDArray[np.float64] = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return normal
