"""``pagealloc top`` and ``pagealloc serve``: what they show, and how they end."""

import importlib.util
import io
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace
from fcntl import ioctl
from termios import TIOCSWINSZ

import pytest
from snapshots import allocator_of, busy_process, histogram_of, snapshot_of

from pagealloc import ArenaStats, ClassStats
from pagealloc.cli import top
from pagealloc.cli.main import main
from pagealloc.observe import start_feed
from pagealloc.observe.live import History
from pagealloc.observe.snapshot_json import snapshot_from_json

FEED_AND_WAIT = (
    "import sys; from pagealloc import PageAllocator; from pagealloc.observe import start_feed\n"
    "with start_feed(), PageAllocator(time_every=1) as a, a.alloc(12345) as b:\n"
    "    print('ready', flush=True); sys.stdin.read()"
)
COMMAND = [sys.executable, "-m", "pagealloc"]

pytest.importorskip("rich")
from pagealloc.cli import top_view  # noqa: E402


@pytest.fixture(autouse=True)
def runtime(tmp_path, monkeypatch):
    """A runtime folder of this test alone."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def fed():
    """Another process that has a feed; what it reads on stdin ends it."""
    with subprocess.Popen(
        [sys.executable, "-c", FEED_AND_WAIT], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"ready\n"
        yield process
        process.stdin.close()


def drawn(history, width, n_rows=10):
    from rich.console import Console

    output = io.StringIO()
    Console(file=output, width=width, highlight=False).print(
        top_view.view_of(history, width, n_rows)
    )
    return output.getvalue()


def history_of(*snapshots):
    history = History()
    for snapshot in snapshots:
        history.add(snapshot)
    return history


# --- what is shown ---


@pytest.mark.parametrize("width", [80, 100, 120, 200])
def test_every_width(width):
    with busy_process() as snapshot:
        later = replace(
            snapshot, time_s=snapshot.time_s + 2, n_minor_faults=snapshot.n_minor_faults + 84
        )
        text = drawn(history_of(snapshot, later), width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in text
    assert "42/s" in text
    for word in ("allocator", "base → base", "KV cache", "1.00 MiB", "64 B", "saved by sharing"):
        assert word in text
    assert re.search(r"\d+ sequences", text)


def test_a_process_without_anything():
    text = drawn(history_of(snapshot_of()), 80)
    assert "no allocator is open" in text
    assert "latency" not in text
    assert "no reading yet" in drawn(History(), 80)


def test_what_is_too_much_is_counted():
    arena = ArenaStats(1 << 40, "hugetlb", "base", 64 << 20, 0, 0, None, None, dedicated=False)
    stats = allocator_of(
        arenas=tuple(replace(arena, address=i << 26, held_bytes=i) for i in range(1, 21)),
        classes=tuple(ClassStats(64 * i, i, 0, 1, 0) for i in range(1, 21)),
        latencies=[histogram_of([20] * (i + 1), f"{64 * (i + 1)} B") for i in range(20)],
    )
    text = drawn(history_of(snapshot_of(stats)), 100, n_rows=4)
    assert text.count("16 more") == 3  # arenas, classes, sizes
    assert "0x50000000" in text  # the arena that holds most
    assert "0x4000000 " not in text


@pytest.mark.parametrize("height", [30, 40, 60])
def test_tables_are_as_long_as_the_terminal_allows(height):
    from rich.console import Console

    latencies = [histogram_of([20] * i, f"{64 * i} B") for i in range(1, 21)]
    history = history_of(snapshot_of(allocator_of(latencies=latencies)))
    console = Console(file=io.StringIO(), width=100, height=height)
    console.print(top_view.fitting_view(history, console))
    lines = console.file.getvalue().splitlines()
    assert len(lines) <= height
    assert any("all" in line.split() for line in lines)
    assert len(lines) > height - 2 or len(lines) > top_view.MOST_ROWS + 15


@pytest.mark.parametrize(
    ("values", "is_log", "expected"),
    [
        ([], False, ""),
        ([0, 0], False, "▁▁"),
        ([0, 4, 8], False, "▁▅█"),
        ([None, 8], False, " █"),
        ([5, None, 5], True, "█ █"),
        ([1, 128], True, "▁█"),
        ([1000, 500], True, "█▇"),
        ([1, 1 << 40, 0], True, "▁█▁"),
    ],
)
def test_sparklines(values, is_log, expected):
    assert top_view.sparkline(values, is_log=is_log) == expected


@pytest.mark.parametrize(
    ("duration_ns", "expected"),
    [
        (None, "-"),
        (0.0, "0 ns"),
        (43.21, "43.2 ns"),
        (999.4, "999 ns"),
        (999.9, "1 µs"),
        (1234, "1.23 µs"),
        (5e6, "5 ms"),
        (1e11, "100 s"),
    ],
)
def test_durations(duration_ns, expected):
    assert top_view.format_duration(duration_ns) == expected


# --- without a terminal ---


def test_once(fed, capsys):
    assert main(["top", str(fed.pid), "--once", "--interval", "0.1"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert f"process {fed.pid}" in out
    assert re.search(r"1\d\.\d KiB", out), "the block of 12,345 bytes, rounded as pages want it"
    assert "\x1b" not in out


def test_the_only_process_needs_no_name(fed, capsys):
    assert main(["top", "--once", "--json"]) == 0
    snapshot = snapshot_from_json(capsys.readouterr().out)
    assert snapshot.pid == fed.pid
    assert snapshot.allocators[0].stats.n_live == 1


def test_json_lines_until_it_ends(fed):
    command = [*COMMAND, "top", "--json", "--interval", "0.1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        first, second = process.stdout.readline(), process.stdout.readline()
        assert snapshot_from_json(first).time_s < snapshot_from_json(second).time_s
        fed.stdin.close()
        process.stdout.read()
    assert process.returncode == 0


def test_two_processes_are_listed(fed, capsys):
    with start_feed():
        assert main(["top", "--once"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("pagealloc: 2 processes have a feed, say which one: ")
    assert len(err.splitlines()) == 1
    for pid in (fed.pid, os.getpid()):
        assert re.search(rf"\b{pid} \(.*python", err)


@pytest.mark.parametrize("arguments", [["top"], ["top", "7", "--once"], ["serve"], ["serve", "7"]])
def test_no_feed_says_how_to_have_one(capsys, arguments):
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert "python -m pagealloc.observe SCRIPT" in err


@pytest.mark.parametrize("arguments", [["top", "x", "--once"], ["serve", "x"]])
def test_neither_pid_nor_url(capsys, arguments):
    assert main(arguments) == 2
    assert "neither a process id nor" in capsys.readouterr().err


def test_no_terminal(fed, capsys):
    assert main(["top", str(fed.pid)]) == 1
    assert "--once prints one view" in capsys.readouterr().err


def test_without_rich(fed, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert main(["top", "--once"]) == 1
    assert "pip install 'pagealloc[cli]'" in capsys.readouterr().err
    assert main(["top", "--once", "--json"]) == 0


@pytest.mark.parametrize("option", ["--interval=0", "--interval=x", "--interval=nan"])
def test_intervals_that_are_none(option):
    with pytest.raises(SystemExit) as stop:
        main(["top", option])
    assert stop.value.code == 2


# --- in a terminal ---


class Terminal:
    """A terminal of some columns in which `pagealloc top` runs."""

    def __init__(self, *arguments, columns=100):
        here, there = pty.openpty()
        ioctl(here, TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
        self.process = subprocess.Popen(
            [*COMMAND, "top", "--interval", "0.1", *arguments],
            stdin=there,
            stdout=there,
            stderr=there,
            start_new_session=True,
            env=os.environ | {"TERM": "xterm-256color"},
        )
        os.close(there)
        self._fd = here
        self.text = ""

    def wait_for(self, pattern, timeout_s=30.0):
        end_s = time.monotonic() + timeout_s
        while not re.search(pattern, self.text):
            assert time.monotonic() < end_s, self.text[-3000:]
            self.read()

    def read(self):
        """Read what is there, or return whether the other side ended."""
        if not select.select([self._fd], [], [], 0.05)[0]:
            return False
        try:
            self.text += os.read(self._fd, 65536).decode(errors="replace")
        except OSError:  # EIO: nobody has the other side
            return True
        return False

    def type(self, keys):
        os.write(self._fd, keys)

    def end(self):
        """Wait for the end; return its exit code and all that was shown."""
        while not self.read():
            pass
        os.close(self._fd)
        return self.process.wait(timeout=30), self.text


SHOW, LEAVE = "\x1b[?1049h", "\x1b[?1049l"  # the alternate screen


@pytest.mark.parametrize("key", ["q", "Ctrl-C"])
def test_a_key_ends_it(fed, key):
    terminal = Terminal(str(fed.pid))
    terminal.wait_for("allocator 1")
    terminal.type(b"x")
    if key == "q":
        terminal.type(b"q")
    else:
        terminal.process.send_signal(signal.SIGINT)
    code, text = terminal.end()
    assert code == 0
    assert text.count(SHOW) == text.count(LEAVE) == 1
    assert "Traceback" not in text
    assert fed.poll() is None


def test_the_last_view_stays_when_the_process_ends(fed):
    terminal = Terminal()
    terminal.wait_for("allocator 1[\\s\\S]*allocator 1")
    fed.stdin.close()
    code, text = terminal.end()
    assert code == 0
    rest = text[text.index(LEAVE) :]
    assert f"process {fed.pid} ended" in rest
    assert "allocator 1" in rest


def test_a_stopped_process_is_waited_for():
    answers = [TimeoutError("it may be stopped"), snapshot_of(), ConnectionResetError("gone")]

    def read():
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    notes, history = [], History()
    ending = top._follow(read, history, 0.0, lambda *_: False, notes.append)
    assert notes == ["it may be stopped", ""]
    assert len(history.points) == 1
    assert str(ending) == "gone"


# --- serve ---


def test_serve_and_top_of_its_url(fed, capsys):
    command = [*COMMAND, "serve", str(fed.pid)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        url = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())[0]
        with urllib.request.urlopen(url + "/live.json") as answer:
            assert json.load(answer)["pid"] == fed.pid
        assert main(["top", url, "--once", "--json"]) == 0
        assert snapshot_from_json(capsys.readouterr().out).pid == fed.pid
        process.send_signal(signal.SIGINT)
    assert process.returncode == 0
    assert main(["top", url, "--once"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("port", ["-1", "65536", "x"])
def test_ports_that_are_none(port):
    with pytest.raises(SystemExit) as stop:
        main(["serve", f"--port={port}"])
    assert stop.value.code == 2
