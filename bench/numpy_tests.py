"""NumPy's own array tests, without and with `pagealloc.numpy_handler()`: is every outcome the same?

Two processes run the same tests at the same time, each into its own JSON file; nothing here is
timed.  ``python bench/numpy_tests.py --child with|without JSON FILE...`` is what they run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["ARRAY_TESTS", "entry", "missing", "run"]

ARRAY_TESTS = (
    "array_coercion",
    "casting_unittests",
    "dlpack",
    "dtype",
    "einsum",
    "function_base",
    "indexerrors",
    "indexing",
    "item_selection",
    "mem_overlap",
    "memmap",
    "multiarray",
    "nditer",
    "numeric",
    "records",
    "regression",
    "shape_base",
    "ufunc",
    "umath",
)
TIMEOUT_SECONDS = 900
# NumPy skips tests that need more than the machine has free, which changes from run to run.
AVAILABLE_MEMORY = "2 GB"


def missing() -> str | None:
    """Return why NumPy's tests cannot run here, or None."""
    for package in ("pytest", "hypothesis"):
        try:
            __import__(package)
        except ImportError:
            return f"NumPy's tests need {package}, which is not installed"
    return None if _folder().is_dir() else "this NumPy was installed without its tests"


def run(tests: Sequence[str] = ARRAY_TESTS) -> dict[str, Any]:
    """Run NumPy's ``_core/tests/test_{name}.py`` both ways and compare them test by test.

    Parameters
    ----------
    tests : sequence of str
        Such names, those unknown to this NumPy left out; or paths of test files (``*.py``).

    Returns
    -------
    dict
        The benchmark's entry.  ``differing`` lists each test whose outcome is not the same, with
        both outcomes; ``n_allocs`` is how often NumPy allocated through the handler.

    Raises
    ------
    RuntimeError
        The tests cannot run here, or one of the two processes did not end as pytest ends.
    """
    import numpy as np

    if reason := missing():
        raise RuntimeError(reason)
    paths = [Path(t).resolve() if t.endswith(".py") else _folder() / f"test_{t}.py" for t in tests]
    files = [path for path in paths if path.exists()]
    with tempfile.TemporaryDirectory(prefix="pagealloc-numpy-tests-") as folder:
        children = {mode: _Child(mode, files, Path(folder)) for mode in ("without", "with")}
        try:
            found = {mode: child.result() for mode, child in children.items()}
        finally:
            for child in children.values():
                child.stop()
    without, under = found["without"]["outcomes"], found["with"]["outcomes"]
    names = sorted(without.keys() | under.keys())
    differing = [
        {"test": name, "without": without.get(name), "with": under.get(name)}
        for name in names
        if without.get(name) != under.get(name)
    ]
    n_same = len(names) - len(differing)
    counts = {kind: list(under.values()).count(kind) for kind in sorted(set(under.values()))}
    return {
        "bar": "12",
        "work": f"NumPy {np.__version__}'s array tests, under numpy_handler()",
        "ours": n_same,
        "peers": {"without": len(without)},
        "unit": "tests with the same outcome",
        "ratio": n_same / len(without) if without else 0.0,
        "to_reach": 1,
        "holds": bool(without) and not differing and found["with"]["n_allocs"] > 0,
        "differing": differing,
        "outcomes": counts,
        "n_allocs": found["with"]["n_allocs"],
        "seconds": {mode: result["seconds"] for mode, result in found.items()},
    }


def entry() -> dict[str, Any]:
    """Return `run()`, under the name that ``python -m bench core`` looks for."""
    return run()


def _folder() -> Path:
    import numpy as np

    package = Path(np.__file__).parent
    return package / ("_core" if (package / "_core/tests").is_dir() else "core") / "tests"


class _Child:
    """One of the two processes."""

    def __init__(self, mode: str, files: Sequence[Path], folder: Path) -> None:
        import pagealloc

        self.mode = mode
        self.json = folder / f"{mode}.json"
        self.log = folder / f"{mode}.log"
        work = folder / mode  # some of the tests write into the current folder
        work.mkdir()
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
        environment["NPY_AVAILABLE_MEM"] = AVAILABLE_MEMORY
        # The package measured is the one imported here, wherever it lies.
        environment["PYTHONPATH"] = str(Path(pagealloc.__file__).resolve().parent.parent)
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, __file__, "--child", mode, self.json, *files],
                cwd=work,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def result(self) -> dict[str, Any]:
        status = self.process.wait(TIMEOUT_SECONDS)
        if status not in (0, 1) or not self.json.exists():  # 1: some of the tests failed
            tail = self.log.read_text(errors="replace")[-3000:]
            raise RuntimeError(
                f"NumPy's tests {self.mode} the handler ended with status {status}:\n{tail}"
            )
        content: dict[str, Any] = json.loads(self.json.read_text())
        return content

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


class _Outcomes:
    """A pytest plugin: notes each test's outcome, all of them run with or without the handler."""

    def __init__(self, mode: str, path: Path) -> None:
        self.path = path
        self.outcomes: dict[str, str] = {}
        self.seconds = 0.0
        self.handler = None
        if mode == "with":
            import pagealloc

            self.handler = pagealloc.numpy_handler()

    def pytest_sessionstart(self) -> None:
        if self.handler is not None:
            self.handler.install()

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.seconds += report.duration
        outcome = report.outcome
        if hasattr(report, "wasxfail"):
            outcome = "xfailed" if outcome == "skipped" else "xpassed"
        elif outcome == "failed" and report.when != "call":
            outcome = f"error in {report.when}"
        if report.when == "call" or outcome != "passed":
            self.outcomes[report.nodeid] = outcome

    def pytest_sessionfinish(self) -> None:
        n_allocs = 0
        if self.handler is not None:
            if not self.handler.active:
                raise RuntimeError("a test changed NumPy's handler: the comparison proves nothing")
            n_allocs = self.handler.allocator.stats().n_allocs
        content = {
            "outcomes": self.outcomes,
            "n_allocs": n_allocs,
            "seconds": round(self.seconds, 1),
        }
        self.path.write_text(json.dumps(content))


def _child(mode: str, path: str, files: Sequence[str]) -> int:
    import pytest

    options = ["-q", "-p", "no:cacheprovider", "-m", "not slow"]  # what numpy.test() runs
    # No settings of a project around, but NumPy's own conftest.py; the ids name the files.
    package = str(_folder().parent.parent)
    options += ["-c", os.devnull, "--rootdir", package, "--confcutdir", package]
    return int(pytest.main([*options, *files], plugins=[_Outcomes(mode, Path(path))]))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        sys.exit(_child(sys.argv[2], sys.argv[3], sys.argv[4:]))
    print(json.dumps(run(sys.argv[1:] or ARRAY_TESTS), indent=2))
