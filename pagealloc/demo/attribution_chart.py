"""Waterfalls: the first step's bar, what each step took away or added, the last step's bar."""

from pathlib import Path
from typing import Any

from pagealloc.demo.attribution import FIGURES, Attribution
from pagealloc.demo.chart import BAR_COLOURS, FAINT, INK, style_axes, write_number
from pagealloc.demo.errors import require_extra
from pagealloc.demo.report import write_percent, write_points

__all__ = ["CHARTS", "draw_waterfalls"]

CHARTS = {
    "kv_bytes": ("kv-memory.png", "KV memory held", "MiB", 2**20),
    "n_faults": ("page-faults.png", "Page faults, start-up and first inference", "faults", 1),
    "alloc_p99_ns": ("allocation-p99.png", "Allocation P99 of a KV block", "µs", 1000),
}
"""File name, title, unit, and how much of the figure one unit is."""

LESS_COLOUR, MORE_COLOUR, CLAIM_COLOUR = "#6fbcbd", "#e09f5a", "#b3263c"
BAR_WIDTH = 0.62
GRID_COLOUR = "#eceff1"


def draw_waterfalls(attribution: Attribution, folder: Path, subtitle: str) -> list[Path]:
    """Write one PNG a figure of `CHARTS`; return where they are.

    Raises
    ------
    DemoError
        If matplotlib is not installed.
    """
    figure_class = require_extra("matplotlib.figure").Figure
    paths = []
    for key, (file_name, title, unit, unit_size) in CHARTS.items():
        # An own background, for the page around it may be light or dark.
        figure = figure_class(figsize=(10, 5.2), dpi=150, layout="constrained", facecolor="white")
        figure.get_layout_engine().set(w_pad=0.2, h_pad=0.12, rect=(0, 0, 1, 0.86))
        heading = f"{title}: {write_percent(attribution.total_percent(key))}"
        figure.text(0.02, 0.945, heading, fontsize=15, fontweight="bold", color=INK)
        figure.text(0.02, 0.895, subtitle, fontsize=9.5, color=FAINT)
        _draw(figure.subplots(), attribution, key, unit, unit_size)
        paths.append(folder / file_name)
        figure.savefig(paths[-1])
    return paths


def _draw(axes: Any, attribution: Attribution, key: str, unit: str, unit_size: int) -> None:
    points = dict(
        zip(
            (taken.step.key for taken in attribution.taken),
            attribution.percent_points(key),
            strict=True,
        )
    )
    first = attribution.steps[0].value(key) / unit_size
    labels, level, top = [], first, first
    for position, each in enumerate(attribution.steps):
        labels.append(each.step.title.replace(", ", ",\n"))
        if not each.runs:
            axes.text(position, level, "not available\nhere", ha="center", va="bottom",
                      fontsize=9.5, color=FAINT)  # fmt: skip
            continue
        here = each.value(key) / unit_size
        if position == 0:
            axes.bar(0, here, BAR_WIDTH, color=BAR_COLOURS[0])
            text = write_number(here)
        else:
            axes.bar(position, max(abs(here - level), first * 0.003), BAR_WIDTH,
                     bottom=min(here, level),
                     color=LESS_COLOUR if here <= level else MORE_COLOUR)  # fmt: skip
            text = f"{write_points(points[each.step.key])} pp\nto {write_number(here)}"
        _label(axes, position, max(here, level), text, first)
        reach = position + 1
        axes.plot((position - BAR_WIDTH / 2, reach + BAR_WIDTH / 2), (here, here), color=FAINT,
                  linewidth=0.8, zorder=1)  # fmt: skip
        top, level = max(top, here), here
    end = len(labels)
    axes.bar(end, level, BAR_WIDTH, color=BAR_COLOURS[1])
    _label(axes, end, level, write_number(level), first)
    labels.append("all steps")
    _draw_claim(axes, key, first, end)
    axes.set_xticks(range(len(labels)), labels)
    axes.set_xlim(-0.5, end + 0.5)
    axes.set_ylim(0, top * 1.16)
    axes.set_ylabel(unit, color=FAINT, fontsize=9.5)
    axes.yaxis.set_major_formatter(lambda value, _position: write_number(value))
    axes.yaxis.grid(visible=True, color=GRID_COLOUR, zorder=0)
    axes.set_axisbelow(True)
    style_axes(axes)
    axes.tick_params(axis="x", labelsize=10)


def _label(axes: Any, position: float, height: float, text: str, first: float) -> None:
    axes.text(position, height + first * 0.015, text, ha="center", va="bottom", fontsize=10.5,
              fontweight="bold", color=INK, zorder=4,
              bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})  # fmt: skip


def _draw_claim(axes: Any, key: str, first: float, end: int) -> None:
    """Draw what the reference claims as a dashed line, and name it where nothing else is said."""
    percent = next(figure.reference_percent for figure in FIGURES if figure.key == key)
    if percent is None:
        return
    claimed = first * (1 + percent / 100)
    axes.plot((-0.5, end + 0.5), (claimed, claimed), color=CLAIM_COLOUR, linestyle=(0, (4, 3)),
              linewidth=1.3, zorder=3)  # fmt: skip
    text = f"reference\n{write_percent(percent)}"
    axes.text(0, claimed + first * 0.015, text, ha="center", va="bottom", fontsize=9.5,
              color=CLAIM_COLOUR, zorder=4)  # fmt: skip
