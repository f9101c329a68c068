"""Bindings: what a cache knows of the `Llama` objects that use it."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llama_cpp import Llama

from pagealloc import LlamaStateError
from pagealloc.llama.contexts import Context, proven_format
from pagealloc.llama.model_identity import model_identity

if TYPE_CHECKING:
    from pagealloc.llama.held_states import HeldStates

__all__ = ["Binding", "asking_completion", "binding_of", "binding_of_nobody", "shows_all_scores"]

NOBODY = bytes(32)
"""Identity of states that no `Llama` stands behind."""


@dataclass
class Binding:
    """What a cache knows of a `Llama`; `name` is None where states are kept whole.

    `takes_parts` says whether some of its tokens can be taken and given alone, `n_scores` how many
    logits it keeps of each token: none unless ``logits_all``.
    """

    identity: bytes
    name: str | None
    context: Context | None
    n_ctx: int
    context_header: bytes
    takes_parts: bool = False
    n_scores: int = 0
    max_tokens: int = 0
    is_attached: bool = False

    @property
    def whole_identity(self) -> bytes:
        """Identity of whole states, whose form depends on who makes them."""
        return self.identity + (b"sequence" if self.is_attached else b"context")

    @property
    def seed(self) -> int:
        """The seed of the `Llama`."""
        return int(self.context.llm._seed) if self.context is not None else 0


def binding_of(llm: Llama, held: HeldStates) -> Binding:
    """Return what there is to know of a `Llama`, which computes a few tokens if it has none.

    Raises
    ------
    ValueError
        It makes embeddings.
    OSError
        The model's file cannot be read any more.
    """
    context, identity = Context(llm), model_identity(llm)
    max_tokens = max(context.n_ctx, llm._model.n_ctx_train())
    name, takes_parts = None, False
    try:
        state_format, takes_parts = context.prove_format()
        name = held.name_of(identity, state_format, context.head_dim, max_tokens)
    except LlamaStateError as error:
        warnings.warn(
            f"states of {llm.model_path} are kept whole, and found only by prompts that begin "
            f"with all of their tokens: {error}",
            RuntimeWarning,
            stacklevel=4,
        )
    return Binding(
        identity,
        name,
        context,
        context.n_ctx,
        context.context_header,
        takes_parts=takes_parts,
        n_scores=llm.n_vocab() if llm._logits_all else 0,
        max_tokens=max_tokens,
    )


def binding_of_nobody(blob: memoryview, n_ctx: int, held: HeldStates) -> Binding:
    """Return what a state tells that other code brings.

    Raises
    ------
    LlamaStateError
        It cannot be taken apart.
    """
    state_format = proven_format(blob)
    name = held.name_of(NOBODY, state_format, 0, n_ctx)
    return Binding(NOBODY, name, None, n_ctx, state_format.header)


def asking_completion() -> dict[str, Any] | None:
    """Return the variables of the completion that is asking; None if nothing but a program is.

    The interface of caches does not tell which: the frames that called are looked at.
    """
    code = getattr(getattr(Llama, "_create_completion", None), "__code__", None)
    frame = sys._getframe(1).f_back
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return None if frame is None else frame.f_locals


def shows_all_scores(completion: dict[str, Any] | None) -> bool:
    """Return whether a completion shows log probabilities of its prompt's tokens, too."""
    return (
        completion is not None
        and bool(completion.get("echo"))
        and completion.get("logprobs") is not None
    )
