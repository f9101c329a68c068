"""The picture of ``pagealloc demo --engine llama``: what each side holds, and how long it takes."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any

from pagealloc.demo.chart import BAR_COLOURS, FAINT, INK, style_axes, write_number
from pagealloc.demo.errors import require_extra

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from pagealloc.demo.llama_side import LlamaResult

__all__ = ["draw_llama_chart"]

LABELS = ("llama.cpp", "PageCache", "K8/V4")
COLOURS = (BAR_COLOURS[0], BAR_COLOURS[1], BAR_COLOURS[1])


def draw_llama_chart(results: Mapping[str, LlamaResult], path: Path, subtitle: str) -> None:
    """Write the picture as a PNG.

    Raises
    ------
    DemoError
        If matplotlib is not installed.
    """
    figure_class = require_extra("matplotlib.figure").Figure
    figure = figure_class(figsize=(12, 5.4), dpi=150, layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.2, h_pad=0.12, rect=(0, 0, 1, 0.84))
    n = len(results["stock"].first_token_s)
    title = f"llama.cpp: {n} conversations that share a system prompt"
    figure.text(0.02, 0.945, title, fontsize=15, fontweight="bold", color=INK)
    figure.text(0.02, 0.895, subtitle, fontsize=9.5, color=FAINT)
    sides = list(results.values())
    panels = {
        "prompts held, MiB": [side.held_bytes / 2**20 for side in sides],
        "KV buffer resident, MiB": [side.kv_used_bytes / 2**20 for side in sides],
        "load of a known prompt, ms": [1e3 * median(side.load_s) for side in sides],
        "first token of it, ms": [1e3 * median(side.first_token_s) for side in sides],
    }
    for axes, (name, values) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        _draw_panel(axes, name, values)
    figure.savefig(path)


def _draw_panel(axes: Any, title: str, values: list[float]) -> None:
    bars = axes.bar(LABELS, values, width=0.6, color=COLOURS)
    axes.bar_label(bars, [write_number(value) for value in values], padding=3, color=INK)
    axes.set_title(title, fontsize=11, color=INK, loc="left", pad=12)
    axes.set_ylim(0, 1.14 * max(values))
    style_axes(axes)
    axes.tick_params(axis="x", labelsize=10)
