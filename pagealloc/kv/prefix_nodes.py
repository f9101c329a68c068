"""Node, Lease, BlockOnDisk: a published KV block, the promise that it stays, its rows in a file.

Locking
    Nodes are the index's, and change under its lock.  A lease ends without one: it leaves a note,
    which the index reads when it is next entered, for leases end wherever Python drops the last
    reference, also amid a garbage collection that the lock's holder set off.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections import deque

    from pagealloc.kv.cache_file import CacheFile
    from pagealloc.kv.held_blocks import HeldBlocks

__all__ = ["BlockOnDisk", "Lease", "Node"]


class BlockOnDisk(NamedTuple):
    """The rows of a block in a file."""

    file: CacheFile
    number: int

    def read(self, buffers: list[memoryview]) -> None:
        """Read and verify them, see `CacheFile.read`."""
        self.file.read(self.number, buffers)


class Node:
    """A KV block behind all those before it.

    Parameters
    ----------
    key : bytes
        Its chained hash.
    tokens : bytes
        Its own tokens.
    parent : Node, optional
        The block before; None for the root, which is the empty prefix.
    """

    __slots__ = (
        "block",
        "held",
        "is_pinned",
        "key",
        "last_use",
        "n_branch",
        "n_children",
        "n_hits",
        "n_leases",
        "on_disk",
        "parent",
        "ticket",
        "tokens",
    )

    def __init__(self, key: bytes, tokens: bytes, parent: Node | None) -> None:
        self.key = key
        self.tokens = tokens
        self.parent = parent
        self.block: int = -1 if parent is None else parent.block + 1  # its number in the prefix
        self.held: HeldBlocks | None = None  # where its rows are in memory
        self.on_disk: BlockOnDisk | None = None  # where they are in a file
        self.n_children = 0  # that hold rows
        self.n_leases = 0
        self.is_pinned = False
        self.last_use = 0
        self.n_hits = 0
        self.n_branch = 0  # blocks that go after one another if this one goes, as of its ticket
        self.ticket = 0  # in the order of eviction; 0: it may not go

    @property
    def may_go(self) -> bool:
        """Whether nobody needs the rows."""
        return self.held is not None and self.is_free

    @property
    def is_free(self) -> bool:
        """Whether no child, lease or pin needs it."""
        return not (self.n_children or self.n_leases or self.is_pinned)


class Lease:
    """While it lives, a block and those before it are not evicted.

    Parameters
    ----------
    node : Node
        The last block.
    ended : deque of Node
        Where to leave the note.
    """

    __slots__ = ("_ended", "node")

    def __init__(self, node: Node, ended: deque[Node]) -> None:
        self.node = node
        self._ended = ended

    def __del__(self) -> None:
        self._ended.append(self.node)
