"""Lineage: which tokens of which sequences are the same, to count shared rows once.

Purpose
    `KVStats.needed_bytes` is what the distinct rows of a cache take.  Pages cannot tell: a tail
    page is copied by whoever writes to it first, and then holds the same rows twice.
Structure
    Every token that a sequence writes is a *cell* of that sequence's own *origin*, numbered as
    they come; a fork has the cells of its parent.  A sequence is a list of runs of cells, in the
    order of storage, and a tail of own tokens that nobody else can have yet::

        runs   (A, 0, 1000)  (B, 16, 40)      | tail: own cells from `next_cell` on
        token  0 .......... 999  1000 ... 1039 | 1040 ......... length
Invariants
    no cell number of an origin names two different tokens that anybody has
    an origin below 0 is of tokens whose rows another process has
    n_settled == sum of the runs' tokens <= length of the sequence
Locking
    None: the sequence's one writer.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Cells", "Lineage", "count_distinct_tokens", "part"]

_origins = itertools.count()


class Cells(NamedTuple):
    """Cells ``[first, first + n_tokens)`` of an origin."""

    origin: int
    first: int
    n_tokens: int

    def cut(self, start: int, end: int) -> Cells:
        """Return the cells of tokens [start, end) of this run."""
        return Cells(self.origin, self.first + start, end - start)


class Lineage:
    """The cells of one sequence.

    Parameters
    ----------
    runs : iterable of Cells
        Those it starts with, of other sequences.
    """

    __slots__ = ("n_settled", "next_cell", "origin", "runs")

    def __init__(self, runs: Iterable[Cells] = ()) -> None:
        self.origin = next(_origins)
        self.next_cell = 0
        self.runs = list(runs)
        self.n_settled = sum(run.n_tokens for run in self.runs)

    def all_runs(self, n_tokens: int) -> list[Cells]:
        """Return the runs of a sequence of `n_tokens`, its tail included."""
        n_tail = n_tokens - self.n_settled
        return [*self.runs, Cells(self.origin, self.next_cell, n_tail)] if n_tail else self.runs

    def first_runs(self, n_tokens: int, end: int) -> list[Cells]:
        """Return the runs of tokens [0, end) of a sequence of `n_tokens`."""
        return part(self.all_runs(n_tokens), 0, end)

    def last_runs(self, n_tokens: int, start: int) -> list[Cells]:
        """Return the runs of its tokens from `start` on."""
        return part(self.all_runs(n_tokens), start, n_tokens)

    def settle(self, n_tokens: int) -> None:
        """Give the tail its cells: somebody else is about to have them, too."""
        self.runs = list(self.all_runs(n_tokens))
        self.next_cell += n_tokens - self.n_settled
        self.n_settled = n_tokens

    def part(self, start: int, end: int) -> list[Cells]:
        """Return the cells of tokens [start, end), which are settled."""
        return part(self.runs, start, end)

    def keep(self, n_tokens: int, ranges: Iterable[tuple[int, int]]) -> None:
        """Drop all of its `n_tokens` tokens but those in ascending ranges [start, end)."""
        self.settle(n_tokens)
        self.runs = [run for start, end in ranges for run in self.part(start, end)]
        self.n_settled = sum(run.n_tokens for run in self.runs)

    def cut(self, n_tokens: int) -> None:
        """Drop what lies behind the first `n_tokens` tokens."""
        if n_tokens < self.n_settled:
            self.keep(self.n_settled, [(0, n_tokens)])

    def renew(self, n_tokens: int, ranges: Iterable[tuple[int, int]]) -> None:
        """Tokens in these ascending ranges were rewritten: they are nobody else's any more."""
        self.settle(n_tokens)
        runs, position = [], 0
        for start, end in ranges:
            runs += self.part(position, start)
            runs.append(Cells(self.origin, self.next_cell, end - start))
            self.next_cell += end - start
            position = end
        self.runs = runs + self.part(position, n_tokens)


def part(runs: Iterable[Cells], start: int, end: int) -> list[Cells]:
    """Return what of these runs are tokens [start, end)."""
    found, position = [], 0
    for run in runs:
        first, last = max(start - position, 0), min(end - position, run.n_tokens)
        if first < last:
            found.append(run.cut(first, last))
        position += run.n_tokens
    return found


def count_distinct_tokens(runs: Iterable[Cells]) -> int:
    """Return how many tokens all these runs are, each counted once; other processes' are not."""
    n_distinct, origin, reach = 0, -1, 0
    for run in sorted(run for run in runs if run.origin >= 0):
        if run.origin != origin:
            origin, reach = run.origin, 0
        end = run.first + run.n_tokens
        if end > reach:
            n_distinct += end - max(run.first, reach)
            reach = end
    return n_distinct
