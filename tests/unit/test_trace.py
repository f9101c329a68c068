"""PAGEALLOC_TRACE=1: what is said on stderr, and that nothing is without it."""

import os
import re
import subprocess
import sys

import pytest

PROGRAM = """
import time
from pagealloc import PageAllocator

allocator = PageAllocator(backing="base", arena_bytes="8MiB", purge_after_s=0.05)
blocks = [allocator.alloc("64KiB", prefault=True) for _ in range(64)]
del blocks
end_s = time.monotonic() + 20
while allocator.stats().purged_bytes < 1 << 20 and time.monotonic() < end_s:
    time.sleep(0.01)
blocks = [allocator.alloc("64KiB", prefault=True) for _ in range(16)]
del blocks
trimmed_bytes = allocator.trim()
assert trimmed_bytes >= 1 << 20
"""
WHO_WHEN = r"pagealloc: heap 1 @\d+\.\d{3}s: "
MIB = r"\d+\.\d\d MiB"


def stderr_of(**environment):
    clean = {name: value for name, value in os.environ.items() if name != "PAGEALLOC_TRACE"}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=clean | environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert run.stdout == ""
    return run.stderr.splitlines()


def test_a_line_each():
    lines = stderr_of(PAGEALLOC_TRACE="1")
    assert re.fullmatch(WHO_WHEN + r"arena of 8\.00 MiB, base; 8\.00 MiB reserved", lines[0]), lines
    kinds = {
        "arena": rf"arena of {MIB}, base; {MIB} reserved",
        "collection": rf"collection in \d+\.\d{{3}} ms; \d+\.\d\d -> {MIB} idle",
        "purge": rf"purge of {MIB} in \d+\.\d{{3}} ms; {MIB} committed of {MIB}",
        "trim": rf"trim of {MIB} in \d+\.\d{{3}} ms; {MIB} committed of {MIB}",
    }
    found = set()
    for line in lines:
        fitting = [kind for kind, text in kinds.items() if re.fullmatch(WHO_WHEN + text, line)]
        assert len(fitting) == 1, line
        found.update(fitting)
    assert found == set(kinds)
    last = re.search(r"trim of (\S+) MiB", lines[-1])
    assert float(last[1]) >= 1


@pytest.mark.parametrize("environment", [{}, {"PAGEALLOC_TRACE": "0"}, {"PAGEALLOC_TRACE": ""}])
def test_nothing_without_it(environment):
    assert stderr_of(**environment) == []


def test_a_closed_stderr_is_no_reason_to_fail():
    run = subprocess.run(
        [sys.executable, "-c", "import os; os.close(2)\n" + PROGRAM],
        env=os.environ | {"PAGEALLOC_TRACE": "1"},
        check=False,
        timeout=60,
    )
    assert run.returncode == 0
