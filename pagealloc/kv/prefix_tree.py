"""PrefixTree: published KV blocks as nodes, each behind the one before it.

Purpose
    Look a prompt up, and know which blocks may go and in which order.
Structure
    A node is a KV block behind all those before it; its key is the chained hash of all their
    tokens (`prefix_hash`)::

        root -- a -- b -- c          HeldBlocks 0: blocks 0 to 2, published by one sequence
                     `--- d -- e     HeldBlocks 1: blocks 2 to 3, by another one

    Looking up costs a hash a block, whatever is published.  A hit compares the tokens too, block by
    block from the root, so that a collision of hashes is a miss.
Invariants
    a node with rows in memory has a parent with such rows, or the root
    every node has rows, in memory or in a file
    n_children = nodes with rows in memory whose parent it is;  n_leases = live leases
    a node has a ticket of the order of eviction iff it may go
Locking
    The index's; leases end without it (`prefix_nodes`).
"""

from __future__ import annotations

from collections import Counter, deque
from typing import TYPE_CHECKING

from pagealloc import huge_page_size_bytes
from pagealloc.errors import InvariantError
from pagealloc.kv.eviction import EvictionOrder
from pagealloc.kv.prefix_hash import TOKEN_BYTES, block_hash
from pagealloc.kv.prefix_nodes import Lease, Node

if TYPE_CHECKING:
    from pagealloc.kv.eviction import Policy
    from pagealloc.kv.layout import KVLayout

__all__ = ["PrefixTree"]


class PrefixTree:
    """The blocks that `PrefixIndex` knows; see there for the parameters."""

    def __init__(self, layout: KVLayout, key: bytes, eviction: Policy) -> None:
        self.layout = layout
        self._hash = block_hash(key)
        self._order = EvictionOrder(eviction)
        self._block_bytes = layout.block_tokens * TOKEN_BYTES  # of token ids
        self._root = Node(self._hash(b""), b"", None)
        self._nodes: dict[bytes, Node] = {}
        self._pinned: set[Node] = set()
        self._ended: deque[Node] = deque()
        self._n_blocks = 0  # in memory
        self._now = 0  # operations so far: the clock of recency
        self._n_collisions = 0

    # --- finding ------------------------------------------------------------------------------

    def _walk(self, tokens: bytes, n_blocks: int) -> Node:
        """Return the last block of a prompt that is published, behind all before it; or the root.

        This is all that a look-up costs: keep it short.
        """
        digest, find, width = self._hash, self._nodes.get, self._block_bytes
        node = self._root
        for start in range(0, n_blocks * width, width):
            block = tokens[start : start + width]
            child = find(digest(node.key + block))
            if child is None:
                break
            if child.tokens != block or child.parent is not node:
                self._n_collisions += 1
                break
            node = child
        return node

    def _split(self, node: Node) -> tuple[Node, list[Node]]:
        """Return the last block in memory of a prefix, or the root, and those behind it."""
        on_disk: list[Node] = []
        while node.held is None and node.parent is not None:
            on_disk.append(node)
            node = node.parent
        return node, on_disk[::-1]

    def _whole_blocks(self, tokens: bytes) -> int:
        most = self.layout.max_tokens // self.layout.block_tokens
        return min(len(tokens) // self._block_bytes, most)

    def _tokens_to(self, node: Node) -> int:
        return (node.block + 1) * self.layout.block_tokens

    def _use(self, node: Node) -> None:
        self._now += 1
        node.last_use = self._now
        node.n_hits += 1

    def _lease(self, node: Node) -> Lease:
        node.n_leases += 1
        self._order.discard(node)
        return Lease(node, self._ended)

    def _settle(self) -> None:
        """Read the notes of leases that ended."""
        while self._ended:
            node = self._ended.popleft()
            node.n_leases -= 1
            self._offer(node)

    def _offer(self, node: Node) -> None:
        """Put a block up for eviction, if it may go."""
        if not node.may_go:
            return
        node.n_branch, above = 1, node.parent
        while above is not None and above.held is not None and above.n_children == 1:
            if above.n_leases or above.is_pinned:
                break
            node.n_branch += 1
            above = above.parent
        self._order.push(node)

    # --- entering -----------------------------------------------------------------------------

    def _new_nodes(self, parent: Node, tokens: bytes, n_blocks: int) -> list[Node]:
        """Return nodes for the blocks behind `parent`; not behind a hash that is taken."""
        nodes: list[Node] = []
        for block in range(parent.block + 1, n_blocks):
            own = tokens[block * self._block_bytes : (block + 1) * self._block_bytes]
            key = self._hash(parent.key + own)
            if key in self._nodes:
                break
            parent = Node(key, own, parent)
            nodes.append(parent)
        return nodes

    def _add_child(self, node: Node) -> None:
        parent = node.parent
        if parent is not None:
            parent.n_children += 1
            self._order.discard(parent)

    # --- keeping, and letting go ---------------------------------------------------------------

    def _pin(self, node: Node) -> None:
        if node is not self._root:
            node.is_pinned = True
            self._pinned.add(node)
            self._order.discard(node)

    def _kept_by_pins(self) -> set[Node]:
        kept: set[Node] = set()
        for node in self._pinned:
            above: Node | None = node
            while above is not None and above not in kept and above is not self._root:
                kept.add(above)
                above = above.parent
        return kept

    def _unit_of(self, leaf: Node) -> list[Node]:
        """Return a block and those before it in the same chunk of memory that may go with it."""
        unit, node = [leaf], leaf.parent
        while (
            node is not None
            and node.held is leaf.held
            and node.n_children == 1
            and not node.n_leases
            and not node.is_pinned
            and node.last_use <= leaf.last_use
            and self._chunk_of(node) == self._chunk_of(leaf)
        ):
            unit.append(node)
            node = node.parent
        return unit

    def _chunk_of(self, node: Node) -> int:
        """Return in which chunk a block starts; in layer-major orders it has no place of its own.

        There a chunk empties all the same, for one branch goes from its end on.
        """
        if self.layout.order != "block":
            return node.block
        return node.block * self.layout.block_bytes // huge_page_size_bytes()

    def _forget(self, node: Node) -> None:
        self._order.discard(node)
        node.held = None
        self._n_blocks -= 1
        if node.on_disk is None:
            del self._nodes[node.key]
        if node.parent is not None:
            node.parent.n_children -= 1

    def _check_nodes(self) -> None:
        """Raise InvariantError if what the module says must hold does not."""
        n_children: Counter[Node] = Counter()
        for key, node in self._nodes.items():
            parent, held = node.parent, node.held
            if parent is None or (held is None and node.on_disk is None):
                raise InvariantError(f"block {node.block} has no rows")
            if held is not None:
                n_children[parent] += 1
                if not held.first <= node.block < held.end:
                    raise InvariantError(f"block {node.block} is not where it should be")
                if parent is not self._root and parent.held is None:
                    raise InvariantError(f"block {node.block} has a parent without rows")
            if key != node.key or key != self._hash(parent.key + node.tokens):
                raise InvariantError(f"block {node.block} is not what its hash says")
            if bool(node.ticket) != node.may_go:
                raise InvariantError(f"block {node.block}: {node.ticket=}, {node.may_go=}")
        for node in (self._root, *self._nodes.values()):
            if node.n_children != n_children[node] or node.n_leases < 0:
                raise InvariantError(f"block {node.block}: {node.n_children} children")
