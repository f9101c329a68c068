"""The demo's picture: KV memory and page faults of both sides, beside the reference's claim."""

from pathlib import Path
from typing import Any

from pagealloc.demo.comparison import REFERENCE_PERCENT, Comparison
from pagealloc.demo.errors import require_extra
from pagealloc.demo.report import write_percent

__all__ = ["BAR_COLOURS", "FAINT", "INK", "draw_chart", "style_axes", "write_number"]

INK = "#1f2933"
FAINT = "#8a949e"
BAR_COLOURS = ("#b8c0c8", "#0f8b8d")
REFERENCE_COLOUR = "#d1495b"


def draw_chart(comparison: Comparison, path: Path, subtitle: str) -> None:
    """Write the picture as a PNG.

    Raises
    ------
    DemoError
        If matplotlib is not installed.
    """
    figure_class = require_extra("matplotlib.figure").Figure
    figure = figure_class(figsize=(10, 5.4), dpi=150, layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.2, h_pad=0.12, rect=(0, 0, 1, 0.84))
    same = comparison.tokens_identical
    outcome = "same text, less memory" if all(same) else "THE TEXTS DIFFER"
    if comparison.is_quantised and not all(same):
        outcome = f"same text in {sum(same)} of {len(same)}, less memory"
    figure.text(
        0.02,
        0.945,
        f"{len(same)} conversations, one shared system prompt: {outcome}",
        fontsize=15,
        fontweight="bold",
        color=INK,
    )
    figure.text(0.02, 0.895, subtitle, fontsize=9.5, color=FAINT)
    memory_axes, fault_axes = figure.subplots(1, 2)
    _draw_panel(memory_axes, comparison, "kv_bytes", "KV memory held, MiB", 2**20)
    _draw_panel(
        fault_axes, comparison, "faults_total", "page faults, start-up and first inference", 1
    )
    figure.savefig(path)


def _draw_panel(axes: Any, comparison: Comparison, figure_name: str, title: str, unit: int) -> None:
    before = getattr(comparison.baseline, figure_name) / unit
    after = getattr(comparison.pagealloc, figure_name) / unit
    bars = axes.bar(("baseline", "pagealloc"), (before, after), width=0.56, color=BAR_COLOURS)
    axes.bar_label(
        bars,
        [
            write_number(before),
            f"{write_number(after)}\n{write_percent(-comparison.reduction_percent(figure_name))}",
        ],
        padding=4,
        fontsize=12,
        fontweight="bold",
        color=INK,
        zorder=4,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
    )
    percent = REFERENCE_PERCENT[figure_name]
    claimed = before * (1 + percent / 100)
    axes.axhline(claimed, color=REFERENCE_COLOUR, linestyle=(0, (4, 3)), linewidth=1.4, zorder=3)
    axes.text(
        0.5,
        claimed + before * 0.015,
        f"reference\n{write_percent(percent)}",
        ha="center",
        va="bottom",
        fontsize=10,
        color=REFERENCE_COLOUR,
    )
    axes.set_title(title, fontsize=11.5, color=INK, loc="left", pad=12)
    axes.set_xlim(-0.5, 1.5)
    axes.set_ylim(0, before * 1.14)
    axes.yaxis.set_major_formatter(lambda value, _position: write_number(value))
    style_axes(axes)


def style_axes(axes: Any) -> None:
    """Leave nothing of the axes but what is read."""
    axes.tick_params(axis="x", length=0, labelsize=11.5, labelcolor=INK)
    axes.tick_params(axis="y", length=0, labelsize=9, labelcolor=FAINT)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)


def write_number(value: float) -> str:
    """Return a figure for the picture."""
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.1f}"
