"""The benchmarks, which are no part of what is installed."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def import_bench():
    """Make `bench` importable without the checkout's root on sys.path (see conftest)."""
    if "bench" not in sys.modules:
        folder = ROOT / "bench"
        spec = importlib.util.spec_from_file_location(
            "bench", folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        sys.modules["bench"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["bench"])
