"""``pagealloc doctor`` finds what was really planted, and nothing in a run that is well."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pagealloc.cli import info
from pagealloc.cli.main import main
from pagealloc.observe.doctor import RULES, examine, examine_machine, examine_process
from pagealloc.observe.doctor_watch import Watch

HAS_THP = Path("/sys/kernel/mm/transparent_hugepage/enabled").exists()

PRELUDE = """
import ctypes, sys, time
from pagealloc import OutOfMemoryError, PageAllocator, page_size_bytes
from pagealloc.kv import KVCache, KVLayout

def fill(buffer):
    ctypes.memset(ctypes.addressof(ctypes.c_char.from_buffer(memoryview(buffer))), 1, len(buffer))
    return buffer
"""

NO_THP = "ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE\n"

PLANTED = {
    "thp-disabled": NO_THP,
    "huge-pages-not-achieved": NO_THP + "kept = fill(PageAllocator().alloc('16MiB'))\n",
    "budget-pressure": """
allocator = PageAllocator(budget_bytes="64MiB")
kept = [allocator.alloc("1MiB") for _ in range(62)]
try:
    allocator.alloc("8MiB")
except OutOfMemoryError:
    pass
""",
    "fragmentation": """
allocator = PageAllocator()
blocks = [fill(allocator.alloc(1024)) for _ in range(70_000)]  # four in the smallest page
kept = blocks[::4]
del blocks
""",
    "steady-faults": """
allocator = PageAllocator()
for _ in range(200):
    fill(allocator.alloc("8MiB")).close()
    allocator.trim()
""",
    "contention": """
import threading
allocator = PageAllocator(purge_after_s=None)
end_s = time.monotonic() + 1
def fight():
    while time.monotonic() < end_s:
        allocator.alloc_many("8KiB", 30_000).close()  # without the GIL
threads = [threading.Thread(target=fight) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
""",
    "kv-row-straddling": """
layout = KVLayout(n_layers=2, n_kv_heads=1, head_dim=page_size_bytes() // 8 * 3, max_tokens=64)
cache = KVCache(layout)
""",
}

HEALTHY = """
import numpy as np

allocator = PageAllocator()
kept = [fill(allocator.alloc("256KiB")) for _ in range(50)]
for number in range(2000):
    fill(allocator.alloc(64 + 7 * number)).close()
layout = KVLayout(n_layers=30, n_kv_heads=3, head_dim=64, max_tokens=4096)
cache = KVCache(layout, budget_bytes="256MiB")
prompt = cache.sequence()
for _ in range(100):
    prompt.append_token(np.ones((30, 2, 3, 64), np.float16))
forks = [prompt.fork() for _ in range(8)]
for fork in forks:
    fork.append_token(np.ones((30, 2, 3, 64), np.float16))
large = [fill(allocator.alloc("40MiB")) for _ in range(2)]
"""


@pytest.fixture
def examined(tmp_path):
    """Run a script under ``pagealloc doctor``; return the process and the names of what it found.

    A machine on which nothing is found when nothing runs is what the tests are about.
    """

    def run(script, *arguments, **options):
        path = tmp_path / "script.py"
        path.write_text(PRELUDE + script)
        process = run_doctor("--json", str(path), *arguments, **options)
        return process, [each["rule"] for each in json.loads(process.stdout)["findings"]]

    return run


def run_doctor(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "pagealloc", "doctor", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


def needs_a_healthy_machine():
    found = [finding.title for finding in examine_machine()]
    if found:
        pytest.skip(f"this machine has problems of its own: {found}")


# --- ten planted problems ---


IN_TIME = ("contention", "steady-faults")
"""Rules with a bar in time."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.timing] * (name in IN_TIME)) for name in PLANTED],
)
def test_what_a_program_does(examined, name):
    if "prctl" in PLANTED[name] and not HAS_THP:
        pytest.skip("a kernel without transparent huge pages has none to disable")
    process, found = examined(PLANTED[name])
    assert name in found, process.stderr
    related = {"thp-disabled", "huge-pages-not-achieved"} if "prctl" in PLANTED[name] else {name}
    if not examine_machine():
        assert set(found) <= related
        assert process.returncode == (0 if name == "kv-row-straddling" else 1)


def test_huge_pages_of_a_pool_that_is_empty(examined):
    if info.try_backing("hugetlb").achieved:
        pytest.skip("this machine's pool has pages")
    process, found = examined("PageAllocator(backing='hugetlb').alloc('4MiB')\n")
    assert "huge-pages-not-achieved" in found
    assert "BackingUnavailableError" in process.stderr
    (step,) = (
        step
        for finding in json.loads(process.stdout)["findings"]
        for step in finding["fix"]
        if "nr_hugepages" in step
    )
    assert step.startswith("$ sudo sysctl vm.nr_hugepages=")


MACHINES = {
    "thp-disabled": {"sys/kernel/mm/transparent_hugepage/enabled": "always madvise [never]\n"},
    "max-map-count": {"proc/self/maps": "mapping\n" * 90, "proc/sys/vm/max_map_count": "100\n"},
    "cgroup-limit": {
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/memory.max": f"{100 << 20}\n",
        "sys/fs/cgroup/memory.current": f"{95 << 20}\n",
    },
}


def build(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize("name", MACHINES)
def test_what_a_machine_is(tmp_path, name):
    build(tmp_path, MACHINES[name])
    assert [finding.rule for finding in examine_process(0.01, root=tmp_path)] == [name]


def test_numa_misses_while_a_process_is_watched(tmp_path):
    stat = "sys/devices/system/node/node0/numastat"
    build(tmp_path, {stat: "numa_hit 1000\nnuma_miss 0\nother_node 0\n"})
    with Watch(tmp_path) as watch:
        build(tmp_path, {stat: "numa_hit 9000\nnuma_miss 4000\nother_node 4000\n"})
    (finding,) = examine(watch.evidence())
    assert finding.rule == "numa-misses"
    assert "4,000 of 12,000 pages (33%)" in finding.figure


def test_all_ten_are_planted_here():
    assert {*PLANTED, *MACHINES, "numa-misses"} == set(RULES)


# --- what is well ---


@pytest.mark.parametrize("attempt", range(2))
def test_a_healthy_run(examined, attempt):
    needs_a_healthy_machine()
    process, found = examined(HEALTHY)
    assert found == [], process.stdout
    assert process.returncode == 0
    assert process.stderr == ""


def test_bursts_that_use_their_memory_again(examined):
    """At most looks nothing is live, and much is held: it will be used in a moment."""
    needs_a_healthy_machine()
    _, found = examined("""
allocator = PageAllocator()
kept = fill(allocator.alloc(64))
for _ in range(5):
    blocks = [fill(allocator.alloc("1MiB")) for _ in range(48)]
    del blocks
    time.sleep(0.25)
""")
    assert found == []


def test_the_machine_alone(capsys):
    code = main(["doctor"])
    out, err = capsys.readouterr()
    assert err == ""
    assert (out == "nothing found\n") == (not examine_machine())
    assert code in (0, 1)
    main(["doctor", "--json"])
    assert set(json.loads(capsys.readouterr().out)) == {"healthy", "findings"}


# --- a script runs as without ---


def test_a_script_has_its_arguments_its_folder_and_its_name(examined, tmp_path):
    (tmp_path / "beside.py").write_text("")
    environment = {**os.environ, "PYTHONSAFEPATH": ""}
    process, _ = examined(
        "import beside\nprint(__name__, __file__, sys.argv[1:])\n",
        "--json",
        "-x",
        cwd=tmp_path.parent,
        env=environment,
    )
    # with --json, what the script prints goes to stderr
    assert process.stderr == f"__main__ {tmp_path / 'script.py'} ['--json', '-x']\n"


@pytest.mark.parametrize(
    ("end", "code", "message"),
    [
        ("sys.exit(7)", 7, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit('a reason')", 1, "a reason\n"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGINT)", 130, "interrupted\n"),
    ],
)
def test_the_exit_code_is_the_scripts(examined, end, code, message):
    needs_a_healthy_machine()
    process, found = examined(end)
    assert (process.returncode, process.stderr, found) == (code, message, [])


def test_a_script_that_fails_is_examined_too(examined):
    process, found = examined(PLANTED["budget-pressure"] + "raise ValueError('its own')\n")
    assert "budget-pressure" in found
    assert process.returncode == 1
    lines = process.stderr.splitlines()
    assert lines[-1] == "ValueError: its own"
    assert len([line for line in lines if line.startswith("  File ")]) == 1  # none of ours


def test_threads_of_the_script_are_waited_for(examined):
    process, _ = examined(
        "import threading\n"
        "threading.Thread(target=lambda: (time.sleep(0.2), print('done'))).start()\n"
    )
    assert process.stderr == "done\n"


def test_a_forked_child_reports_nothing(examined):
    # From 3.12 on Python warns of any fork beside threads, of which the doctor has one.
    quiet = "import os, warnings\nwarnings.simplefilter('ignore')\n"
    work = "if os.fork() == 0: sys.exit(3)\nprint(os.wait()[1] >> 8)\n"
    process, _ = examined(quiet + work)
    assert process.stderr == "3\n"


def test_without_json_the_report_follows_the_scripts_output(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(PRELUDE + PLANTED["kv-row-straddling"] + "print('its output')\n")
    process = run_doctor(str(path))
    assert process.stdout.startswith("its output\n")
    assert "[kv-row-straddling]" in process.stdout
    assert "\x1b" not in process.stdout


def test_no_such_script(capsys):
    assert main(["doctor", "no-such.py"]) == 1
    assert capsys.readouterr() == ("", "pagealloc: there is no script 'no-such.py'\n")


def test_no_such_module(capsys):
    assert main(["doctor", "--json", "-m", "nothere"]) == 1
    said = "pagealloc: cannot run 'nothere': No module named nothere\n"
    assert capsys.readouterr() == ("", said)


def test_a_script_that_is_ended_by_sigterm_is_examined_too(examined):
    process, found = examined(
        PLANTED["budget-pressure"]
        + "import os, signal, threading\n"
        + "threading.Thread(target=time.sleep, args=(60,)).start()\n"  # nobody waits for it
        + "os.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(60)\n"
    )
    assert process.returncode == -15, process.stderr
    assert "budget-pressure" in found


def test_a_module(tmp_path):
    (tmp_path / "planted.py").write_text("import sys\nprint(sys.argv[1:])\n")
    environment = {**os.environ, "PYTHONSAFEPATH": ""}
    process = run_doctor("-m", "planted", "--json", cwd=tmp_path, env=environment)
    assert process.stdout.startswith("['--json']\n")


# --- a process that runs ---


def test_another_process(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        PRELUDE
        + "from pagealloc.observe import start_feed\n"
        + "start_feed()\n"
        + PLANTED["budget-pressure"]
        + "print('ready', flush=True)\nsys.stdin.read()\n"
    )
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, str(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        assert process.stdout.readline() == "ready\n"
        arguments = ("--pid", str(process.pid), "--seconds", "0.1")
        doctor = run_doctor("--json", *arguments, env=environment)
    found = [each["rule"] for each in json.loads(doctor.stdout)["findings"]]
    assert "budget-pressure" in found
    assert doctor.returncode == 1
    gone = run_doctor(*arguments, env=environment)
    assert gone.returncode == 1
    assert f"process {process.pid} " in gone.stderr


@pytest.mark.parametrize(
    ("arguments", "what_to_do"),
    [
        (["--pid", "1", "x.py"], "leave -m and the script out"),
        (["--pid", "1", "-m"], "leave -m and the script out"),
        (["--pid", "1", "--seconds", "0"], "above 0"),
        (["--seconds", "1"], "leave it out without --pid"),
        (["--seconds", "1", "x.py"], "leave it out without --pid"),
        (["-m"], "which module?"),
    ],
)
def test_what_makes_no_sense(capsys, arguments, what_to_do):
    assert main(["doctor", *arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, err[:11]) == ("", "pagealloc: ")
    assert what_to_do in err
