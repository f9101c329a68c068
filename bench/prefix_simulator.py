"""What an index of prefixes evicts, said plainly: every decision looks at every block.

Blocks are paths: ``("a", "b")`` is block b behind block a.  What the index is compared
with.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

__all__ = ["PrefixSimulator"]

Path = tuple[object, ...]


@dataclass
class Block:
    """What decides about a block."""

    publisher: int
    last_use: int = 0
    n_hits: int = 0


class PrefixSimulator:
    """Published paths within a capacity.

    Parameters
    ----------
    capacity_blocks : int
        Most blocks, those of open sequences included.
    policy : {"lru", "lfu", "bytes"}
        What goes first.
    blocks_per_chunk : int
        Blocks that go together, if one after the other may go.
    """

    def __init__(
        self, capacity_blocks: int, policy: Literal["lru", "lfu", "bytes"], blocks_per_chunk: int
    ) -> None:
        self.capacity_blocks = capacity_blocks
        self.policy = policy
        self.blocks_per_chunk = blocks_per_chunk
        self.blocks: dict[Path, Block] = {}
        self.leases: Counter[Path] = Counter()
        self.pins: set[Path] = set()
        self.n_own_blocks = 0  # of open sequences, not published
        self.now = self.n_publishers = 0
        self.n_asked = self.n_hit = 0

    def find(self, path: Path) -> int:
        """Lease the longest published beginning of a path, and return its length."""
        depth = 0
        while depth < len(path) and path[: depth + 1] in self.blocks:
            depth += 1
        self.n_asked += len(path)
        self.n_hit += depth
        if depth:
            self.use(path[:depth])
            self.leases[path[:depth]] += 1
        return depth

    def compute(self, n_blocks: int) -> bool:
        """Give an open sequence new blocks; False if there is no room."""
        while len(self.blocks) + self.n_own_blocks + n_blocks > self.capacity_blocks:
            if not self.evict():
                return False
        self.n_own_blocks += n_blocks
        return True

    def publish(self, path: Path, found: int, *, pin: bool = False) -> None:
        """Publish a sequence that found so many blocks and computed the others; it has a lease."""
        depth = found
        while depth < len(path) and path[: depth + 1] in self.blocks:
            depth += 1
        self.n_publishers += 1
        for end in range(depth + 1, len(path) + 1):
            self.blocks[path[:end]] = Block(self.n_publishers)
        self.n_own_blocks -= len(path) - depth
        self.use(path)
        if pin:
            self.pins.add(path)
        if found:
            self.close(path[:found])
        self.leases[path] += 1

    def close(self, path: Path) -> None:
        """End a lease."""
        self.leases[path] -= 1
        if not self.leases[path]:
            del self.leases[path]

    def unpin(self, path: Path) -> None:
        """Take back the pins of a path and of its beginnings."""
        self.pins -= {path[:end] for end in range(1, len(path) + 1)}

    def use(self, path: Path) -> None:
        """Somebody asked for exactly this."""
        self.now += 1
        self.blocks[path].last_use = self.now
        self.blocks[path].n_hits += 1

    def evict(self) -> bool:
        """Let go of the worst leaf, and of blocks before it in its chunk; False: there is none."""
        self.now += 1
        parents = Counter(path[:-1] for path in self.blocks)
        leaves = [path for path in self.blocks if not parents[path] and self.is_free(path)]
        if not leaves:
            return False
        leaf = min(leaves, key=lambda path: self.rank(path, parents))
        block, unit = self.blocks[leaf], [leaf]
        above = leaf[:-1]
        while (
            above
            and parents[above] == 1
            and self.is_free(above)
            and self.blocks[above].publisher == block.publisher
            and self.blocks[above].last_use <= block.last_use
            and self.chunk_of(above) == self.chunk_of(leaf)
        ):
            unit.append(above)
            above = above[:-1]
        n_hits = sum(self.blocks.pop(path).n_hits for path in unit)
        if above:
            self.blocks[above].n_hits += n_hits
            self.blocks[above].last_use = max(self.blocks[above].last_use, block.last_use)
        return True

    def chunk_of(self, path: Path) -> int:
        """Return in which chunk a block lies."""
        return (len(path) - 1) // self.blocks_per_chunk

    def is_free(self, path: Path) -> bool:
        """Whether no lease and no pin ends here."""
        return path not in self.leases and path not in self.pins

    def rank(self, path: Path, parents: Counter[Path]) -> tuple[int, ...]:
        """Return what is smallest for the block that goes first."""
        block = self.blocks[path]
        if self.policy == "lru":
            return (block.last_use,)
        if self.policy == "lfu":
            return block.n_hits, block.last_use
        n_branch, above = 1, path[:-1]
        while above and parents[above] == 1 and self.is_free(above):
            n_branch += 1
            above = above[:-1]
        return -n_branch * (self.now - block.last_use), block.last_use
