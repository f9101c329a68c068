"""Compiling C in tests, against the installed pagealloc's header."""

import importlib.util
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest

import pagealloc

STRICT = ("-Wall", "-Wextra", "-Werror")


def build_tool(*names: str) -> str:
    """Return the first of these compilers that is there, or skip."""
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        pytest.skip("Python's headers are not installed")
    found = [path for name in names if (path := shutil.which(name))]
    if not found:
        pytest.skip(f"no compiler: none of {', '.join(names)} is installed")
    return found[0]


def run(*command: str | Path, cwd: Path, imports_pagealloc: bool = False) -> str:
    environ = dict(os.environ)
    if not imports_pagealloc:  # a sanitizer has nothing to see in compilers and pip
        environ.pop("LD_PRELOAD", None)
    process = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stdout
    return process.stdout


def load(name: str, folder: Path) -> ModuleType:
    (path,) = folder.glob(f"{name}.*so")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sanitizer_flags() -> list[str]:
    """What instruments a test's C as the pagealloc under test is: else half of a race is unseen."""
    sanitizer = os.environ.get("PAGEALLOC_SANITIZE")
    return [f"-fsanitize={sanitizer}", "-g1", "-fno-omit-frame-pointer"] if sanitizer else []


def compile_c(
    source: str | Path,
    name: str,
    folder: Path,
    include: str | None = None,
    **macros: int,
) -> None:
    """Compile a C module, a file or its text, as strictly as anybody might."""
    if isinstance(source, str):
        path = folder / f"{name}.c"
        path.write_text(source)
        source = path
    run(
        build_tool("gcc", "cc", "clang"),
        *(*STRICT, "-std=c11", "-D_GNU_SOURCE", "-O1", "-shared", "-fPIC", "-pthread"),
        *sanitizer_flags(),
        *(f"-D{macro}={value}" for macro, value in macros.items()),
        *("-isystem", sysconfig.get_path("include")),
        *("-I", include or pagealloc.get_include()),
        *(source, "-o", f"{name}.so"),
        cwd=folder,
    )
