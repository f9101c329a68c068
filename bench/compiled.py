"""Compiles a benchmark's ``.pyx`` against the installed package."""

from __future__ import annotations

import importlib
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from bench.installed import ROOT

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["compiled"]


def compiled(name: str) -> ModuleType:
    """Compile ``bench/NAME.pyx``, and import it.

    Raises
    ------
    RuntimeError
        Cython is not installed.
    """
    if name in sys.modules:
        return sys.modules[name]
    try:
        from Cython.Build import cythonize
        from setuptools import Distribution, Extension
    except ModuleNotFoundError as missing:
        raise RuntimeError(f"needs the package {missing.name}: pip install cython") from missing
    folder = Path(tempfile.mkdtemp(prefix="pagealloc-bench-"))
    source = folder / f"{name}.pyx"
    source.write_text((ROOT / f"bench/{name}.pyx").read_text())
    extension = Extension(name, [str(source)], extra_compile_args=["-O3"])
    modules = cythonize([extension], build_dir=str(folder), include_path=sys.path, quiet=True)
    distribution = Distribution({"ext_modules": modules})
    command = distribution.get_command_obj("build_ext")
    command.build_lib, command.build_temp = str(folder), str(folder)
    command.ensure_finalized()
    command.run()
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))
