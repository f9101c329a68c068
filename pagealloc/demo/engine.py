"""A Llama forward pass in NumPy: RMSNorm, RoPE, grouped-query attention, SwiGLU.

Where K and V are kept is the KV store's business (`kv_stores`). The engine appends the new rows
of a layer, then has all rows of that layer copied as float32 into two work arrays of its own. So
the matrix products see the same shapes and strides whatever the store is, and their results agree
to the last bit.

Letters in shape comments: T new tokens, S tokens in the KV store afterwards, C hidden_dim,
H query heads, K KV heads, G = H / K query heads that share a KV head, D head_dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from pagealloc.demo.kv_stores import KVStore
from pagealloc.demo.weights import Floats, LayerWeights, LlamaShape, LlamaWeights, load_llama

__all__ = ["Llama"]

WORK_STEP_TOKENS = 512
"""The work arrays grow in steps of this many tokens."""


@dataclass(frozen=True)
class _Step:
    """What every layer of one forward pass shares."""

    n_rows: int  # S
    rotation: npt.NDArray[np.complex64]  # (T, rope_dim / 2)
    mask: Floats | None  # (T, S), or None where a single token may see every row


class Llama:
    """A Llama model that reads and writes its KV cache through a `KVStore`."""

    def __init__(self, shape: LlamaShape, weights: LlamaWeights) -> None:
        self.shape = shape
        self._weights = weights
        frequencies = shape.rope_base ** (-np.arange(0, shape.rope_dim, 2) / shape.rope_dim)
        if weights.rope_factors is not None:
            frequencies = frequencies / weights.rope_factors
        self._frequencies = frequencies / shape.rope_scale  # (rope_dim / 2,)
        self._k_work = self._v_work = np.empty((0, shape.n_kv_heads, shape.head_dim), np.float32)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read and dequantise a GGUF file."""
        return cls(*load_llama(path))

    def forward(self, token_ids: Sequence[int] | npt.NDArray[np.int64], kv: KVStore) -> Floats:
        """Run new tokens after those already in `kv`, and append their K and V to it.

        Returns
        -------
        (T, C) float32
            The normalised hidden states, ready for `logits`.
        """
        ids = np.asarray(token_ids, np.int64)  # (T,)
        step = self._begin_step(len(kv), len(ids))
        x = self._weights.embedding[ids]  # (T, C)
        for layer, weights in enumerate(self._weights.layers):
            x += self._attention(layer, weights, x, kv, step)
            x += self._feed_forward(weights, x)
        return self._norm(x, self._weights.out_norm)

    def logits(self, hidden: Floats) -> Floats:
        """Score every token of the vocabulary: (T, C) -> (T, vocab)."""
        return hidden @ self._weights.output.T

    def _attention(
        self, layer: int, weights: LayerWeights, x: Floats, kv: KVStore, step: _Step
    ) -> Floats:
        n_new, n_heads, n_kv = len(x), self.shape.n_heads, self.shape.n_kv_heads
        head_dim, group = self.shape.head_dim, n_heads // n_kv
        qkv = self._norm(x, weights.attention_norm) @ weights.qkv.T  # (T, (H + 2K) D)
        heads = qkv.reshape(n_new, n_heads + 2 * n_kv, head_dim)  # (T, H + 2K, D)
        turned = heads[:, :-n_kv, : self.shape.rope_dim].view(np.complex64)
        turned *= step.rotation[:, None, :]  # RoPE, in place, on Q and K
        kv.append(layer, heads[:, n_heads:-n_kv], heads[:, -n_kv:])
        k, v = self._k_work[: step.n_rows], self._v_work[: step.n_rows]  # (S, K, D)
        kv.read(layer, k, v)

        q_groups = heads[:, :n_heads].reshape(n_new, n_kv, group, head_dim).transpose(1, 2, 0, 3)
        q: Floats = q_groups.reshape(n_kv, group * n_new, head_dim)  # (K, G T, D)
        scores: Floats = q @ k.transpose(1, 2, 0)  # (K, G T, S)
        scores *= np.float32(head_dim**-0.5)
        if step.mask is not None:
            scores.reshape(n_kv, group, n_new, step.n_rows)[...] += step.mask
        _softmax_in_place(scores)
        mixed: Floats = scores @ v.transpose(1, 0, 2)  # (K, G T, D)
        mixed = mixed.reshape(n_heads, n_new, head_dim).transpose(1, 0, 2)  # (T, H, D)
        return mixed.reshape(n_new, n_heads * head_dim) @ weights.attention_out.T  # (T, C)

    def _feed_forward(self, weights: LayerWeights, x: Floats) -> Floats:
        gate_up = self._norm(x, weights.ffn_norm) @ weights.gate_up.T  # (T, 2F)
        gate, up = np.split(gate_up, 2, axis=1)
        mixed: Floats = np.tanh(gate * np.float32(0.5))  # sigmoid(gate) = (tanh(gate / 2) + 1) / 2
        mixed += 1
        mixed *= np.float32(0.5) * gate
        mixed *= up  # SwiGLU: gate * sigmoid(gate) * up, (T, F)
        return mixed @ weights.ffn_down.T  # (T, C)

    def _norm(self, x: Floats, weight: Floats) -> Floats:
        mean_square = np.mean(x * x, axis=-1, keepdims=True)  # (T, 1)
        normalised: Floats = x / np.sqrt(mean_square + np.float32(self.shape.norm_epsilon))
        normalised *= weight
        return normalised

    def _begin_step(self, n_before: int, n_new: int) -> _Step:
        n_rows = n_before + n_new
        if n_rows > len(self._k_work):
            steps = -(-n_rows // WORK_STEP_TOKENS)
            work_shape = (steps * WORK_STEP_TOKENS, *self._k_work.shape[1:])
            self._k_work = np.empty(work_shape, np.float32)
            self._v_work = np.empty(work_shape, np.float32)
        positions = np.arange(n_before, n_rows)  # (T,)
        rotation = np.exp(1j * positions[:, None] * self._frequencies).astype(np.complex64)
        mask = None
        if n_new > 1:
            future = positions[:, None] < np.arange(n_rows)  # (T, S)
            mask = np.where(future, np.float32(-np.inf), np.float32(0))
        return _Step(n_rows, rotation, mask)


def _softmax_in_place(scores: Floats) -> None:
    """Softmax over the last axis."""
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
