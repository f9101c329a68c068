"""Prompts: their states found and kept, as handles.

Purpose
    Decide how a state is kept: what of it is not known as blocks of rows, or all of it as it is.
Locking
    The lock of `HeldStates` for whole states; rows are copied without it.
Units
    Tokens.
"""

from __future__ import annotations

import warnings
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np

from pagealloc import LlamaStateError, OutOfMemoryError
from pagealloc.llama.bindings import asking_completion, shows_all_scores
from pagealloc.llama.kept_scores import PromptScores
from pagealloc.llama.model_states import Taken
from pagealloc.llama.page_state import PageState
from pagealloc.llama.state_blob import parse_state

if TYPE_CHECKING:
    import numpy.typing as npt

    from pagealloc.kv import Sequence
    from pagealloc.llama.bindings import Binding
    from pagealloc.llama.held_states import HeldStates
    from pagealloc.llama.model_states import ModelStates
    from pagealloc.llama.state_blob import RecordPlace

__all__ = ["Prompts"]


class Prompts:
    """Finds and keeps states in what is held.

    Parameters
    ----------
    held : HeldStates
        Of all models.
    """

    def __init__(self, held: HeldStates) -> None:
        self._held = held

    def empty(self, binding: Binding) -> PageState:
        """Return the state of a `Llama` that has no tokens."""
        return self._handle(binding, np.empty(0, np.int32), whole=memoryview(b""))

    def lost(self, binding: Binding, tokens: npt.NDArray[np.int32], reason: str) -> PageState:
        """Return a state that there was no memory for: who loads it is told."""
        return self._handle(binding, tokens, lost=reason)

    # --- keeping ------------------------------------------------------------------------------

    def keep_present(self, binding: Binding, tokens: npt.NDArray[np.int32]) -> PageState:
        """Keep the state that a `Llama` has; as `keep`, but only rows that are not known are taken.

        Logits of all tokens, if it has them, are kept for a completion that shows them: others
        like it will ask.  A program that saves a state has its own copy.

        Raises
        ------
        LlamaStateError
            llama.cpp gave none.
        OutOfMemoryError
            There is no memory to take it.
        """
        state, completion = self._keep_present(binding, tokens), asking_completion()
        if binding.n_scores and binding.context is not None:
            scores = binding.context.llm.scores[: len(tokens)]
            if completion is None:
                state.kept_scores = PromptScores(None, scores.copy())
            elif shows_all_scores(completion):
                state.kept_scores = self.keep_scores(binding, tokens, scores)
        return state

    def _keep_present(self, binding: Binding, tokens: npt.NDArray[np.int32]) -> PageState:
        context, states = binding.context, self._states(binding)
        assert context is not None
        if states is not None and binding.takes_parts and context.has(len(tokens)):

            def take(first: int) -> Taken:
                begin = min(first, len(tokens) - 1)  # of none it could not be seen to be right
                blob = memoryview(context.take_from(begin))
                return Taken(begin, blob, self._places(states, blob, any_sequences=True))

            with suppress(LlamaStateError, OutOfMemoryError):  # it may do as a whole
                sequence = states.keep(tokens, take, self._held.make_room)
                if len(sequence) == len(tokens):
                    return self._handle(binding, tokens, rows=(states, sequence))
                sequence.close()
        return self.keep(binding, tokens, memoryview(context.take()), is_asked=False)

    def keep(
        self,
        binding: Binding,
        tokens: npt.NDArray[np.int32],
        blob: memoryview,
        *,
        is_asked: bool = True,
    ) -> PageState:
        """Keep a state, and return a handle that restores all of its tokens.

        What the budget cannot hold is not kept; the handle has it all the same.  So it is with a
        state that cannot be taken apart, which, unless somebody asked for just this, is a warning:
        a completion has its answer by then.

        Raises
        ------
        LlamaStateError
            The state is malformed, or not of these tokens.
        """
        try:
            return self._keep(binding, tokens, blob)
        except LlamaStateError as error:
            if is_asked:
                raise
            warnings.warn(f"a prompt is not cached: {error}", RuntimeWarning, stacklevel=4)
            return self._handle(binding, tokens, whole=blob)

    def _keep(self, binding: Binding, tokens: npt.NDArray[np.int32], blob: memoryview) -> PageState:
        states = self._states(binding)
        if states is None:
            return self._keep_whole(binding, tokens, blob)
        places = self._places(states, blob)
        if len({len(place.positions) for place in places}) > 1:  # a window's rows are not all there
            return self._keep_whole(binding, tokens, blob)
        n_cells = len(places[0].positions)
        if n_cells != len(tokens):  # behind the state's own they may be any numbers
            raise LlamaStateError(f"the state holds {n_cells} tokens, not {len(tokens)}")
        try:
            sequence = states.keep(tokens, lambda _: Taken(0, blob, places), self._held.make_room)
        except OutOfMemoryError:  # with everything else evicted: the budget is for others
            return self._handle(binding, tokens, whole=blob)
        if len(sequence) < len(tokens):
            sequence.close()
            return self._handle(binding, tokens, whole=blob)
        return self._handle(binding, tokens, rows=(states, sequence))

    def _places(
        self, states: ModelStates, blob: memoryview, *, any_sequences: bool = False
    ) -> list[RecordPlace]:
        """Return where the rows of a state lie."""
        state_format, places = parse_state(blob, any_sequences=any_sequences)
        if state_format.records != states.state_format.records:
            raise LlamaStateError(
                "the state is not of the form that this model's states had before: "
                f"{state_format.records[0]!r:.200}"
            )
        return places

    def _keep_whole(
        self, binding: Binding, tokens: npt.NDArray[np.int32], blob: memoryview
    ) -> PageState:
        with self._held.lock:
            self._held.make_room(len(blob))
            if self._held.nbytes + len(blob) <= self._held.budget_bytes:
                self._held.whole.keep(binding.whole_identity, tokens, blob)
        return self._handle(binding, tokens, whole=blob)

    def keep_scores(
        self, binding: Binding, tokens: npt.NDArray[np.int32], scores: npt.NDArray[np.float32]
    ) -> PromptScores | None:
        """Keep the logits of a prompt, if there are those of all of its tokens."""
        if not binding.n_scores or scores.shape[1:] != (binding.n_scores,):
            return None
        store = self._held.scores(binding.identity, binding.n_scores, binding.max_tokens)
        return store.keep(tokens, scores[: len(tokens)], self._held.make_room)

    # --- finding ------------------------------------------------------------------------------

    def find(
        self,
        binding: Binding | None,
        tokens: npt.NDArray[np.int32],
        *,
        with_scores: bool = False,
    ) -> PageState | None:
        """Return the longest beginning of a prompt that is cached, with its logits if need be.

        Raises
        ------
        ClosedError
            The cache is closed.
        """
        if binding is None or not len(tokens):
            return None
        states, sequence = self._states(binding), None
        if states is not None:
            with suppress(OutOfMemoryError):  # there is none to map it: it can be computed
                sequence = states.find(tokens)
        if with_scores and binding.n_scores:
            return self._find_with_scores(binding, tokens, states, sequence)
        n_found = 0 if sequence is None else len(sequence)
        with self._held.lock:
            whole = self._held.whole.find(binding.whole_identity, tokens)
        if whole is not None and whole.n_tokens > n_found:
            blob = memoryview(whole.blob)
            return self._handle(binding, tokens[: whole.n_tokens], whole=blob, is_found=True)
        if states is None or sequence is None:
            return None
        return self._handle(binding, tokens[:n_found], rows=(states, sequence), is_found=True)

    def _find_with_scores(
        self,
        binding: Binding,
        tokens: npt.NDArray[np.int32],
        states: ModelStates | None,
        sequence: Sequence | None,
    ) -> PageState | None:
        """Return what was found, as far as its logits are there: who asks may show all of them."""
        if states is None or sequence is None:
            return None
        store = self._held.scores(binding.identity, binding.n_scores, binding.max_tokens)
        scores = store.find(tokens[: len(sequence)])
        if scores is None:
            sequence.close()
            return None
        sequence.truncate(scores.n_tokens)
        found = tokens[: scores.n_tokens]
        state = self._handle(binding, found, rows=(states, sequence), is_found=True)
        state.kept_scores = scores
        return state

    def _handle(
        self,
        binding: Binding,
        tokens: npt.NDArray[np.int32],
        *,
        rows: tuple[ModelStates, Sequence] | None = None,
        whole: memoryview | None = None,
        is_found: bool = False,
        lost: str = "",
    ) -> PageState:
        return PageState(
            binding.identity,
            tokens,
            n_ctx=binding.n_ctx,
            seed=binding.seed,
            rows=rows,
            whole=whole,
            context_header=binding.context_header,
            is_found=is_found,
            lost=lost,
        )

    def _states(self, binding: Binding) -> ModelStates | None:
        """Return what there is of a model; None where states are kept whole."""
        if binding.name is None:
            return None
        return self._held.states(binding.name)
