"""Flame graphs: a profile as one page that needs nothing else.

Purpose
    Lay a profile's stacks over one another; the page's own lines let a reader zoom and search.
"""

from __future__ import annotations

import html
import json
from importlib.resources import files
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pagealloc.observe.profiles import Frame, Profile

__all__ = ["flame_graph"]

LEAST_SHARE = 0.0002
"""Frames with less of the whole are left out, which nobody could see."""


class _Node:
    """A call, below the calls that led to it."""

    def __init__(self, frame: Frame | None) -> None:
        self.frame = frame
        self.value = 0
        self.children: dict[Frame, _Node] = {}


def flame_graph(
    profile: Profile, title: str, *, which: int = -1, is_difference: bool = False
) -> str:
    """Return a page of HTML with a profile's flame graph.

    Parameters
    ----------
    profile : Profile
        Whose values are shown.
    title : str
        Of the page.
    which : int
        Which of its values.
    is_difference : bool
        Values may be negative: red is more, blue is less.
    """
    root = _Node(None)
    for stack, values in profile.samples.items():
        node = root
        node.value += values[which]
        for frame in reversed(stack):
            node = node.children.setdefault(frame, _Node(frame))
            node.value += values[which]
    value_type = profile.value_types[which]
    modules: dict[str, int] = {}
    least = LEAST_SHARE * max(1, sum(abs(values[which]) for values in profile.samples.values()))
    data = {
        "unit": value_type.unit,
        "isDifference": is_difference,
        "root": _as_list(root, title, modules, least),
        "modules": list(modules),
    }
    page = files("pagealloc.observe").joinpath("flamegraph.html").read_text(encoding="utf-8")
    subtitle = f"{value_type.name} in {value_type.unit}, {len(profile.samples):,} stacks"
    # A script element ends at the first "</", wherever it stands.
    encoded = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/")
    for mark, text in (
        ("__TITLE__", html.escape(title)),
        ("__SUBTITLE__", html.escape(subtitle)),
        ("__DATA__", encoded),
    ):
        page = page.replace(mark, text)
    return page


def _as_list(node: _Node, title: str, modules: dict[str, int], least: float) -> list[Any]:
    """Return a node as the page reads it: name, place, module, value, children."""
    frame = node.frame
    module = _module_of(frame) if frame is not None else ""
    number = modules.setdefault(module, len(modules)) if module else 0
    children = sorted(node.children.values(), key=lambda child: -abs(child.value))
    return [
        title if frame is None else frame.function,
        "" if frame is None else f"{frame.file}:{frame.line}",
        number,
        node.value,
        [_as_list(child, title, modules, least) for child in children if abs(child.value) >= least],
    ]


def _module_of(frame: Frame) -> str:
    """Return what a frame's colour stands for: the package its file is part of."""
    parts = PurePath(frame.file).parts
    for folder in ("site-packages", "dist-packages"):
        if folder in parts[:-1]:
            below = parts[parts.index(folder) + 1 :]
            return PurePath(below[0]).stem
    if "pagealloc" in parts[:-1]:
        return "pagealloc"
    return PurePath(frame.file).stem or frame.function
