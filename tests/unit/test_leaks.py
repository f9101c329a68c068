"""PAGEALLOC_LEAKS=N: what is reported at exit, by processes that leak and that do not."""

import os
import re
import subprocess
import sys

import pytest

PROGRAM = """
import os
from pagealloc import PageAllocator

allocator = PageAllocator(backing="base")
kept = []

def leak(n):
    for _ in range(n):
        kept.append(allocator.alloc("64KiB"))

def leak_a_batch():
    kept.append(allocator.alloc_many(4096, 10))

leak(3)
leak_a_batch()
for _ in range(100):
    allocator.alloc(1000)
closed = allocator.alloc("1MiB")
closed.close()
circle = [allocator.exact(192).alloc()]
circle.append(circle)
del circle
{last}
"""


def run(tmp_path, last="", **environment):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(last=last))
    clean = {name: value for name, value in os.environ.items() if name != "PAGEALLOC_LEAKS"}
    return subprocess.run(
        [sys.executable, str(program)],
        env=clean | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_what_is_live_is_told_by_stack(tmp_path):
    done = run(tmp_path, PAGEALLOC_LEAKS="1")
    assert done.returncode == 0
    program = re.escape(str(tmp_path / "program.py"))
    noted = r"of the blocks whose allocation was noted \(one in 1\)"
    assert re.fullmatch(
        rf"""pagealloc: live at exit: 4 {noted}, 232 KiB
  3, 192 KiB, allocated at
    {program}:10 in leak
    {program}:15 in <module>
  1, 40\.0 KiB, allocated at
    {program}:13 in leak_a_batch
    {program}:16 in <module>
""",
        done.stderr,
    ), done.stderr


def test_a_sample(tmp_path):
    done = run(tmp_path, "leak(1000)", PAGEALLOC_LEAKS="10")
    n_noted = int(re.search(r"live at exit: (\d+) of .* \(one in 10\)", done.stderr)[1])
    assert 100 <= n_noted <= 101


def test_a_program_without_leaks_is_told_nothing(tmp_path):
    done = run(tmp_path, "kept.clear()", PAGEALLOC_LEAKS="1")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("environment", [{}, {"PAGEALLOC_LEAKS": "0"}, {"PAGEALLOC_LEAKS": ""}])
def test_nothing_without_it(tmp_path, environment):
    done = run(tmp_path, **environment)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_child_does_not_report_what_is_its_parent_s(tmp_path):
    last = """
pid = os.fork()
if pid == 0:
    mine = allocator.alloc("2MiB")
else:
    os.waitpid(pid, 0)
    kept.clear()
"""
    done = run(tmp_path, last, PAGEALLOC_LEAKS="1")
    assert done.returncode == 0
    assert re.search(r"live at exit: 1 of .* 2\.00 MiB", done.stderr)
    assert done.stderr.count("live at exit") == 1


def test_many_places(tmp_path):
    last = "\n".join("kept.append(allocator.alloc(100))" for _ in range(30))
    done = run(tmp_path, last, PAGEALLOC_LEAKS="1")
    assert done.stderr.endswith("  and at 12 more places\n")


@pytest.mark.parametrize("text", ["yes", "-1", "1.5"])
def test_nonsense(tmp_path, text):
    done = run(tmp_path, PAGEALLOC_LEAKS=text)
    assert done.returncode == 1
    assert f"ValueError: PAGEALLOC_LEAKS='{text}': expected 0, or one allocation in how many" in (
        done.stderr
    )
