"""HeldStates: what a cache holds of all models, in one budget.

Purpose
    Makes what there is of a model when it is first asked for, and lets go of what was used longest
    ago when the budget is full.
Locking
    lock guards the tables and the whole states; rows are copied without it.
Units
    Bytes and tokens.
"""

from __future__ import annotations

import threading
from functools import partial
from hashlib import blake2b
from typing import TYPE_CHECKING

from pagealloc import ClosedError
from pagealloc.llama.kept_scores import KeptScores
from pagealloc.llama.model_states import ModelStates, StoredAs
from pagealloc.llama.whole_states import WholeStates

if TYPE_CHECKING:
    from collections.abc import Callable

    from pagealloc.kv import KVCache
    from pagealloc.llama.kv_sources import KVSources
    from pagealloc.llama.state_blob import StateFormat

__all__ = ["HeldStates"]


class HeldStates:
    """States and logits, by model.

    Parameters
    ----------
    budget_bytes : int
        Most bytes of all.
    stored_as : StoredAs
        How rows are stored.
    salt : str or bytes, optional
        Names the owner.
    sources : KVSources
        Where KV caches come from.
    """

    def __init__(
        self,
        budget_bytes: int,
        stored_as: StoredAs,
        salt: str | bytes | None,
        sources: KVSources,
    ) -> None:
        self.lock = threading.RLock()
        self.budget_bytes = budget_bytes
        self.models: dict[str, ModelStates] = {}
        self._scores: dict[str, KeptScores] = {}
        self._makers: dict[str, Callable[[], ModelStates]] = {}
        self._stored_as = stored_as
        self._salt = salt
        self._key = blake2b(salt.encode() if isinstance(salt, str) else salt or b"").digest()
        self._sources = sources
        self._closed = False
        self.whole = WholeStates(self._key)

    # --- by model -----------------------------------------------------------------------------

    def name_of(
        self, identity: bytes, state_format: StateFormat, head_dim: int, max_tokens: int
    ) -> str:
        """Return the name of what there is of a model, which is made if it is new.

        Raises
        ------
        ClosedError
            The cache is closed.
        LlamaStateError
            The rows cannot be kept as blocks.
        """
        self._check_open()
        name = self._name(identity, repr(state_format.records).encode())
        with self.lock:
            if name not in self.models:
                self._makers[name] = partial(
                    ModelStates,
                    state_format,
                    identity,
                    self._stored_as,
                    partial(self._sources.new, name),
                    head_dim=head_dim,
                    max_tokens=max_tokens,
                    budget_bytes=self.budget_bytes,
                    salt=self._salt,
                )
                self.models[name] = self._makers[name]()
        return name

    def states(self, name: str) -> ModelStates:
        """Return what there is of a model.

        Raises
        ------
        ClosedError
            The cache is closed.
        """
        with self.lock:
            self._check_open()
            states = self.models[name]
            if self._sources.may_join(name) and states.is_empty:
                states.kv.close()  # it was there before its owner
                states = self.models[name] = self._makers[name]()
            return states

    def scores(self, identity: bytes, n_vocab: int, max_tokens: int) -> KeptScores:
        """Return the logits of a model, which are made if they are new.

        Raises
        ------
        ClosedError
            The cache is closed.
        """
        name = self._name(identity, b"%d logits" % n_vocab)
        with self.lock:
            self._check_open()
            if name not in self._scores:
                self._scores[name] = KeptScores(
                    n_vocab,
                    identity,
                    partial(self._sources.new, name),
                    max_tokens=max_tokens,
                    budget_bytes=self.budget_bytes,
                    salt=self._salt,
                )
            return self._scores[name]

    def _name(self, identity: bytes, what: bytes) -> str:
        return blake2b(identity + what, digest_size=16, key=self._key).hexdigest()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the cache is closed")

    # --- all of them --------------------------------------------------------------------------

    @property
    def stores(self) -> list[ModelStates | KeptScores]:
        """All there is in blocks, what was used longest ago first."""
        with self.lock:
            stores: list[ModelStates | KeptScores] = [
                *self.models.values(),
                *self._scores.values(),
            ]
        return sorted(stores, key=lambda store: store.last_use)

    @property
    def caches(self) -> dict[str, KVCache]:
        """The KV caches by name."""
        with self.lock:
            models = {name: states.kv for name, states in self.models.items()}
            return models | {name: scores.kv for name, scores in self._scores.items()}

    @property
    def nbytes(self) -> int:
        """Bytes held: of pages, and of whole states."""
        with self.lock:
            return sum(store.nbytes for store in self.stores) + self.whole.nbytes

    def make_room(self, nbytes: int) -> None:
        """Let go of what was used longest ago, until so many bytes fit into the budget."""
        with self.lock:
            while self.nbytes + nbytes > self.budget_bytes and self._evict():
                pass

    def clear(self) -> None:
        """Let go of all that nobody needs."""
        with self.lock:
            while self._evict():
                pass

    def _evict(self) -> bool:
        return self.whole.evict() or any(store.evict() for store in self.stores)

    def close(self) -> None:
        """Give all memory back.

        Raises
        ------
        BufferError
            Other processes have rows of it.
        """
        with self.lock:
            for stores in (self.models, self._scores):
                for name in list(stores):
                    stores[name].kv.close()
                    del stores[name]
            self._closed = True
            while self.whole.evict():
                pass
