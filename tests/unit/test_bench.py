"""The dispatcher of the benchmarks; what they measure is measured by ``python -m bench NAME``."""

import json
import mmap
import os
import platform
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pagealloc import ExtentStore, Window, huge_page_size_bytes

ROOT = Path(__file__).resolve().parent.parent.parent


def bench(*arguments, cwd=ROOT):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    return subprocess.run(
        [sys.executable, "-m", "bench", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_it_lists_the_benchmarks():
    result = bench()
    assert result.returncode == 0
    assert "fork         fork() of a 1,000-token sequence" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "there is no benchmark 'nothing'; there are: append, "),
        (["fork", "--rounds", "0"], "--rounds 0: at least 1"),
        (["fork", "--rounds", "many"], "invalid int value"),
        (["fork", "--quick"], "fork has no --quick"),
        (["fork", "--markdown", "fork.md"], "fork has no --markdown"),
    ],
)
def test_a_wrong_call(arguments, message):
    result = bench(*arguments)
    assert result.returncode == 2
    assert message in result.stderr


@pytest.mark.timing
def test_a_fork_is_ten_times_as_fast_as_a_cold_copy(tmp_path):
    """With the first read of every page; however the parent was filled."""
    path = tmp_path / "fork.json"
    bench("fork", "--rounds", "9", "--json", str(path))
    bars = json.loads(path.read_text())["bars"]
    if not all(bar["holds"] for bar in bars) and not huge_pages_are_collapsed():
        pytest.skip("without huge pages on a memfd the kernel enters every page for itself")
    assert all(bar["holds"] for bar in bars), bars


def huge_pages_are_collapsed():
    """Whether this kernel backs a memfd by huge pages when asked."""
    with ExtentStore() as store, Window(store, 4 * huge_page_size_bytes()) as window:
        faults_before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        window.commit(0, window.nbytes)
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults_before
        return faults < window.nbytes // mmap.PAGESIZE // 4


@pytest.mark.benchmark
def test_a_report(tmp_path):
    path = tmp_path / "new" / "fork.json"
    result = bench("fork", "--rounds", "1", "--json", str(path))
    assert result.returncode in (0, 1), result.stderr  # a single round proves no bar
    assert "warm copy" in result.stdout
    report = json.loads(path.read_text())
    assert {"date", "cpu", "kernel", "versions"} <= report["machine"].keys()
    assert [bar["limit"] for bar in report["bars"]] == [10, 10, 64]
    assert report["bars"][2]["holds"]
    assert result.returncode == (0 if all(bar["holds"] for bar in report["bars"]) else 1)


@pytest.mark.timing
@pytest.mark.skipif(not shutil.which("valgrind"), reason="valgrind, which counts, is not installed")
@pytest.mark.skipif(not shutil.which("gcc"), reason="no gcc, which compiles the loop")
def test_alloc_and_free_take_the_same_few_instructions_for_every_size(tmp_path):
    path = tmp_path / "instructions.json"
    result = bench("instructions", "--rounds", "5", "--json", str(path))
    assert result.returncode in (0, 1), result.stderr  # a peer that is missing proves no bar
    *sizes, flat = json.loads(path.read_text())
    assert flat["holds"], result.stdout
    for size in sizes:
        assert size["ours"] < size["peers"]["glibc"] / 2, result.stdout
        if platform.machine() == "x86_64":
            assert 50 < size["ours"] < 160, result.stdout
