"""PageState: a handle on a state that a `PageCache` keeps, in the shape of a `LlamaState`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from llama_cpp.llama import LlamaState

from pagealloc import LlamaStateError

if TYPE_CHECKING:
    import numpy.typing as npt

    from pagealloc.kv import Sequence
    from pagealloc.llama.kept_scores import PromptScores
    from pagealloc.llama.model_states import ModelStates

__all__ = ["PageState"]

NO_TOKEN = -1
"""Fills `input_ids` behind the tokens: 0 is a token, and might pass for one of the prompt."""


class PageState(LlamaState):  # type: ignore[misc]  # an untyped package's
    """What `PageCache` finds or keeps: the rows stay where they are until they are asked for.

    Attributes
    ----------
    input_ids : ndarray of int32, shape (n_ctx,)
        The tokens, and -1 behind them.
    n_tokens : int
        How many.
    seed : int
        The seed of the `Llama` when it was saved, or now if it was found.

    Notes
    -----
    Memory is held as long as the handle lives: of a found state only what others share anyway.
    Not thread-safe.
    """

    def __init__(
        self,
        identity: bytes,
        tokens: npt.NDArray[np.int32],
        *,
        n_ctx: int,
        seed: int,
        rows: tuple[ModelStates, Sequence] | None = None,
        whole: memoryview | None = None,
        context_header: bytes = b"",
        is_found: bool = False,
        lost: str = "",
    ) -> None:
        self.identity = identity
        self.n_tokens = len(tokens)
        self.input_ids = np.full(max(n_ctx, len(tokens)), NO_TOKEN, np.intc)
        self.input_ids[: len(tokens)] = tokens
        self.seed = seed
        self.is_found = is_found
        self.kept_scores: PromptScores | None = None
        self._rows = rows
        self._whole = whole
        self._lost = lost
        self._context_header = context_header

    @property
    def tokens(self) -> npt.NDArray[np.int32]:
        """The tokens alone."""
        return self.input_ids[: self.n_tokens]

    @property
    def has_rows(self) -> bool:
        """Whether some of its tokens can be had alone."""
        return self._rows is not None

    def blob(self, header: bytes, first: int = 0) -> Any:
        """Return a buffer that llama.cpp reads, with this header, of the tokens from `first` on.

        Raises
        ------
        LlamaStateError
            There was no memory to save it.
        OutOfMemoryError
            There is no memory for it.
        """
        if self._lost:
            raise LlamaStateError(f"the state was not saved: {self._lost}")
        if self._rows is None:
            return self._whole
        states, sequence = self._rows
        return states.blob(sequence, header, first)

    # --- what `Llama.load_state` reads of a `LlamaState` --------------------------------------

    @property
    def llama_state_size(self) -> int:
        """Bytes of `llama_state`."""
        if self._rows is None:
            return len(self._whole or b"")
        return self._rows[0].blob_bytes(self.n_tokens, self._context_header)

    @property
    def llama_state(self) -> bytes:
        """The state of a whole context, a copy."""
        return bytes(self.blob(self._context_header))

    @property
    def scores(self) -> npt.NDArray[np.float32]:
        """Logits of the tokens; a row of zeros for all of them where nobody needs them."""
        if self.kept_scores is None:
            return np.zeros((1, 1), np.float32)
        return self.kept_scores.array()
