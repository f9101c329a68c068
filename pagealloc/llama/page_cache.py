"""PageCache: the prompt cache of llama-cpp-python, in blocks that prompts share.

Purpose
    What `Llama.set_cache` takes: states in, states out, a budget.
Structure
    ::

        PageCache -- HeldStates -- ModelStates   one each model and type of rows: KV blocks under
             |            |                      a prefix index
             |            |-- KeptScores         logits, for Llama(logits_all=True)
             |            `-- WholeStates        states that cannot be taken apart
             `-- Binding                         one each Llama: its identity, and what its states
                                                 look like
Locking
    The lock of `HeldStates` guards the tables here, too; rows are copied without it.
Units
    Bytes and tokens.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from llama_cpp import BaseLlamaCache, Llama

from pagealloc import LlamaStateError, PageallocError
from pagealloc.llama.bindings import (
    Binding,
    asking_completion,
    binding_of,
    binding_of_nobody,
    shows_all_scores,
)
from pagealloc.llama.held_states import HeldStates
from pagealloc.llama.kv_sources import KVSources
from pagealloc.llama.model_states import StoredAs, new_blob
from pagealloc.llama.page_state import PageState
from pagealloc.llama.prompts import Prompts
from pagealloc.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable
    from typing import Self

    import numpy.typing as npt


__all__ = ["Binding", "PageCache", "PageCacheStats"]

STORED_TYPES = {"f16": None, "q8_0": "q8_0", "q4_0": "q4_0"}


class PageCacheStats(NamedTuple):
    """What a `PageCache` holds, and what was asked of it."""

    held_bytes: int
    budget_bytes: int
    n_models: int
    n_blocks: int
    n_pinned_blocks: int
    n_whole_states: int
    n_lookups: int
    n_hits: int
    n_asked_tokens: int
    n_hit_tokens: int
    n_evicted_blocks: int


class PageCache(BaseLlamaCache):  # type: ignore[misc]  # an untyped package's
    """Keeps the states of prompts for `Llama.set_cache`, each block of tokens once.

    Parameters
    ----------
    budget : int or str
        Most bytes it may hold, such as ``"2GiB"``: pages of memory, measured.
    quantize : bool
        Store K in 8 bits and V, rotated, in 4: ``k_type="q8_0", v_type="q4_0", rotate="v"``.
    k_type, v_type : {"f16", "q8_0", "q4_0"}
        As what K and V rows are stored.  "f16": as llama.cpp has them, bit by bit, also if that is
        another type; rows that llama.cpp has packed itself always are.
    rotate : {"", "k", "v", "kv"}, optional
        Which of them are multiplied by a Hadamard matrix before; by default what has 4 bits.
    salt : str or bytes, optional
        Names the owner: prompts of other salts are not found.
    path : path, optional
        Folder in which prompts are kept from one start of the program to the next; written by
        `save`, and by `close` or at exit.  Rows are read when a prompt first asks for them.  Needs
        the package xxhash (``pagealloc[disk]``).

    Notes
    -----
    Thread-safe, for any number of `Llama` objects, each of which is one thread's at a time.  A
    cached state belongs to one model, adapter and RoPE setting, see `model_identity`, whichever
    `Llama` it came from.

    Prompts are kept in blocks of 16 tokens, and share those they have in common, whoever computed
    them.  The longest match is restored.  States that cannot be taken apart (recurrent models,
    prompts longer than a sliding window) are kept as they are, and found by a prompt that begins
    with all their tokens.

    `pagealloc.llama.attach` makes a `Llama` save and load without the copies that `set_cache`
    alone cannot avoid.

    Examples
    --------
    >>> llm = Llama("model.gguf")  # doctest: +SKIP
    >>> llm.set_cache(PageCache("2GiB"))  # doctest: +SKIP
    """

    def __init__(
        self,
        budget: int | str = "2GiB",
        *,
        quantize: bool = False,
        k_type: str = "f16",
        v_type: str = "f16",
        rotate: str | None = None,
        salt: str | bytes | None = None,
        path: str | os.PathLike[str] | None = None,
        _owner: str | os.PathLike[str] | None = None,
    ) -> None:
        self.capacity_bytes = parse_bytes(budget, name="budget")
        stored_as = _stored_as(k_type, v_type, rotate, quantize=quantize)
        self._sources = KVSources(path, _owner)
        self._held = HeldStates(self.capacity_bytes, stored_as, salt, self._sources)
        self._lock = self._held.lock
        self._prompts = Prompts(self._held)
        self._bindings: weakref.WeakKeyDictionary[Llama, Binding] = weakref.WeakKeyDictionary()
        self._nobody: Binding | None = None
        self._n_lookups = self._n_hits = self._n_asked_tokens = self._n_hit_tokens = 0
        self._closed = False
        if path is not None:
            self._at_exit = weakref.finalize(self, _save_at_exit, self._sources, self._held)

    # --- what llama-cpp-python calls ----------------------------------------------------------

    def __bool__(self) -> bool:
        return True  # `if llm.cache:` asks whether there is one, not whether it is empty

    @property
    def cache_size(self) -> int:
        """Bytes held: of pages, and of whole states."""
        return self._held.nbytes

    def __contains__(self, key: object) -> bool:
        return self._prompts.find(self._caller(), _token_array(key)) is not None

    def __getitem__(self, key: Iterable[int]) -> PageState:
        binding, tokens = self._caller(), _token_array(key)
        state = self._prompts.find(
            binding, tokens, with_scores=shows_all_scores(asking_completion())
        )
        with self._lock:
            self._n_lookups += 1
            self._n_asked_tokens += len(tokens)
            if state is not None:
                self._n_hits += 1
                self._n_hit_tokens += state.n_tokens
        if state is None:
            raise KeyError(f"no cached prompt shares the beginning of these {len(tokens)} tokens")
        return state

    def __setitem__(self, key: Iterable[int], value: Any) -> None:
        if isinstance(value, PageState):  # `attach` had it saved into a cache already
            return
        tokens = np.asarray(value.input_ids[: value.n_tokens], np.int32)
        if not len(tokens):
            return
        blob = _aligned(value.llama_state)
        binding = self._caller(blob, n_ctx=len(value.input_ids))
        if binding is None:
            return
        self._prompts.keep(binding, tokens, blob, is_asked=binding is self._nobody)
        if shows_all_scores(asking_completion()):
            self._prompts.keep_scores(binding, tokens, value.scores)

    # --- what `attach` calls ------------------------------------------------------------------

    def binding(self, llm: Llama) -> Binding:
        """Return what the cache knows of a `Llama`; at first it looks, and computes a few tokens.

        Raises
        ------
        ValueError
            It makes embeddings.
        OSError
            The model's file cannot be read any more.
        """
        with self._lock:
            known = self._bindings.get(llm)
            if known is None:
                known = self._bindings[llm] = binding_of(llm, self._held)
            return known

    # --- for its owner ------------------------------------------------------------------------

    def pin(self, token_ids: Iterable[int]) -> int:
        """Keep a cached prompt, such as a system prompt, until it is unpinned.

        Returns
        -------
        int
            How many of its tokens are cached, and will stay: 0 if it was not computed yet.
        """
        tokens = _token_array(token_ids).tolist()
        return max((store.kv.prefixes.pin(tokens) for store in self._held.stores), default=0)

    def unpin(self, token_ids: Iterable[int]) -> int:
        """Take the pins of a prompt and of its beginnings back; return how many there were."""
        tokens = _token_array(token_ids).tolist()
        return sum(store.kv.prefixes.unpin(tokens) for store in self._held.stores)

    def clear(self) -> None:
        """Forget all prompts but pinned ones, and give their memory back."""
        self._held.clear()

    def trim(self) -> int:
        """Give back what is kept warm for the next prompt; return the bytes that went.

        It goes by itself after half a second.
        """
        return sum(store.kv.trim() for store in self._held.stores)

    def stats(self) -> PageCacheStats:
        """Return its numbers."""
        with self._lock:
            prefixes = [store.kv.prefixes.stats() for store in self._held.stores]
            return PageCacheStats(
                held_bytes=self.cache_size,
                budget_bytes=self.capacity_bytes,
                n_models=len(self._held.models),
                n_blocks=sum(each.n_blocks for each in prefixes),
                n_pinned_blocks=sum(each.n_pinned_blocks for each in prefixes),
                n_whole_states=len(self._held.whole),
                n_lookups=self._n_lookups,
                n_hits=self._n_hits,
                n_asked_tokens=self._n_asked_tokens,
                n_hit_tokens=self._n_hit_tokens,
                n_evicted_blocks=sum(each.n_evicted_blocks for each in prefixes),
            )

    def check(self) -> None:
        """Raise InvariantError if what the modules say must hold does not."""
        for store in self._held.stores:
            store.kv.check()

    def save(self) -> int:
        """Write all blocks to the files in `path`; return how many.

        Raises
        ------
        ValueError
            The cache has no path.
        OSError
            They cannot be written; what was there is there.
        """
        return self._sources.save(self._held.caches)

    def serve(self, folder: str | os.PathLike[str]) -> None:
        """Let other processes of this user find prompts here: ``PageCache.attach(folder)``.

        Parameters
        ----------
        folder : path
            Of sockets; made, for this user only, if it is missing.

        Raises
        ------
        OSError
            There can be no socket, others may open the folder, or another process serves there.
        """
        with self._lock:
            self._sources.serve(folder, self._held.caches)

    @classmethod
    def attach(
        cls, folder: str | os.PathLike[str], budget: int | str = "2GiB", **options: Any
    ) -> Self:
        """Return a cache that also finds prompts of the process that serves at a folder.

        Its rows are mapped, not copied.  What this process computes is its own, in its own budget.
        How rows are stored is the owner's to say; `salt` must be the owner's.  The owner may come
        later, and may go: then what was not restored yet is computed.

        Parameters
        ----------
        folder : path
            At which the owner serves.
        budget, **options
            As of `PageCache`.
        """
        return cls(budget, _owner=folder, **options)

    def close(self) -> None:
        """Write the files, if it has a path, and give all memory back.

        States that it handed out can be loaded no more.

        Raises
        ------
        BufferError
            Other processes have prompts of it: nothing was closed.
        OSError
            The files cannot be written: nothing was closed.
        """
        with self._lock:
            if self._sources.path is not None and not self._closed:
                self.save()
                self._at_exit.detach()
            self._held.close()
            self._closed = True
            self._bindings.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        stats = self.stats()
        return (
            f"<PageCache of {stats.n_blocks} blocks of {stats.n_models} models, "
            f"{format_bytes(stats.held_bytes)} of {format_bytes(stats.budget_bytes)}>"
        )

    # --- finding and keeping ------------------------------------------------------------------

    def _caller(self, blob: memoryview | None = None, n_ctx: int = 0) -> Binding | None:
        """Return what is known of the `Llama` whose method is asking.

        It does not say who it is, but it must not be given rows of another model, which llama.cpp
        would take: so the frame that called is looked at.  States that other code brings belong to
        nobody, and are found by such code only.
        """
        llm = sys._getframe(2).f_locals.get("self")
        if isinstance(llm, Llama):
            return self.binding(llm)
        with self._lock:
            if self._nobody is None and blob is not None:
                self._nobody = binding_of_nobody(blob, n_ctx, self._held)
            return self._nobody


def _aligned(state: bytes) -> memoryview:
    """Return a copy of a context's state whose rows can be looked at as numbers."""
    if not state:
        raise LlamaStateError("the state has no bytes")
    n_header_bytes = 4 + int.from_bytes(state[:4], "little")
    blob = new_blob(state[:n_header_bytes], len(state))
    blob[:] = state
    return blob


def _token_array(token_ids: Any) -> npt.NDArray[np.int32]:
    return np.asarray(token_ids, np.int32)


def _save_at_exit(sources: KVSources, held: HeldStates) -> None:
    try:
        sources.save(held.caches)
    except (OSError, PageallocError) as error:
        warnings.warn(f"prompts are not saved: {error}", RuntimeWarning, stacklevel=1)


def _stored_as(k_type: str, v_type: str, rotate: str | None, *, quantize: bool) -> StoredAs:
    if quantize:
        if (k_type, v_type, rotate) != ("f16", "f16", None):
            raise ValueError("quantize=True says k_type, v_type and rotate: leave them out")
        return StoredAs("q8_0", "q4_0", None)
    for name, value in (("k_type", k_type), ("v_type", v_type)):
        if value not in STORED_TYPES:
            raise ValueError(f"{name}={value!r}: {', '.join(map(repr, STORED_TYPES))} are possible")
    if rotate not in (None, "", "k", "v", "kv"):
        raise ValueError(f"rotate={rotate!r}: '', 'k', 'v' and 'kv' are possible")
    return StoredAs(STORED_TYPES[k_type], STORED_TYPES[v_type], rotate)
