"""``pagealloc profile``: files, the hottest lines, differences, errors."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pagealloc.cli.main import main
from pagealloc.observe.pprof import from_pprof

SCRIPT = """
import sys
import pagealloc

allocator = pagealloc.PageAllocator()

def hot(n):
    return [allocator.alloc("1MiB") for _ in range(n)]

def cold():
    return [allocator.alloc("1MiB") for _ in range(2)]

kept = hot(int(sys.argv[1]))
cold()
print("done")
sys.exit(int(sys.argv[2]))
"""


@pytest.fixture
def script(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "planted.py"
    path.write_text(SCRIPT)
    return str(path)


def lines_with(text: str, word: str) -> list[str]:
    return [line for line in text.splitlines() if word in line]


def test_all_kinds(script, tmp_path, capfd):
    assert main(["profile", "--period", "1", "-o", "out", script, "20", "3"]) == 3
    said = capfd.readouterr()
    assert said.out == "done\n"
    assert "  22.0 MiB allocated" in said.err
    assert "  20.0 MiB live at the end" in said.err
    first = lines_with(said.err, "MiB  hot")
    assert [line.split()[:2] for line in first] == [["20.0", "MiB"], ["20.0", "MiB"]]
    assert "planted.py:8" in first[0]
    assert str(tmp_path) not in first[0], "as short as it is clear"
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {
        f"{kind}{suffix}"
        for kind in ("heap", "cpu", "contention")
        for suffix in (".pb.gz", ".html", ".folded")
    }
    heap = from_pprof((tmp_path / "out/heap.pb.gz").read_bytes())
    outermost = {stack[-1].function for stack in heap.samples}
    assert outermost == {"planted (module)"}, "whoever ran it is not in the way"


def test_one_kind(script, tmp_path, capfd):
    assert main(["profile", "--heap", "--period", "1", "-o", "out", script, "1", "0"]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "heap.pb.gz",
        "heap.html",
        "heap.folded",
    }
    assert "CPU" not in capfd.readouterr().err


def test_difference(script, capfd):
    for name, n in (("a", "20"), ("b", "5")):
        main(["profile", "--heap", "--period", "1", "-o", name, script, n, "0"])
    capfd.readouterr()
    assert main(["profile", "-o", "c", "--diff", "a/heap.pb.gz", "b/heap.pb.gz"]) == 0
    said = capfd.readouterr().err
    assert "-15.0 MiB live at the end" in said
    assert lines_with(said, "-15.0 MiB  hot")
    page = Path("c/diff.html").read_text()
    data = json.loads(page.split('type="application/json">')[1].split("</script>")[0])
    assert data["isDifference"] is True


def test_differences_of_what_is_no_profile(tmp_path, capfd):
    path = tmp_path / "a.pb.gz"
    path.write_bytes(b"nonsense")
    assert main(["profile", "--diff", str(path), str(path)]) == 1
    assert f"{path}: " in capfd.readouterr().err
    assert main(["profile", "--diff", str(tmp_path / "none"), str(path)]) == 1
    assert "No such file" in capfd.readouterr().err


def test_usage(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert main(["profile"]) == 2
    assert "which script?" in capfd.readouterr().err
    assert main(["profile", "none.py"]) == 1
    assert "there is no script 'none.py'" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []
    for _ in range(2):  # the server of the first is not left running
        assert main(["profile", "--serve", "0", "none.py"]) == 1
    (tmp_path / "empty.py").touch()
    assert main(["profile", "--period", "much", "empty.py"]) == 2
    assert "period" in capfd.readouterr().err


@pytest.mark.parametrize("option", ["--heap", "--cpu", "--contention", "-oout"])
def test_what_a_server_would_ignore_is_refused(script, capfd, option):
    assert main(["profile", "--serve", "0", option, script, "1", "0"]) == 2
    said = capfd.readouterr()
    assert said.err.startswith("pagealloc: --serve profiles on demand: leave ")
    assert said.out == "", "it did not run"


@pytest.mark.parametrize(
    "option",
    ["--heap", "--cpu", "--contention", "--serve=0", "-m", "--period=512KiB", "planted.py"],
)
def test_what_a_difference_would_ignore_is_refused(script, tmp_path, capfd, option):
    main(["profile", "--heap", "-o", "a", script, "1", "0"])
    capfd.readouterr()
    assert main(["profile", "--diff", "a/heap.pb.gz", "a/heap.pb.gz", "-o", "out", option]) == 2
    said = capfd.readouterr()
    assert said.err.startswith("pagealloc: --diff compares two profiles and runs nothing: leave ")
    assert said.out == ""
    assert not (tmp_path / "out").exists()


def test_a_module_that_is_none(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert main(["profile", "-o", "out", "-m", "nothere"]) == 1
    said = capfd.readouterr().err
    assert said == "pagealloc: cannot run 'nothere': No module named nothere\n"
    assert list(tmp_path.iterdir()) == [], "nothing is made for nothing"


@pytest.mark.parametrize("port", ["-1", "65536", "x"])
def test_ports_that_are_none(port):
    with pytest.raises(SystemExit) as stop:
        main(["profile", f"--serve={port}", "empty.py"])
    assert stop.value.code == 2


@pytest.mark.parametrize("folder", ["planted.py", "planted.py/out"])
def test_a_folder_that_is_none_is_said_before_the_script_runs(script, capfd, folder):
    assert main(["profile", "--heap", "-o", folder, script, "1", "0"]) == 1
    told = capfd.readouterr()
    assert f"cannot write to {folder}: " in told.err
    assert "done" not in told.out


def test_a_script_that_goes_elsewhere(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "goes.py").write_text("import os; os.chdir('elsewhere')\n")
    assert main(["profile", "--heap", "-o", "new/out", "goes.py"]) == 0
    assert (tmp_path / "new/out/heap.pb.gz").exists()
    assert f"go tool pprof {tmp_path}/new/out/heap.pb.gz" in capfd.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_to_is_said_before_the_script_runs(script, capfd):
    Path("out").mkdir(mode=0o500)
    assert main(["profile", "--heap", "-o", "out", script, "1", "0"]) == 1
    told = capfd.readouterr()
    assert "cannot write to out: " in told.err
    assert "done" not in told.out


def test_a_script_that_fails_is_profiled_all_the_same(script, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "pagealloc", "profile", "--heap", "-o", "out", script, "nonsense"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 1
    assert "ValueError: invalid literal" in done.stderr
    assert (tmp_path / "out/heap.pb.gz").exists()


@pytest.mark.parametrize("options", [[], ["--heap", "--period", "1"]])
def test_a_service_that_is_ended_by_sigterm_is_profiled_all_the_same(tmp_path, options):
    (tmp_path / "service.py").write_text(
        "import pagealloc, time\n"
        "kept = pagealloc.default_allocator().alloc('64MiB')\n"
        "print('ready', flush=True)\n"
        "while True: time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-m", "pagealloc", "profile", *options, "-o", "out", "service.py"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.terminate()
        _, said = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGTERM
    assert "64.0 MiB live at the end" in said
    assert len(list((tmp_path / "out").iterdir())) == (3 if options else 9)
    heap = from_pprof((tmp_path / "out/heap.pb.gz").read_bytes())
    assert heap.total(3) == pytest.approx(64 << 20, rel=0.01)
