"""Branch: which sequences descend from which, to count rows that several of them share once.

Purpose
    `KVStats.needed_bytes` is what the distinct rows of a cache take.  Pages cannot tell: a tail
    page is copied by whoever writes to it first, and then holds the same rows twice.
Structure
    Each sequence stands on a branch of its own.  A branch starts where a fork (or a truncation into
    shared rows) left its parent::

        branch A: rows 0 ... 999            sequence = rows of its own branch from `start` on
                          |-- branch B      + its parent's rows before `start`, and so on up
                          |-- branch C
Invariants
    branch.start >= branch.parent.start;  only the sequence that stands on a branch adds rows to it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Branch", "count_distinct_rows"]


class Branch:
    """Rows from token `start` on that one sequence wrote.

    Parameters
    ----------
    parent : Branch or None
        Where the rows before `start` were written.
    start : int
        First token of this branch.
    """

    __slots__ = ("parent", "start")

    def __init__(self, parent: Branch | None = None, start: int = 0) -> None:
        self.parent = parent
        self.start = start

    def split(self, n_tokens: int) -> Branch:
        """Return a new branch that leaves this one after `n_tokens` tokens.

        `n_tokens` may lie before `start`: the new branch then leaves an ancestor.
        """
        parent: Branch | None = self
        while parent is not None and parent.start >= n_tokens:
            parent = parent.parent
        return Branch(parent, n_tokens)


def count_distinct_rows(standing: Iterable[tuple[Branch, int]], n_layers: int) -> int:
    """Return how many (layer, token) rows exist, shared ones counted once.

    Parameters
    ----------
    standing : iterable of (Branch, int)
        Of each sequence its branch and the sum of its layers' lengths.
    n_layers : int
        Layers a token has.
    """
    last_row: dict[Branch, int] = {}
    for leaf, n_rows in standing:
        branch: Branch | None = leaf
        end = n_rows
        while branch is not None:
            known = last_row.get(branch)
            last_row[branch] = end if known is None else max(known, end)
            if known is not None:
                break  # its ancestors are counted
            end = branch.start * n_layers
            branch = branch.parent
    return sum(end - branch.start * n_layers for branch, end in last_row.items())
