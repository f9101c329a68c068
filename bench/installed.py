"""Which pagealloc is measured: the built one, wherever the benchmark is started from."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

__all__ = ["ROOT", "environment", "prefer_installed_package"]

ROOT = Path(__file__).resolve().parent.parent


def prefer_installed_package() -> None:
    """Measure the built package: the checkout's folder of the same name may hold no extensions."""
    entries = list(sys.path)
    sys.path[:] = [entry for entry in entries if Path(entry or ".").resolve() != ROOT]
    if importlib.util.find_spec("pagealloc") is None:
        sys.path[:] = entries  # built in place, and not installed


def environment(*more_paths: Path) -> dict[str, str]:
    """Return the environment of a process that imports the pagealloc imported here."""
    import pagealloc

    paths = [Path(pagealloc.__file__).resolve().parent.parent, *more_paths]
    texts = [*map(str, paths), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, texts))}
