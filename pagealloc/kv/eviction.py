"""EvictionOrder: which published block goes first.

Purpose
    Find the block that is worth least among those that may go, whatever their number.
Structure
    Blocks that may go lie in buckets, in each by when they were used; the oldest of each bucket
    stand for election::

        policy    bucket              elected
        "lru"     all                 used longest ago
        "lfu"     number of hits      fewest hits, then used longest ago
        "bytes"   log2 of the branch  largest branch x time since it was used

    A branch is what goes with the block, one after the other, until a block is reached that
    something else needs.  In a bucket of "bytes" branches differ by less than a factor of 2, so the
    oldest may be worth up to twice what the best one is.
Invariants
    an entry counts iff it carries its block's ticket; others are dropped when they come up
Locking
    The index's.
Source
    C. Aggarwal, J. Wolf, P. Yu, "Caching on the World Wide Web", IEEE TKDE 11 (1999): the pyramidal
    selection scheme, which "bytes" is.
"""

from __future__ import annotations

import heapq
import itertools
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from pagealloc.kv.prefix_nodes import Node

__all__ = ["EvictionOrder", "Policy"]

Policy = Literal["lru", "lfu", "bytes"]

MIN_ENTRIES = 64


class EvictionOrder:
    """The blocks that may go, in order.

    Parameters
    ----------
    policy : {"lru", "lfu", "bytes"}
        What decides.

    Raises
    ------
    ValueError
        There is no such policy.
    """

    __slots__ = ("_buckets", "_n_entries", "_n_live", "_tickets", "policy")

    def __init__(self, policy: Policy) -> None:
        if policy not in get_args(Policy):
            raise ValueError(
                f"prefix_eviction={policy!r}: {', '.join(map(repr, get_args(Policy)))} are possible"
            )
        self.policy = policy
        self._tickets = itertools.count(1)
        self._buckets: dict[int, list[tuple[int, int, Node]]] = {}
        self._n_entries = self._n_live = 0

    def __len__(self) -> int:
        return self._n_live

    def push(self, node: Node) -> None:
        """Enter a block that may go, or enter it anew; its uses and its branch are as they are."""
        self.discard(node)
        if self._n_entries > 2 * self._n_live + MIN_ENTRIES:
            self._drop_stale()
        node.ticket = next(self._tickets)
        self._n_live += 1
        self._n_entries += 1
        bucket = self._buckets.setdefault(self._bucket_of(node), [])
        heapq.heappush(bucket, (node.last_use, node.ticket, node))

    def discard(self, node: Node) -> None:
        """Take a block out, if it is in: it may not go any more."""
        if node.ticket:
            node.ticket = 0
            self._n_live -= 1

    def pop(self, now: int) -> Node | None:
        """Take out the block that goes first; None if none may go."""
        oldest: list[tuple[tuple[int, ...], Node]] = []
        for key, bucket in list(self._buckets.items()):
            while bucket and bucket[0][1] != bucket[0][2].ticket:
                heapq.heappop(bucket)
                self._n_entries -= 1
            if bucket:
                oldest.append((self._rank(bucket[0][2], now), bucket[0][2]))
            else:
                del self._buckets[key]
        if not oldest:
            return None
        node = min(oldest, key=_rank_of)[1]
        self.discard(node)
        return node

    def _bucket_of(self, node: Node) -> int:
        if self.policy == "lfu":
            return node.n_hits
        return node.n_branch.bit_length() if self.policy == "bytes" else 0

    def _rank(self, node: Node, now: int) -> tuple[int, ...]:
        if self.policy == "lfu":
            return node.n_hits, node.last_use
        if self.policy == "bytes":
            return -node.n_branch * (now - node.last_use), node.last_use
        return (node.last_use,)

    def _drop_stale(self) -> None:
        for bucket in self._buckets.values():
            bucket[:] = [entry for entry in bucket if entry[1] == entry[2].ticket]
            heapq.heapify(bucket)
        self._n_entries = self._n_live


def _rank_of(entry: tuple[tuple[int, ...], Node]) -> tuple[int, ...]:
    return entry[0]
