"""Published blocks in files: those of a file enter an index; those of an index are listed for one.

Purpose
    What `PrefixIndex` does for `KVCache.load` and `KVCache.save`.
Locking
    The index's.
"""

from __future__ import annotations

import warnings
from itertools import takewhile
from typing import TYPE_CHECKING, Literal

from pagealloc.errors import CacheFileError
from pagealloc.kv.block_segments import block_piece_bytes
from pagealloc.kv.prefix_index import PrefixIndex
from pagealloc.kv.prefix_nodes import BlockOnDisk, Node

if TYPE_CHECKING:
    from pagealloc import Window
    from pagealloc.kv.cache_file import CacheFile

__all__ = ["DiskPrefixIndex", "OnError"]

OnError = Literal["raise", "skip"]


class DiskPrefixIndex(PrefixIndex):
    """A prefix index whose blocks may be in a file."""

    on_error: OnError = "raise"
    """What a damaged block does to whoever asks for it: "skip", it is no longer there."""

    @property
    def root_key(self) -> bytes:
        """Hash of the empty prefix, which depends on owner, model and kind of rows."""
        return self._root.key

    def adopt(self, file: CacheFile) -> None:
        """Enter the blocks of a file; their rows are read when they are asked for.

        Raises
        ------
        CacheFileError
            Its rows are of another kind, model or owner; or it is truncated, or its tokens are
            damaged, unless ``on_error="skip"``.
        """
        header = file.header
        if (header.root, header.block_tokens, header.block_bytes) != (
            self.root_key,
            self.layout.block_tokens,
            block_piece_bytes(self.layout),
        ):
            raise CacheFileError(
                f"{file.path}: it is of another model, salt or kind of rows than this cache: give "
                "load() the model= and salt= that it was saved with, and no other layout or types"
            )
        if self.on_error == "raise":
            file.check_length()
        nodes: list[Node | None] = []
        n_damaged = 0
        with self._guard():
            for number, parent in enumerate(file.parents()):
                above = self._root if parent < 0 else nodes[parent]
                node = None
                if above is not None and file.has(number):
                    node = self._enter(above, file.tokens(number))
                if node is not None and node.on_disk is not None:
                    node = None  # no file has a block twice: its tokens were changed
                if node is None:
                    n_damaged += 1
                else:
                    node.on_disk = BlockOnDisk(file, number)
                nodes.append(node)
            self.n_damaged_blocks += n_damaged
        text = f"{file.path}: {n_damaged} of {header.n_blocks} blocks are lost"
        if n_damaged and self.on_error == "raise":
            raise CacheFileError(f"{text}: their tokens are damaged; on_error='skip' uses the rest")
        if n_damaged:
            _warn(f"{text} and skipped")

    def _enter(self, parent: Node, tokens: bytes) -> Node | None:
        """Return the node of a block, a new one if there is none; None if its hash is taken."""
        key = self._hash(parent.key + tokens)
        node = self._nodes.get(key)
        if node is None:
            node = self._nodes[key] = Node(key, tokens, parent)
        return node if node.tokens == tokens and node.parent is parent else None

    def skip(self, damaged: Node, error: CacheFileError) -> None:
        """Let go of a block in a file that cannot be read, and of those behind it; or raise.

        Raises
        ------
        CacheFileError
            The error, unless ``on_error="skip"``.
        """
        if self.on_error == "raise":
            raise error
        with self._guard():
            lost = {damaged}
            for node in sorted(self._nodes.values(), key=_block_of):
                if node.parent in lost and node.held is None:
                    lost.add(node)
            for node in lost:
                node.on_disk = None
                if node.held is None:
                    self._nodes.pop(node.key, None)
            self.n_damaged_blocks += len(lost)
        _warn(f"{error}; skipped, with {len(lost) - 1} blocks behind it")

    def snapshot(self) -> list[list[Node]]:
        """Return all blocks in runs, parents before children."""
        with self._guard():
            nodes = sorted(self._nodes.values(), key=_block_of)
        runs: dict[int, list[Node]] = {}
        only_on_disk: list[list[Node]] = []
        for node in nodes:
            held = node.held
            if held is None:
                only_on_disk.append([node])
            else:
                runs.setdefault(id(held), []).append(node)
        return [*runs.values(), *only_on_disk]

    def map_run(self, run: list[Node], window: Window) -> int:
        """Have a window share the rows of the first blocks of a run; return of how many.

        All of them, unless some were evicted meanwhile.
        """
        with self._guard():
            held = run[0].held
            if held is None:
                return 0
            n_held = sum(1 for _ in takewhile(lambda node: node.held is held, run))
            for span in held.pages(run[0].block, run[n_held - 1].block + 1):
                window.share_from(held.window, span.start, span.nbytes)
            return n_held


def _block_of(node: Node) -> int:
    return node.block


def _warn(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=4)
