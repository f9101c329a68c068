"""PrefixIndex: from token ids to published KV blocks.

Purpose
    Find the longest prefix of a prompt whose rows are there, keep rows for prompts to come, and
    let go of what is worth least when memory is short.
Structure
    `PrefixTree` has a node a block; a `HeldBlocks` keeps the pages of blocks that were published
    together, in a window without addresses::

        tokens -> PrefixTree: nodes -> HeldBlocks -> Window
                                 `--> BlockOnDisk -> CacheFile
Invariants
    every HeldBlocks has a node, and every node in memory one of them
    what an open sequence has from here, its lease keeps
Locking
    One lock, held for books only: never while rows are copied, a callback runs, or memory is
    waited for.  `restoring` is held while rows are read from a file, so that they are read once;
    whoever holds it may take the other, not the reverse.  Leases end without either
    (`prefix_nodes`).  Pages are the store's business: taking a block away from the index never
    takes it away from a sequence.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pagealloc.errors import InvariantError, PageallocError
from pagealloc.kv import boundary
from pagealloc.kv.held_blocks import HeldBlocks
from pagealloc.kv.lineage import part
from pagealloc.kv.prefix_hash import TOKEN_BYTES, token_bytes
from pagealloc.kv.prefix_stats import PrefixEvent, PrefixStats
from pagealloc.kv.prefix_tree import PrefixTree

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from pagealloc import Window
    from pagealloc.kv.boundary import Span
    from pagealloc.kv.eviction import Policy
    from pagealloc.kv.layout import KVLayout
    from pagealloc.kv.lineage import Cells
    from pagealloc.kv.prefix_client import RemoteLease, RemotePrefixes
    from pagealloc.kv.prefix_nodes import Lease, Node

__all__ = ["PrefixIndex"]


class Found(NamedTuple):
    """What is published of a prompt."""

    lease: Lease | None
    """On the blocks in memory; None if there are none."""
    on_disk: list[Node]
    """Blocks behind these whose rows are in a file."""


class PrefixIndex(PrefixTree):
    """The published prefixes of one cache: ``cache.prefixes``.  Thread-safe.

    Users want `pin`, `unpin`, `clear` and `stats`; the rest serves sequences.

    Parameters
    ----------
    layout : KVLayout
        Where published rows lie in windows.
    key : bytes
        Of the hashes: names the owner and the model.
    new_window : callable
        Returns a window without addresses.
    eviction : {"lru", "lfu", "bytes"}
        Which blocks go first.
    on_event : callable, optional
        Called with each `PrefixEvent`, by whoever caused it, when it has happened.
    """

    def __init__(
        self,
        layout: KVLayout,
        key: bytes,
        new_window: Callable[[], Window],
        eviction: Policy,
        on_event: Callable[[PrefixEvent], Any] | None,
    ) -> None:
        if on_event is not None and not callable(on_event):
            raise TypeError(
                f"on_prefix_event must be callable with the event, not {type(on_event).__name__}"
            )
        super().__init__(layout, key, eviction)
        self._new_window = new_window
        self._on_event = on_event
        self._events: deque[PrefixEvent] = deque()
        self.restoring = threading.RLock()
        self.remote: RemotePrefixes | None = None  # of whose pages it may keep some
        self.n_damaged_blocks = 0
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._held: set[HeldBlocks] = set()
        self._n_lookups = self._n_hits = self._n_asked_tokens = self._n_hit_tokens = 0
        self._n_stored_blocks = self._n_evicted_blocks = 0

    # --- finding ------------------------------------------------------------------------------

    def find(self, tokens: bytes, *, is_again: bool = False) -> Found:
        """Return the longest published prefix of a prompt.

        `is_again`: the same caller has asked already, so that statistics leave it out.
        """
        with self._guard():
            self._settle()
            node = self._walk(tokens, self._whole_blocks(tokens))
            held, on_disk = self._split(node)
            lease = None if held is self._root else self._lease(held)
            if is_again:
                return Found(lease, on_disk)
            self._n_lookups += 1
            self._n_asked_tokens += len(tokens) // TOKEN_BYTES
            if node is self._root:
                return Found(None, [])
            self._n_hits += 1
            self._n_hit_tokens += self._tokens_to(node)
            self._use(node)
            self._note("hit", 0, node)
        self.deliver()
        return Found(lease, on_disk)

    def n_tokens(self, lease: Lease) -> int:
        """Return how many tokens a lease keeps."""
        return self._tokens_to(lease.node)

    def n_found(self, found: Found) -> int:
        """Return how many tokens were found."""
        last = found.on_disk[-1] if found.on_disk else found.lease and found.lease.node
        return self._tokens_to(last) if last else 0

    def parts(self, lease: Lease) -> tuple[list[tuple[Window, list[Span]]], list[Cells]]:
        """Return which pages of which windows hold a leased prefix, and whose tokens these are."""
        parts: list[tuple[Window, list[Span]]] = []
        cells: list[Cells] = []
        with self._guard():
            node = lease.node
            above: list[Span] = []
            while node.held is not None:
                held, end = node.held, node.block + 1
                spans = held.pages(held.first, end)
                # A page that a later block has, too, holds the rows of both there.
                parts.append((held.window, boundary.subtract(spans, above)))
                above = boundary.page_spans(self.layout, [*above, *spans])
                cells[:0] = held.first_cells(end)
                node = held.parent
        return parts, cells

    def lease_at(self, lease: Lease, n_tokens: int) -> Lease | None:
        """Return a lease on what of a leased prefix the first `n_tokens` tokens touch."""
        n_blocks = self.layout.n_blocks(n_tokens)
        with self._guard():
            node = lease.node
            if node.block < n_blocks:
                return lease
            while node.parent is not None and node.block >= n_blocks:
                node = node.parent
            return None if node is self._root else self._lease(node)

    # --- publishing ---------------------------------------------------------------------------

    def publish(
        self,
        source: Window,
        tokens: bytes,
        cells: list[Cells],
        *,
        is_pinned: bool,
        keeps: RemoteLease | None = None,
    ) -> Lease | None:
        """Keep the whole blocks of a sequence, and return a lease on them; None if there are none.

        Parameters
        ----------
        source : Window
            Where the rows are.  Its pages will be shared: its owner makes them private before it
            writes.
        tokens : bytes
            What the rows are of; no more tokens than there are rows.
        cells : list of Cells
            Of these tokens.
        is_pinned : bool
            Whether they are never to go.
        keeps : RemoteLease, optional
            On pages of the rows that another process has.

        Raises
        ------
        BufferError, OutOfMemoryError
            An array may write to the rows, or the kernel has no memory for the books: nothing is
            published.
        """
        with self._guard():
            self._settle()
            n_blocks = self._whole_blocks(tokens)
            last = self._walk(tokens, n_blocks)
            node, nodes = self._split(last)
            nodes += self._new_nodes(last, tokens, n_blocks)
            if nodes:
                self._hold(nodes, source, cells, keeps)
                node = nodes[-1]
            if node is self._root:
                return None
            self._use(node)
            if is_pinned:
                self._pin(node)
            lease = self._lease(node)
        self.deliver()
        return lease

    def _hold(
        self, nodes: list[Node], source: Window, cells: list[Cells], keeps: RemoteLease | None
    ) -> None:
        """Take the rows of new blocks, one behind the other, and enter these."""
        first, end, parent = nodes[0].block, nodes[-1].block + 1, nodes[0].parent
        if parent is None:
            raise InvariantError("the root holds no rows")
        first_token, end_token = first * self.layout.block_tokens, end * self.layout.block_tokens
        own_cells = part(cells, first_token, end_token)
        window = self._new_window()
        held = HeldBlocks(window, self.layout, (first, end), own_cells, parent, keeps)
        try:
            held.take(source)
        except BaseException:
            held.window.close()
            raise
        for node in nodes:
            node.held = held
            self._nodes[node.key] = node
            self._add_child(node)
        self._held.add(held)
        self._n_blocks += len(nodes)
        self._n_stored_blocks += len(nodes)
        self._note("stored", first_token, nodes[-1])

    # --- pins ---------------------------------------------------------------------------------

    def pin(self, token_ids: Iterable[int]) -> int:
        """Keep what is published of a prompt until it is unpinned; return how many tokens."""
        tokens = token_bytes(token_ids)
        with self._guard():
            self._settle()
            node, _ = self._split(self._walk(tokens, self._whole_blocks(tokens)))
            self._pin(node)
            return self._tokens_to(node)

    def unpin(self, token_ids: Iterable[int]) -> int:
        """Take back the pins of a prompt and of its beginnings; return how many there were."""
        tokens, n_pins = token_bytes(token_ids), 0
        with self._guard():
            self._settle()
            node = self._walk(tokens, self._whole_blocks(tokens))
            while node.parent is not None:
                if node.is_pinned:
                    node.is_pinned = False
                    self._pinned.discard(node)
                    n_pins += 1
                    self._offer(node)
                node = node.parent
        return n_pins

    # --- evicting -----------------------------------------------------------------------------

    def evict(self) -> bool:
        """Let go of the block that is worth least, and of those before it that fill its chunk.

        False if every block is needed.
        """
        with self._guard():
            self._settle()
            self._now += 1
            leaf = self._order.pop(self._now)
            if leaf is None or leaf.held is None:
                return False
            held, unit = leaf.held, self._unit_of(leaf)
            first = unit[-1].block
            try:
                held.cut(first)
            except PageallocError:  # no memory for the books: the block stays
                self._offer(leaf)
                return False
            if held.first == held.end:
                self._held.discard(held)
                held.keeps = None
            for node in unit:
                self._forget(node)
            parent = unit[-1].parent
            if parent is not None:
                parent.last_use = max(parent.last_use, leaf.last_use)
                parent.n_hits += sum(node.n_hits for node in unit)
                self._offer(parent)
            self._n_evicted_blocks += len(unit)
            self._note("evicted", first * self.layout.block_tokens, leaf)
        self.deliver()
        return True

    def clear(self) -> int:
        """Let go of all blocks that nobody needs; return how many."""
        before = self._n_evicted_blocks
        while self.evict():
            pass
        return self._n_evicted_blocks - before

    def close(self) -> None:
        """Let go of all blocks, whoever needs them."""
        with self._guard():
            for held in self._held:
                held.window.close()
            for node in self._nodes.values():
                node.held = None
                self._order.discard(node)
            for entries in (self._held, self._pinned, self._nodes):
                entries.clear()
            self._n_blocks = 0

    # --- books --------------------------------------------------------------------------------

    def _guard(self) -> threading.Lock:
        """Return the lock; a new one in the child of a fork, which may have come amid a change."""
        if os.getpid() != self._pid:
            self._pid, self._lock = os.getpid(), threading.Lock()
        return self._lock

    def _note(self, kind: Literal["stored", "hit", "evicted"], first_token: int, end: Node) -> None:
        if self._on_event is not None:
            n_tokens = self._tokens_to(end) - first_token
            self._events.append(PrefixEvent(kind, first_token, n_tokens, end.key))

    def deliver(self) -> None:
        """Tell what happened; without the lock."""
        if self.remote is not None:
            self.remote.settle()
        while self._on_event is not None and self._events:
            with suppress(IndexError):  # another thread was quicker
                self._on_event(self._events.popleft())

    @property
    def n_windows(self) -> int:
        """How many windows of the store it has."""
        with self._guard():
            return len(self._held)

    def cells(self) -> list[Cells]:
        """Return whose tokens it keeps, to count rows once."""
        with self._guard():
            return [run for held in self._held for run in held.cells]

    def stats(self) -> PrefixStats:
        """Return its numbers, taken at one moment."""
        with self._guard():
            self._settle()
            n_tokens = self._n_blocks * self.layout.block_tokens
            return PrefixStats(
                n_blocks=self._n_blocks,
                n_tokens=n_tokens,
                nbytes=n_tokens * self.layout.token_bytes,
                n_disk_blocks=len(self._nodes) - self._n_blocks,
                n_pinned_blocks=len(self._kept_by_pins()),
                n_lookups=self._n_lookups,
                n_hits=self._n_hits,
                n_asked_tokens=self._n_asked_tokens,
                n_hit_tokens=self._n_hit_tokens,
                n_stored_blocks=self._n_stored_blocks,
                n_evicted_blocks=self._n_evicted_blocks,
                n_collisions=self._n_collisions,
                n_damaged_blocks=self.n_damaged_blocks,
            )

    def check(self) -> None:
        """Raise InvariantError if what the module says must hold does not."""
        with self._guard():
            self._settle()
            self._check_nodes()
            held_nodes = [node for node in self._nodes.values() if node.held is not None]
            if self._n_blocks != len(held_nodes) or self._held != {
                node.held for node in held_nodes
            }:
                raise InvariantError(f"blocks lie in others than {len(self._held)} windows")
            for held in self._held:
                held.check()
