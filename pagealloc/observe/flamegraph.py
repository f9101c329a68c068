"""Flame graphs: a profile as one page that needs nothing else.

Purpose
    Lay a profile's stacks over one another, once for each of its values; the page's own script
    draws them, and lets a reader switch between values, zoom and search.
Structure
    ::

        stacks --_view: a value's calls below calls, in a flat list--> JSON --> flamegraph.html
                                                          flamegraph.js, its script --^
Invariants
    A call stands behind the one that led to it and before what it led to, so neither this nor the
    script ever recurses, however deep a stack is.  Its weight, the sum of its stacks' values
    without their signs, is at least that of the calls below it together: what a width must be.
    A number means the same frame, and a colour the same module, whichever value is shown.
"""

from __future__ import annotations

import functools
import html
import json
import re
from importlib.resources import files
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pagealloc.observe.profiles import Frame, Profile, Stack

__all__ = ["flame_graph"]

LEAST_SHARE = 0.0002
"""Calls with less of the whole are left out, which nobody could see."""
N_HOTTEST = 5


class _Call(NamedTuple):
    """A call, below the calls that led to it."""

    frame: Frame | None
    """None if it is all that was counted."""
    depth: int
    weight: int
    samples: list[tuple[Stack, int]]
    """The stacks that it is part of."""


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
        Which of its values is shown first; if there is nothing of it, the last one that there is
        something of.
    is_difference : bool
        It is one profile minus another: red is more, blue is less.
    """
    frames: dict[Frame, int] = {}
    views = [_view(profile, at, frames) for at in range(len(profile.value_types))]
    order = [which % len(views), *reversed(range(len(views)))]
    first = next((at for at in order if views[at]["nStacks"]), order[0])
    modules = _add_shares(profile, views, frames)
    numbers = {module: number for number, module in enumerate(modules)}
    data = {
        "isDifference": is_difference,
        "period": profile.period,
        "periodUnit": profile.period_type.unit,
        "leastShare": LEAST_SHARE,
        "frames": [[frame.function, frame.place, numbers[_module_of(frame)]] for frame in frames],
        "modules": modules,
        "views": views,
        "first": first,
    }
    texts = {
        "TITLE": html.escape(title.encode(errors="backslashreplace").decode()),
        # Without a "<", nothing in it can end the script element, or open a comment.
        "DATA": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
        "SCRIPT": _own_text("flamegraph.js"),
    }
    page = _own_text("flamegraph.html")
    return re.sub("__(TITLE|DATA|SCRIPT)__", lambda mark: texts[mark[1]], page)


def _own_text(name: str) -> str:
    return files("pagealloc.observe").joinpath(name).read_text(encoding="utf-8")


def _view(profile: Profile, which: int, frames: dict[Frame, int]) -> dict[str, Any]:
    """Return one value of all stacks as the page reads it, and number the frames it shows.

    Returns
    -------
    dict
        ``name``, ``unit``: of the value;
        ``nStacks``: how many have any of it;
        ``nodes``: depth (0: all), number of the frame (-1: all), weight, value and own value of
        each call, one after the other, the calls below one right behind it;
        ``nLeftOut``: how many calls are too thin, without what is below them;
        ``hottest``: function, place and own value of the lines with most.
    """
    samples = [(stack, values[which]) for stack, values in profile.samples.items() if values[which]]
    whole = _Call(None, 0, _weight(samples), samples)
    nodes: list[int] = []
    n_left_out = 0
    waiting = [whole]
    while waiting:
        call = waiting.pop()
        number = -1 if call.frame is None else frames.setdefault(call.frame, len(frames))
        value = own = 0
        below: dict[Frame, list[tuple[Stack, int]]] = {}
        for sample in call.samples:
            stack, amount = sample
            value += amount
            if call.depth == len(stack):
                own += amount
            else:
                below.setdefault(stack[-1 - call.depth], []).append(sample)
        nodes += call.depth, number, call.weight, value, own
        calls = [_Call(frame, call.depth + 1, _weight(part), part) for frame, part in below.items()]
        shown = [each for each in calls if each.weight >= LEAST_SHARE * whole.weight]
        n_left_out += len(calls) - len(shown)
        shown.sort(key=lambda each: (-each.weight, each.frame))
        waiting += reversed(shown)  # the widest is taken first, and stands left
    return {
        **profile.value_types[which]._asdict(),
        "nStacks": len(samples),
        "nodes": nodes,
        "nLeftOut": n_left_out,
        "hottest": [
            [frame.function, frame.place, value]
            for frame, value in profile.hottest(N_HOTTEST, which)
        ],
    }


def _weight(samples: list[tuple[Stack, int]]) -> int:
    return sum(abs(value) for _, value in samples)


def _add_shares(
    profile: Profile, views: list[dict[str, Any]], frames: Iterable[Frame]
) -> list[str]:
    """Return the modules of these frames, and add to each view what of it is their own.

    Those come first, and have colours, that have the largest share of any value.  ``shares`` of a
    view are values without their signs, in the order of the modules.
    """
    owns = {module: [0] * len(views) for module in map(_module_of, frames)}
    for stack, values in profile.samples.items():
        if stack and (own := owns.get(_module_of(stack[0]))):
            for at, value in enumerate(values):
                own[at] += abs(value)
    wholes = [max(1, view["nodes"][2]) for view in views]

    def rank(module: str) -> tuple[float, str]:
        return -max(own / whole for own, whole in zip(owns[module], wholes, strict=True)), module

    modules = sorted(owns, key=rank)
    for at, view in enumerate(views):
        view["shares"] = [owns[module][at] for module in modules]
    return modules


@functools.lru_cache(maxsize=4096)
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
