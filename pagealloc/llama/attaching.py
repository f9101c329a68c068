"""attach: a `Llama` that saves into a `PageCache` and loads from it without copies in Python.

Structure
    ``llm.save_state`` and ``llm.load_state`` are replaced on the instance, by functions that hold
    the cache and, so that no circle keeps the model alive, the `Llama` weakly.
Locking
    None: a `Llama` is one thread's at a time.
"""

from __future__ import annotations

import warnings
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np

from pagealloc import LlamaStateError, OutOfMemoryError
from pagealloc.llama.contexts import SEQUENCE_HEADER
from pagealloc.llama.page_cache import PageCache
from pagealloc.llama.page_state import PageState

if TYPE_CHECKING:
    from llama_cpp import Llama
    from llama_cpp.llama import LlamaState

    from pagealloc.llama.page_cache import Binding

__all__ = ["attach", "detach"]

REPLACED = ("save_state", "load_state")


def attach(llm: Llama, cache: PageCache) -> None:
    """Set a cache on a `Llama`, and let its states pass without being copied in Python.

    Beside ``llm.set_cache(cache)`` this replaces ``llm.save_state`` and ``llm.load_state``: the
    former returns a `PageState`, whose rows are in the cache, and the latter takes these as well
    as llama-cpp-python's own.

    Parameters
    ----------
    llm : Llama
        Not one that makes embeddings.
    cache : PageCache
        Which may be other `Llama` objects' too.

    Raises
    ------
    ValueError
        It makes embeddings.
    OSError
        The model's file cannot be read any more.
    """
    binding = cache.binding(llm)
    binding.is_attached = True
    owner = weakref.ref(llm)

    def save_state() -> PageState:
        return _save(_alive(owner), cache, binding)

    def load_state(state: LlamaState) -> None:
        _load(_alive(owner), binding, state)

    llm.save_state, llm.load_state = save_state, load_state
    llm.set_cache(cache)


def detach(llm: Llama) -> None:
    """Take back what `attach` did."""
    if isinstance(llm.cache, PageCache):
        llm.cache.binding(llm).is_attached = False
    for name in REPLACED:
        vars(llm).pop(name, None)
    llm.set_cache(None)


def _alive(owner: weakref.ref[Llama]) -> Llama:
    llm = owner()
    if llm is None:
        raise ReferenceError("the Llama is gone")
    return llm


def _save(llm: Llama, cache: PageCache, binding: Binding) -> PageState:
    tokens = np.array(llm.input_ids[: llm.n_tokens], np.int32)
    if binding.context is None or not len(tokens):
        return cache._prompts.empty(binding)
    try:
        return cache._prompts.keep_present(binding, tokens)
    except OutOfMemoryError as error:  # a completion has its answer by now, which must not be lost
        warnings.warn(f"a prompt is not cached: {error}", RuntimeWarning, stacklevel=3)
        return cache._prompts.lost(binding, tokens, str(error))


def _load(llm: Llama, binding: Binding, state: Any) -> None:
    if not isinstance(state, PageState):
        type(llm).load_state(llm, state)
        return
    if binding.context is None or state.identity != binding.identity:
        raise LlamaStateError(
            "the state is of another model, adapter or RoPE setting: its rows mean nothing to this "
            "Llama"
        )
    if not state.n_tokens:
        binding.context.clear()
        return
    try:
        first = _n_present(llm, binding, state)
        blob = state.blob(SEQUENCE_HEADER, first)
        if first:
            binding.context.give_from(first, blob)
        else:
            binding.context.give(blob)
    except (LlamaStateError, OutOfMemoryError) as error:
        if not state.is_found:
            raise
        # A completion asked, which can compute the prompt as well.
        warnings.warn(f"a cached prompt is computed anew: {error}", RuntimeWarning, stacklevel=3)
        return
    llm.input_ids[: state.n_tokens] = state.tokens
    llm.n_tokens = state.n_tokens
    llm._requires_eval = True
    if not state.is_found:
        llm._seed = state.seed
    if state.kept_scores is not None and llm._logits_all:
        llm.scores[: state.n_tokens] = state.scores


def _n_present(llm: Llama, binding: Binding, state: PageState) -> int:
    """Return how many tokens of a state the `Llama` has, which need not be given.

    They are whose rows it would use for a prompt anyway, whatever computed them.  Of a state that
    was saved all is given: what comes back is what was there, to the bit.
    """
    n_tokens, context = llm.n_tokens, binding.context
    if context is None or not (state.is_found and state.has_rows and binding.takes_parts):
        return 0
    if not n_tokens or not context.has(n_tokens):
        return 0
    n = min(n_tokens, state.n_tokens - 1)
    differs = llm.input_ids[:n] != state.tokens[:n]
    return int(differs.argmax()) if differs.any() else n
