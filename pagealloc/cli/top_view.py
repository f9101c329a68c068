"""One view of a process for a terminal, drawn with rich.

Purpose
    What `pagealloc top` shows of a history: the process, its allocators, latencies, KV caches.
Units
    Widths are in columns of the terminal.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from pagealloc.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.console import Console, ConsoleOptions, RenderableType

    from pagealloc import ArenaStats, ClassStats
    from pagealloc.observe.live import History
    from pagealloc.observe.snapshot import AllocatorReading, CacheReading, Snapshot

__all__ = ["MOST_ROWS", "fitting_view", "format_duration", "sparkline", "view_of"]

MOST_ROWS, LEAST_ROWS = 12, 2
"""Of each table."""
WIDE = 144
"""From so many columns on, two tables fit beside each other."""
CARD_POINTS = 15
"""How many points the sparklines at the top show: an 80-column terminal has room for them."""
SPARKS = "▁▂▃▄▅▆▇█"
LIVE, HELD, HUGE, COMMITTED, SHARED = "blue", "cyan", "green", "bright_black", "magenta"


class Bar(NamedTuple):
    """An amount, as a line with a bar."""

    label: str
    nbytes: int
    colour: str
    note: str = ""
    part_bytes: int = 0
    """What of it is drawn in `part_colour`."""
    part_colour: str = HUGE


def view_of(history: History, width: int, n_rows: int, note: str = "") -> RenderableType:
    """Return a view of the history's latest snapshot.

    Parameters
    ----------
    history : History
        Of at least one snapshot.
    width : int
        Of the terminal; 80 and more are readable.
    n_rows : int
        Most rows of each table.
    note : str
        Stands at the top right.
    """
    snapshot = history.latest
    if snapshot is None:
        return Text("no reading yet")
    parts = [_head(history, snapshot, note)]
    parts += [_allocator(each, width, n_rows) for each in snapshot.allocators]
    if not snapshot.allocators:
        parts.append(Panel(Text("no allocator is open", style="dim"), title="allocators"))
    parts += [_cache(each) for each in snapshot.caches]
    if latencies := _latencies(history, width, n_rows):
        parts.append(latencies)
    return Group(*parts)


def fitting_view(history: History, console: Console, note: str = "") -> RenderableType:
    """Return the view with the longest tables that fit on a terminal, or with the shortest ones."""

    def is_too_long(n_rows: int) -> bool:
        view = view_of(history, console.width, n_rows, note)
        return len(console.render_lines(view, pad=False)) > console.height

    longer = range(LEAST_ROWS + 1, MOST_ROWS + 1)
    n_rows = LEAST_ROWS + bisect_left(longer, 1, key=is_too_long)
    return view_of(history, console.width, n_rows, note)


def sparkline(values: Sequence[float | None], *, is_log: bool = False) -> str:
    """Return a character for each value, higher for more; a gap where there is none.

    The scale starts at 0, or, if logarithmic, at a little below the least value.
    """
    known = [value for value in values if value is not None]
    most = max(known, default=0)
    if most <= 0:
        return "".join(" " if value is None else SPARKS[0] for value in values)
    least = min((value for value in known if value > 0), default=most)

    def height(value: float) -> float:
        if not is_log:
            return value / most
        # A factor of two takes at least an eighth of the height: noise stays flat.
        octaves = max(math.log2(most / least), len(SPARKS) - 1.0)
        return 1 - math.log2(most / max(value, least)) / octaves if value > 0 else 0.0

    return "".join(
        " " if value is None else SPARKS[min(int(height(value) * len(SPARKS)), len(SPARKS) - 1)]
        for value in values
    )


def format_duration(duration_ns: float | None) -> str:
    """Return a duration with three digits and its unit.

    >>> format_duration(43.2), format_duration(1234), format_duration(None)
    ('43.2 ns', '1.23 µs', '-')
    """
    if duration_ns is None:
        return "-"
    amount = duration_ns
    for unit in ("ns", "µs", "ms"):
        if amount < 999.5:
            return f"{amount:.3g} {unit}"
        amount /= 1000
    return f"{amount:.3g} s"


# --- parts ---


def _head(history: History, snapshot: Snapshot, note: str) -> RenderableType:
    title = Table.grid(expand=True)
    title.add_column()
    title.add_column(justify="right", style="dim")
    title.add_row(Text(f"pagealloc top  process {snapshot.pid}", style="bold"), Text(note))
    point = history.points[-1]
    latency = point.latencies.get("all")
    purged = point.purged_bytes_per_s
    cards = Table.grid(expand=True, padding=(0, 1))
    for _ in range(5):
        cards.add_column(ratio=1, no_wrap=True)
    cards.add_row(
        _card(
            "resident",
            format_bytes(snapshot.resident_bytes),
            sparkline(_last(history, "resident_bytes")),
        ),
        _card("page faults", _rate(point.faults_per_s), sparkline(_last(history, "faults_per_s"))),
        _card("allocations", _rate(point.allocs_per_s), sparkline(_last(history, "allocs_per_s"))),
        _card(
            "purged",
            "-" if purged is None else f"{format_bytes(round(purged))}/s",
            sparkline(_last(history, "purged_bytes_per_s")),
        ),
        _card(
            "allocation P99",
            format_duration(latency.p99_ns if latency else None),
            _p99s(history, "all", CARD_POINTS),
        ),
    )
    return Group(title, cards)


def _card(label: str, value: str, line: str) -> Text:
    return Text.assemble((label, "dim"), "\n", (value, "bold"), "\n", (line, LIVE))


def _last(history: History, field: str) -> list[float | None]:
    return [getattr(point, field) for point in history.points[-CARD_POINTS:]]


def _p99s(history: History, size_class: str, n_points: int) -> str:
    p99s_ns = [each.p99_ns for each in history.series(size_class)]
    return sparkline(p99s_ns[-n_points:], is_log=True)


def _allocator(reading: AllocatorReading, width: int, n_rows: int) -> RenderableType:
    stats = reading.stats
    most = max(stats.budget_bytes or 0, stats.committed_bytes, stats.live_bytes, stats.held_bytes)
    huge = "" if stats.huge_bytes is None else f"{format_bytes(stats.huge_bytes)} in huge pages"
    budget = "" if stats.budget_bytes is None else f" of {format_bytes(stats.budget_bytes)}"
    bars = _bars(
        [
            Bar("live", stats.live_bytes, LIVE, f"{stats.n_live:,} blocks"),
            Bar("held", stats.held_bytes, HELD, huge, stats.huge_bytes or 0),
            Bar(
                "committed",
                stats.committed_bytes,
                COMMITTED,
                f"{budget or ' no'} budget".strip(),
            ),
        ],
        most,
    )
    arenas = _arenas(stats.arenas, n_rows)
    classes = _classes(stats.classes, n_rows)
    tables: RenderableType = Group(arenas, classes)
    if width >= WIDE:
        beside = Table.grid(padding=(0, 4))
        beside.add_row(arenas, classes)
        tables = beside
    figures = Text(
        f"idle {format_bytes(stats.idle_bytes)}   reserved {format_bytes(stats.reserved_bytes)}   "
        f"purged {format_bytes(stats.purged_bytes)}   failed {stats.n_failed:,}",
        style="dim",
    )
    return _panel(f"allocator {reading.name}", Group(bars, figures, tables))


def _arenas(arenas: Sequence[ArenaStats], n_rows: int) -> RenderableType:
    table = _table(
        "arena", "asked → got", "reserved", "committed", "held", "huge", "node", n_left=2
    )
    shown = sorted(arenas, key=lambda each: -each.held_bytes)[:n_rows]
    for each in shown:
        is_less = each.requested_backing not in ("auto", each.achieved_backing)
        table.add_row(
            f"{each.address:#x}",
            Text(
                f"{each.requested_backing} → {each.achieved_backing}",
                style="yellow" if is_less else "",
            ),
            format_bytes(each.reserved_bytes),
            format_bytes(each.committed_bytes),
            format_bytes(each.held_bytes),
            "-" if each.huge_bytes is None else format_bytes(each.huge_bytes),
            "-" if each.numa_node is None else str(each.numa_node),
        )
    return _with_rest(table, len(arenas) - len(shown))


def _classes(classes: Sequence[ClassStats], n_rows: int) -> RenderableType:
    table = _table("class", "live", "idle", "slabs", "unused", "in use", n_left=0)
    used = [each for each in classes if each.n_live or each.n_idle or each.n_slabs]
    shown = sorted(used, key=lambda each: -each.block_bytes * (each.n_live + each.n_idle))
    shown = sorted(shown[:n_rows], key=lambda each: each.block_bytes)
    for each in shown:
        table.add_row(
            format_bytes(each.block_bytes) if each.block_bytes else "others",
            f"{each.n_live:,}",
            f"{each.n_idle:,}",
            f"{each.n_slabs:,}" if each.n_slabs else "-",
            f"{each.n_unused:,}" if each.n_slabs else "-",
            format_bytes(each.block_bytes * each.n_live) if each.block_bytes else "-",
        )
    return _with_rest(table, len(used) - len(shown))


def _latencies(history: History, width: int, n_rows: int) -> RenderableType | None:
    found = history.latencies()
    if not found:
        return None
    table = _table("size", "timed", "P50", "P99", n_left=0)
    table.add_column("P99 of each reading", no_wrap=True, style=LIVE)
    names = sorted(found, key=lambda name: -found[name].n_samples)[: n_rows + 1]
    for name in (name for name in found if name in names):
        latency = found[name]
        table.add_row(
            Text(name, style="bold" if name == "all" else ""),
            f"{latency.n_samples:,}",
            format_duration(latency.p50_ns),
            format_duration(latency.p99_ns),
            _p99s(history, name, width - 50),
        )
    span = f"of the last {history.duration_s:.0f} s" if len(history.points) > 1 else "so far"
    return _panel(f"latency of allocations, {span}", _with_rest(table, len(found) - len(names)))


def _cache(reading: CacheReading) -> RenderableType:
    stats, prefixes = reading.stats, reading.prefixes
    most = max(stats.budget_bytes or 0, stats.held_bytes, stats.needed_bytes)
    bars = _bars(
        [
            Bar("needed", stats.needed_bytes, LIVE, "by the distinct rows"),
            Bar("held", stats.held_bytes, HELD, f"{format_bytes(stats.waste_bytes)} waste"),
            Bar(
                "committed",
                stats.committed_bytes,
                COMMITTED,
                "no budget"
                if stats.budget_bytes is None
                else f"of {format_bytes(stats.budget_bytes)} budget",
            ),
            Bar("shared", stats.shared_bytes, SHARED, "saved by sharing"),
        ],
        max(most, stats.shared_bytes),
    )
    hits = (
        f"prefix hit rate {prefixes.hit_rate:.1%} of {prefixes.n_asked_tokens:,} tokens"
        if prefixes.n_lookups
        else "no prefix was looked up"
    )
    figures = Text(
        f"{stats.n_sequences:,} sequences   {stats.n_tokens:,} tokens   "
        f"{prefixes.n_blocks:,} published blocks   {hits}   "
        f"{format_bytes(stats.warm_bytes)} warm   {stats.n_mappings:,} mappings"
    )
    return _panel(
        f"KV cache {reading.name}",
        Group(bars, figures, Text(reading.layout, "dim", no_wrap=True, overflow="crop")),
    )


# --- pieces ---


def _bars(bars: Iterable[Bar], most_bytes: int) -> Table:
    table = Table.grid(expand=True, padding=(0, 1))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(ratio=1)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim", no_wrap=True, min_width=24)
    for bar in bars:
        table.add_row(bar.label, _Line(bar, max(1, most_bytes)), format_bytes(bar.nbytes), bar.note)
    return table


class _Line:
    """A bar as wide as its column."""

    def __init__(self, bar: Bar, most_bytes: int) -> None:
        self._bar = bar
        self._most_bytes = most_bytes

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterable[RenderableType]:
        width = options.max_width
        bar = self._bar
        n_all = min(width, math.ceil(bar.nbytes / self._most_bytes * width))
        n_part = min(n_all, round(bar.part_bytes / self._most_bytes * width))
        yield Text.assemble(
            ("━" * n_part, bar.part_colour),
            ("━" * (n_all - n_part), bar.colour),
            ("─" * (width - n_all), "bright_black"),
        )


def _table(*columns: str, n_left: int) -> Table:
    """Return a table without lines; its first columns stand to the left."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < n_left else "right", no_wrap=True)
    return table


def _with_rest(table: Table, n_left_out: int) -> RenderableType:
    if n_left_out <= 0:
        return table
    return Group(table, Text(f"{n_left_out:,} more", style="dim"))


def _panel(title: str, content: RenderableType) -> Panel:
    return Panel(content, title=title, title_align="left", border_style="bright_black")


def _rate(per_second: float | None) -> str:
    if per_second is None:
        return "-"
    return f"{per_second:,.0f}/s" if per_second < 1e6 else f"{per_second / 1e6:,.2f} million/s"
