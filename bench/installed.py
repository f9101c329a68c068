"""Which pagealloc is measured: the built one, wherever the benchmark is started from."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

__all__ = ["ROOT", "prefer_installed_package"]

ROOT = Path(__file__).resolve().parent.parent


def prefer_installed_package() -> None:
    """Measure the built package: the checkout's folder of the same name may hold no extensions."""
    entries = list(sys.path)
    sys.path[:] = [entry for entry in entries if Path(entry or ".").resolve() != ROOT]
    if importlib.util.find_spec("pagealloc") is None:
        sys.path[:] = entries  # built in place, and not installed
