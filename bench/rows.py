"""Rows of the core benchmark: figures, their ratio, the bar, and whether it holds.

A ratio is the median over the rounds of our time divided by the peer's *of the same round*; in a
round everyone runs once, in turn.  The best peer is the one with the lowest median.
"""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

__all__ = [
    "Row",
    "RowsReport",
    "best_peer",
    "compare",
    "guarded",
    "limit_row",
    "markdown_table",
    "median_ratio",
    "table",
]


@dataclass(frozen=True)
class Row:
    """One measured line.

    Parameters
    ----------
    bar : str
        Which bar it is judged by; several lines may share one.
    work : str
        What was done.
    ours : float or None
        Our figure, in `unit`; None: not measured.
    peers : dict of str to (float or None)
        Each peer's figure; None: that peer is not there.
    unit : str
        Of all figures.
    ratio : float or None
        What is compared with the bar; None: `ours` is.
    to_reach : float
        The bar: the largest ratio that holds.
    holds : bool or None
        None: cannot be told, because something is missing.
    optional : bool
        Whether the command may succeed although this cannot be told.
    note : str
        Why something could not be measured.
    """

    bar: str
    work: str
    ours: float | None
    peers: dict[str, float | None] = field(default_factory=dict)
    unit: str = "ns"
    ratio: float | None = None
    to_reach: float = 1.0
    holds: bool | None = None
    optional: bool = False
    note: str = ""

    @property
    def succeeds(self) -> bool:
        """Whether the command may succeed with this line."""
        return self.holds is True or (self.holds is None and self.optional)

    @property
    def verdict(self) -> str:
        """What the table says about the bar."""
        return {True: "holds", False: "MISSED", None: "not measured"}[self.holds]

    def as_json(self) -> dict[str, Any]:
        """Return the line as the JSON file has it."""
        hidden = {"optional", "note"} if not self.note else {"optional"}
        return {name: value for name, value in asdict(self).items() if name not in hidden}


def median_ratio(ours: Sequence[float], peer: Sequence[float]) -> float:
    """Return the median of the ratios of figures of the same round."""
    return statistics.median(a / b for a, b in zip(ours, peer, strict=True))


def best_peer(figures: Mapping[str, Sequence[float] | None]) -> str | None:
    """Return the peer with the lowest median; None: there is no peer at all."""
    medians = {name: statistics.median(per) for name, per in figures.items() if per}
    return min(medians, key=lambda name: medians[name]) if medians else None


def compare(
    bar: str,
    work: str,
    to_reach: float,
    ours: Sequence[float] | None,
    peers: Mapping[str, Sequence[float] | None],
    *,
    unit: str = "ns",
    optional: bool = False,
    note: str = "",
) -> Row:
    """Judge rounds of ours against rounds of the best peer.

    A bar is missed as soon as one peer is too good, and holds only if all were measured.
    """
    medians = {name: statistics.median(per) if per else None for name, per in peers.items()}
    best = best_peer(peers)
    if not ours or best is None:
        our_median = statistics.median(ours) if ours else None
        return Row(bar, work, our_median, medians, unit, None, to_reach, None, optional, note)
    ratio = median_ratio(ours, peers[best] or ())
    holds: bool | None = ratio <= to_reach
    if holds and None in medians.values():
        holds = None
    return Row(
        bar, work, statistics.median(ours), medians, unit, ratio, to_reach, holds, optional, note
    )


def limit_row(
    bar: str, work: str, to_reach: float, ours: float | None, unit: str, **more: Any
) -> Row:
    """Judge one figure of ours by itself."""
    holds = None if ours is None else ours <= to_reach
    return Row(bar, work, ours, more.pop("peers", {}), unit, None, to_reach, holds, **more)


def guarded(bar: str, text: str, to_reach: float, measure: Callable[[], list[Row]]) -> list[Row]:
    """Measure; what cannot be measured becomes a row that says why, and all others go on."""
    print(f"measuring {bar}: {text}", file=sys.stderr, flush=True)
    try:
        return measure()
    except RuntimeError as error:
        return [compare(bar, text, to_reach, None, {}, note=str(error))]


# --- tables ---

MAX_UNIT = 8
"""How long a unit may be beside the figure; a longer one goes to the work."""


def figure(value: float | None) -> str:
    if value is None:
        return "missing"
    if value == 0 or value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def cells(row: Row, columns: Sequence[str]) -> list[str]:
    """Return the row's texts: one for each of `columns`, in between the fixed ones."""
    peers = [figure(row.peers[name]) if name in row.peers else "" for name in columns]
    others = [f"{name} {figure(value)}" for name, value in row.peers.items() if name not in columns]
    work = f"{row.work} (against {', '.join(others)})" if others else row.work
    ratio = "" if row.ratio is None else f"{row.ratio:.3g}"
    if len(row.unit) > MAX_UNIT:
        work = f"{work}: {row.unit}"
    unit = row.unit if len(row.unit) <= MAX_UNIT else ""
    ours = "missing" if row.ours is None else f"{figure(row.ours)} {unit}".rstrip()
    return [row.bar, work, ours, *peers, ratio, f"≤ {row.to_reach:g}", row.verdict]


def heading(columns: Sequence[str]) -> list[str]:
    return ["bar", "work", "pagealloc", *columns, "ratio", "to reach", "verdict"]


def table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Return the rows as aligned text, a line each; numbers are flush right."""
    lines = [heading(columns), *(cells(row, columns) for row in rows)]
    widths = [max(len(text) for text in column) for column in zip(*lines, strict=True)]
    texts = []
    for line in lines:
        left = [text.ljust(width) for text, width in zip(line[:2], widths, strict=False)]
        right = [text.rjust(width) for text, width in zip(line[2:], widths[2:], strict=True)]
        texts.append("  ".join([*left, *right]).rstrip())
    notes = [f"{row.bar}, {row.work}: {row.note}" for row in rows if row.note]
    return "\n".join([*texts, *notes])


def markdown_table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Return the rows as a Markdown table, and what there is to say about single ones."""
    head = heading(columns)
    aligned = ["---", "---", *("---:" for _ in head[2:-1]), "---"]
    lines = [head, aligned, *(cells(row, columns) for row in rows)]
    texts = [f"| {' | '.join(line)} |" for line in lines]
    notes = [f"- {row.bar}, {row.work}: {row.note}" for row in rows if row.note]
    return "\n".join([*texts, *(["", *notes] if notes else [])])


# --- a whole result ---


@dataclass(frozen=True)
class RowsReport:
    """What a benchmark found.

    Parameters
    ----------
    name : str
        The benchmark's.
    title : str
        Of the page.
    rows : list of Row
        What was measured.
    machine : dict of str
        What the figures depend on.
    columns : sequence of str
        The peers, in the order of the table.
    notes : list of str
        Printed below the table.
    """

    name: str
    title: str
    rows: list[Row]
    machine: dict[str, Any]
    columns: Sequence[str]
    notes: list[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """Whether every bar holds, of all that could be measured."""
        return all(row.succeeds for row in self.rows)

    def __str__(self) -> str:
        facts = [f"  {name}: {value}" for name, value in self.machine.items()]
        return "\n".join([self.title, *facts, "", table(self.rows, self.columns), *self.notes])

    def write_json(self, path: Path) -> None:
        """Write the rows, as a list of objects."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([row.as_json() for row in self.rows], indent=2) + "\n")

    def write_markdown(self, path: Path) -> None:
        """Write the page of the documentation."""
        facts = [f"- {name}: {value}" for name, value in self.machine.items()]
        lost = sum(row.holds is False for row in self.rows)
        verdict = f"{lost} of {len(self.rows)} lines miss their bar." if lost else ""
        text = "\n".join(
            [
                f"# {self.title}",
                "",
                f"By `python -m bench {self.name} --markdown FILE`;",
                "{doc}`../benchmarks` says how.",
                "",
                *facts,
                "",
                markdown_table(self.rows, self.columns),
                "",
                *([verdict, ""] if verdict else []),
                *self.notes,
            ]
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.rstrip() + "\n")
