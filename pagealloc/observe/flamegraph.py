"""Flame graphs: a profile as one page that needs nothing else.

Purpose
    Lay a profile's stacks over one another; the page's own script draws them, and lets a reader
    zoom and search.
Structure
    ::

        stacks --_tree--> calls below calls --_columns--> flat lists --JSON--> flamegraph.html
Invariants
    A call stands behind the one that led to it and before what it led to, so neither this nor the
    script ever recurses, however deep a stack is.  Its weight, the sum of its stacks' values
    without their signs, is at least that of the calls below it together: what a width must be.
"""

from __future__ import annotations

import html
import json
import re
from importlib.resources import files
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pagealloc.observe.profiles import Frame, Profile

__all__ = ["flame_graph"]

LEAST_SHARE = 0.0002
"""Calls with less of the whole are left out, which nobody could see."""
N_HOTTEST = 5


class _Node:
    """A call, below the calls that led to it."""

    __slots__ = ("children", "frame", "own", "value", "weight")

    def __init__(self, frame: Frame | None) -> None:
        self.frame = frame
        self.weight = 0
        self.value = 0
        self.own = 0
        self.children: dict[Frame, _Node] = {}

    def count(self, value: int) -> None:
        self.value += value
        self.weight += abs(value)

    def own_weight(self) -> int:
        return self.weight - sum(child.weight for child in self.children.values())


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
        It is one profile minus another: red is more, blue is less.
    """
    root = _tree(profile, which)
    value_type = profile.value_types[which]
    columns = _columns(root)
    data = {
        "unit": value_type.unit,
        "isDifference": is_difference,
        "periodText": f"{profile.period:,} {profile.period_type.unit}" if profile.period else "",
        "leastShare": LEAST_SHARE,
        **columns,
        "hottest": [
            [frame.function, frame.place, value]
            for frame, value in profile.hottest(N_HOTTEST, which)
        ],
    }
    n_stacks = sum(1 for values in profile.samples.values() if values[which])
    subtitle = f"{value_type.name} in {value_type.unit}, {n_stacks:,} stacks"
    texts = {
        "TITLE": html.escape(title.encode(errors="backslashreplace").decode()),
        "SUBTITLE": html.escape(subtitle),
        # Without a "<", nothing in it can end the script element, or open a comment.
        "DATA": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
    }
    page = files("pagealloc.observe").joinpath("flamegraph.html").read_text(encoding="utf-8")
    return re.sub("__(TITLE|SUBTITLE|DATA)__", lambda mark: texts[mark[1]], page)


def _tree(profile: Profile, which: int) -> _Node:
    root = _Node(None)
    for stack, values in profile.samples.items():
        value = values[which]
        if not value:
            continue
        node = root
        node.count(value)
        for frame in reversed(stack):
            below = node.children.get(frame)
            if below is None:
                below = node.children[frame] = _Node(frame)
            node = below
            node.count(value)
        node.own += value
    return root


def _columns(root: _Node) -> dict[str, Any]:
    """Return the tree as the page reads it.

    Returns
    -------
    dict
        ``frames``: function, place and number of the module of each different frame;
        ``modules``: names and own values without signs, most first;
        ``nodes``: number of the node above (-1: none), of the frame (-1: all), weight, value and
        own value of each call, one after the other;
        ``nLeftOut``: how many calls are too thin, without what is below them.
    """
    least = LEAST_SHARE * root.weight
    frames: dict[Frame, int] = {}
    module_of_frame: list[str] = []
    weight_of_module: dict[str, int] = {}
    nodes: list[int] = []
    n_left_out = 0
    waiting = [(root, -1)]
    while waiting:
        node, above = waiting.pop()
        number = -1
        if node.frame is not None:
            number = frames.setdefault(node.frame, len(frames))
            if number == len(module_of_frame):
                module_of_frame.append(_module_of(node.frame))
            module = module_of_frame[number]
            weight_of_module[module] = weight_of_module.get(module, 0) + node.own_weight()
        here = len(nodes) // 5
        nodes += above, number, node.weight, node.value, node.own
        children = sorted(node.children.items(), key=lambda item: (-item[1].weight, item[0]))
        shown = [(child, here) for _, child in children if child.weight >= least]
        n_left_out += len(children) - len(shown)
        waiting += reversed(shown)  # the widest is taken first, and stands left
    modules = sorted(weight_of_module.items(), key=lambda item: (-item[1], item[0]))
    numbers = {module: number for number, (module, _) in enumerate(modules)}
    return {
        "frames": [
            [frame.function, frame.place, numbers[module]]
            for frame, module in zip(frames, module_of_frame, strict=True)
        ],
        "modules": modules,
        "nodes": nodes,
        "nLeftOut": n_left_out,
    }


def _module_of(frame: Frame) -> str:
    """Return what a frame's colour stands for: the package or module that its file is part of."""
    if frame.file.startswith("<"):  # "<frozen importlib._bootstrap>", "<string>"
        frozen = frame.file.strip("<>").removeprefix("frozen ")
        return frozen.partition(".")[0] or frame.file
    parts = PurePath(frame.file).parts
    if "pagealloc" in parts[:-1]:
        return "pagealloc"
    for at in range(len(parts) - 2, -1, -1):
        if re.fullmatch(r"(site|dist)-packages|python\d[\d.]*t?", parts[at]):
            return parts[at + 1].partition(".")[0] or parts[at + 1]
    return PurePath(frame.file).stem or frame.function
