"""The soak's picture: time across, latency upwards (logarithmic), colour for how many."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

__all__ = ["draw"]

MAX_COLUMNS = 400


def counts(windows: list[dict[str, Any]], n_bins: int) -> npt.NDArray[np.float64]:
    """Return the samples of each bin and window, neighbours added up in a long run."""
    n_columns = min(len(windows), MAX_COLUMNS)
    found = np.zeros((n_bins, n_columns))  # (latency bin, time)
    for index, window in enumerate(windows):
        for bin_, n in window["bins"].items():
            found[int(bin_), index * n_columns // len(windows)] += n
    return found


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw one map for each allocator, side by side, with their P99 as a line.

    Parameters
    ----------
    result : dict
        As `bench.soak.measure` returns it.
    path : Path
        Where the PNG goes.
    """
    windows: dict[str, list[dict[str, Any]]] = result["windows"]
    used = [int(bin_) for per in windows.values() for window in per for bin_ in window["bins"]]
    lowest, n_bins = min(used), max(used) + 1
    maps = {name: counts(per, n_bins)[lowest:] for name, per in windows.items()}
    most = max(float(map_.max()) for map_ in maps.values())
    figure = Figure(figsize=(12, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(maps), sharey=True)
    for axis, (name, map_) in zip(axes, maps.items(), strict=True):
        octave = windows[name][0]["bins_per_octave"]
        edges_ns = 2.0 ** (np.arange(lowest, n_bins + 1) / octave)
        minutes = np.array([window["start_s"] for window in windows[name]]) / 60
        end = minutes[-1] + (minutes[-1] - minutes[0]) / max(1, len(minutes) - 1)
        edges_minutes = np.linspace(0, max(end, 1e-6), map_.shape[1] + 1)
        shown = np.ma.masked_equal(map_, 0)
        mesh = axis.pcolormesh(
            edges_minutes,
            edges_ns,
            shown,
            norm=LogNorm(1, max(most, 2)),
            cmap=mpl.colormaps["viridis"],
        )
        p99 = [window["p99"] for window in windows[name]]
        axis.plot(minutes, p99, color="red", linewidth=0.8, label="P99 of a window")
        total = result["total"][name]
        axis.set_title(f"{name}: P99 {total['p99']} ns of {total['n']:,} allocations")
        axis.set_yscale("log")
        axis.set_xlabel("minutes")
        axis.legend(loc="upper right")
    axes[0].set_ylabel("one allocation of 64 KiB, ns")
    figure.colorbar(mesh, ax=axes, label="allocations")
    figure.savefig(path, dpi=110)
