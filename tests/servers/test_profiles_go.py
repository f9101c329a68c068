"""What ``pagealloc profile`` writes, as ``go tool pprof`` shows it: the planted hot spot first.

The script knows what it allocates and how its time is spent; pprof's lines must say so.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from programs import program

MIB = 1 << 20
HOT_MIB, COLD_MIB = 900, 100

HEAP_SCRIPT = f"""
import pagealloc
allocator = pagealloc.PageAllocator()

def planted_hot():
    return [allocator.alloc(150_000) for _ in range({HOT_MIB * MIB} // 150_000)]

def planted_cold():
    return [allocator.alloc("1MiB") for _ in range({COLD_MIB})]

def planted_dropped():
    for _ in range(2000):
        allocator.alloc("1MiB").close()

kept = planted_hot(), planted_cold()
planted_dropped()
"""

CPU_SCRIPT = """
import time

def planted_hot():
    end = time.thread_time() + 2
    while time.thread_time() < end:
        sum([1, 2, 3])

def planted_cold():
    end = time.thread_time() + 0.3
    while time.thread_time() < end:
        sum([1, 2, 3])

planted_cold(); planted_hot()
"""

CONTENTION_SCRIPT = """
import threading, time
import pagealloc
allocator = pagealloc.PageAllocator()
stop = threading.Event()

def planted_hot():
    while not stop.is_set():
        allocator.alloc_many("8KiB", 3000).close()

def planted_cold():
    while not stop.wait(0.001):
        allocator.alloc_many("8KiB", 3).close()

threads = [threading.Thread(target=f) for f in (planted_hot, planted_hot, planted_hot, planted_cold)]
for thread in threads:
    thread.start()
time.sleep(3)
stop.set()
for thread in threads:
    thread.join()
"""


@pytest.fixture
def run_profile(tmp_path):
    def run(script: str, *options: str) -> Path:
        path = tmp_path / "script.py"
        path.write_text(script)
        command = (sys.executable, "-m", "pagealloc", "profile", *options, "-o", tmp_path, path)
        subprocess.run(command, check=True, cwd=tmp_path)
        return tmp_path

    return run


def pprof(*arguments: object) -> str:
    command = (program("go"), "tool", "pprof", *map(str, arguments))
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def top(*arguments: object) -> dict[str, tuple[float, float]]:
    """Return what -top lists, in its order: flat and cumulative value of each function."""
    lines = pprof("-top", *arguments).partition("cum%\n")[2].splitlines()
    rows = (re.fullmatch(r"\s*(\S+)\s+\S+\s+\S+\s+(\S+)\s+\S+\s+(.*)", line) for line in lines)
    return {row[3]: (number(row[1]), number(row[2])) for row in rows if row}


def number(text: str) -> float:
    """Return bytes, or seconds, of what pprof has written with a unit."""
    units = {"": 1.0, "B": 1, "kB": 1024, "MB": MIB, "GB": MIB * 1024}
    units |= {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0, "mins": 60}
    match = re.fullmatch(r"(-?[\d.]+)([A-Za-z]*)", text)
    assert match, text
    return float(match[1]) * units[match[2]]


def own_of(rows: dict[str, tuple[float, float]], function: str) -> float:
    """Return the cumulative value of a function."""
    return next(cum for name, (_, cum) in rows.items() if name == function)


def test_heap(run_profile):
    folder = run_profile(HEAP_SCRIPT, "--heap")
    live = top(folder / "heap.pb.gz")
    assert own_of(live, "planted_hot") == pytest.approx(HOT_MIB * MIB, rel=0.1)
    assert next(iter(live)).startswith("planted_hot")
    assert "planted_dropped" not in live
    assert own_of(live, "planted_cold") == pytest.approx(COLD_MIB * MIB, rel=0.4), "100 samples"
    allocated = top("-sample_index=alloc_space", folder / "heap.pb.gz")
    assert own_of(allocated, "planted_dropped") == pytest.approx(2000 * MIB, rel=0.1)
    traces = pprof("-traces", folder / "heap.pb.gz")
    assert re.search(r"planted_hot.*\n(.*\n)*?\s+script \(module\)", traces)


def test_cpu(run_profile):
    folder = run_profile(CPU_SCRIPT, "--cpu")
    rows = top(folder / "cpu.pb.gz")
    assert next(iter(rows)) == "planted_hot"
    assert own_of(rows, "planted_hot") == pytest.approx(2, rel=0.1)


def test_contention(run_profile):
    folder = run_profile(CONTENTION_SCRIPT, "--contention")
    rows = top(folder / "contention.pb.gz")
    assert next(iter(rows)) == "planted_hot"
    flat = [values[0] for values in rows.values()]
    assert flat[0] > 0.8 * sum(flat)


def test_live_by_http(tmp_path):
    """As Go's own services: pprof fetches the profile itself."""
    script = tmp_path / "script.py"
    script.write_text(HEAP_SCRIPT + "\nprint('ready', flush=True)\ninput()\n")
    command = (sys.executable, "-m", "pagealloc", "profile", "--serve", "0", script)
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        try:
            url = child.stderr.readline().split()[-1]
            assert child.stdout.readline() == "ready\n"
            rows = top(url.replace("/pprof/?", "/pprof/heap?"))
            assert own_of(rows, "planted_hot") == pytest.approx(HOT_MIB * MIB, rel=0.1)
        finally:
            child.communicate("\n", timeout=60)
    assert child.returncode == 0
