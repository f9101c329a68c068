"""KeptScores: the logits of cached prompts, for contexts that keep those of all tokens.

Purpose
    A `Llama` made with ``logits_all=True`` has logits beside each token.  A prompt that it finds
    brings them along, since log probabilities of its tokens are asked for.
Structure
    A KV cache of one layer, in whose K rows the first half of a token's logits lies and in whose V
    rows the other: blocks of tokens, shared between prompts as their rows are.
Locking
    None of its own: each call makes a sequence of its own, and the KV cache serialises these.
Units
    Tokens, and bytes.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pagealloc import OutOfMemoryError
from pagealloc.kv import KVLayout
from pagealloc.llama.model_states import BLOCK_TOKENS

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from pagealloc.kv import KVCache, Sequence

__all__ = ["KeptScores", "PromptScores"]


class PromptScores(NamedTuple):
    """The logits of a prompt: of its first tokens in the cache, of the rest here."""

    sequence: Sequence | None
    rest: npt.NDArray[np.float32]

    @property
    def n_tokens(self) -> int:
        """How many tokens they are of."""
        return len(self.rest) + (0 if self.sequence is None else len(self.sequence))

    def array(self) -> npt.NDArray[np.float32]:
        """Return them, a row a token."""
        if self.sequence is None:
            return self.rest
        halves = [rows(0, on_cross="copy")[:, 0] for rows in (self.sequence.k, self.sequence.v)]
        return np.concatenate((np.concatenate(halves, axis=1), self.rest))


class KeptScores:
    """Logits of one model.

    Parameters
    ----------
    n_vocab : int
        Logits of a token.
    identity : bytes
        Of the model, see `model_identity`.
    new_kv : callable
        Makes the KV cache of a layout and further arguments of `KVCache`, or finds one.
    max_tokens : int
        Of a prompt; of longer ones the beginning is kept.
    budget_bytes : int
        Most bytes of pages.
    salt : str or bytes, optional
        Names the owner.
    """

    def __init__(
        self,
        n_vocab: int,
        identity: bytes,
        new_kv: Callable[[KVLayout, dict[str, Any]], KVCache],
        *,
        max_tokens: int,
        budget_bytes: int,
        salt: str | bytes | None,
    ) -> None:
        self._n_vocab = n_vocab
        self._n_first = -(-n_vocab // 2)
        layout = KVLayout(
            n_layers=1,
            n_kv_heads=1,
            head_dim=self._n_first,
            v_head_dim=n_vocab - self._n_first,
            max_tokens=-(-max_tokens // BLOCK_TOKENS) * BLOCK_TOKENS,
            dtype="float32",
            order="block",
            block_tokens=BLOCK_TOKENS,
        )
        self.kv = new_kv(layout, {"budget_bytes": budget_bytes, "salt": salt, "model": identity})
        self.last_use = 0.0
        n_blocks = min(layout.max_tokens // BLOCK_TOKENS, budget_bytes // layout.block_bytes)
        self._max_kept_tokens = n_blocks * BLOCK_TOKENS

    def keep(
        self,
        tokens: npt.NDArray[np.int32],
        scores: npt.NDArray[np.float32],
        make_room: Callable[[int], object],
    ) -> PromptScores:
        """Keep the logits of a prompt's whole blocks, and return those of all of its tokens.

        `make_room` is called with how many bytes it will take.  What does not fit even so is not
        kept, but returned.
        """
        n_kept = min(len(tokens) // BLOCK_TOKENS * BLOCK_TOKENS, self._max_kept_tokens)
        self.last_use = time.monotonic()
        sequence = self.kv.sequence(tokens[:n_kept])
        try:
            first = sequence.n_cached
            make_room((n_kept - first) // BLOCK_TOKENS * self.kv.layout.block_bytes)
            if first < n_kept:
                new = scores[first:n_kept, None]
                sequence.append(0, new[..., : self._n_first], new[..., self._n_first :])
            sequence.publish()
        except OutOfMemoryError:  # the budget is for others
            sequence.close()
            return PromptScores(None, scores.copy())
        return PromptScores(sequence, scores[n_kept:].copy())

    def find(self, tokens: npt.NDArray[np.int32]) -> PromptScores | None:
        """Return the logits of the longest beginning of a prompt that has some here."""
        self.last_use = time.monotonic()
        sequence = self.kv.sequence(tokens[: self._max_kept_tokens])
        if not len(sequence):
            sequence.close()
            return None
        return PromptScores(sequence, np.empty((0, self._n_vocab), np.float32))

    @property
    def nbytes(self) -> int:
        """Bytes of the pages of all rows."""
        return self.kv.committed_bytes

    def evict(self) -> bool:
        """Let go of the block used longest ago; False if all are needed."""
        return bool(self.kv.trim()) | self.kv.prefixes.evict()
