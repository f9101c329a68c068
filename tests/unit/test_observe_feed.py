"""Feeds: who may read one, what is read, and what is left of it."""

import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from processes import in_child
from snapshots import busy_process, snapshot_of

from pagealloc.kv import user_socket
from pagealloc.kv.user_socket import short_path
from pagealloc.observe import feed, feed_reader, start_feed
from pagealloc.observe.feed_reader import find_feeds, read_feed, source_of
from pagealloc.observe.snapshot_json import snapshot_to_json


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Where feeds are, of this test alone."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(feed.tempfile, "gettempdir", lambda: str(tmp_path / "nowhere"))
    return tmp_path / "pagealloc"


def connect(path):
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(10)
    with short_path(path) as (_, short):
        connection.connect(short)
    return connection


def listener_at(path):
    """A socket at a path, where somebody else than a feed may answer."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with short_path(path) as (_, short):
        listener.bind(short)
    listener.listen()
    return listener


def test_a_process_is_read(folder):
    with busy_process(), start_feed() as here:
        assert here.path == folder / f"{os.getpid()}.sock"
        snapshot = read_feed(os.getpid())
        assert snapshot.pid == os.getpid()
        assert snapshot.allocators
        assert snapshot.caches
        assert read_feed(os.getpid()).time_s > snapshot.time_s
        assert find_feeds() == [os.getpid()]
    assert here.closed
    assert not here.path.exists()
    here.close()


def test_only_the_user_gets_to_it(folder):
    with start_feed() as here:
        assert stat.S_IMODE(here.path.stat().st_mode) == 0o600
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_another_user_gets_nothing(monkeypatch):
    def refuse(connection):
        raise PermissionError("another user")

    with start_feed() as here:
        monkeypatch.setattr(feed.user_socket, "check_peer", refuse)
        with connect(here.path) as connection:
            assert connection.recv(1) == b""
        monkeypatch.undo()
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(here.path.parent.parent))
        assert read_feed(os.getpid()).pid == os.getpid()


@pytest.mark.parametrize("uid", [0, 12345])
def test_the_kernel_says_who_the_other_is(monkeypatch, uid):
    here, there = socket.socketpair()
    with here, there:
        user_socket.check_peer(here)
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1 + uid)
        with pytest.raises(PermissionError, match="runs as user"):
            user_socket.check_peer(here)


def test_a_reader_that_does_not_read_is_gone_after_a_while(monkeypatch):
    monkeypatch.setattr(feed, "TIMEOUT_S", 0.05)
    monkeypatch.setattr(feed, "snapshot_to_json", lambda _: "x" * (1 << 24))
    with start_feed() as here, connect(here.path) as idle:
        assert idle.recv(1) == b"x"  # the rest is more than its buffer holds
        monkeypatch.setattr(feed, "snapshot_to_json", snapshot_to_json)
        assert read_feed(os.getpid()).pid == os.getpid()


def test_an_error_of_one_answer_is_not_the_end(monkeypatch, capsys):
    def fail(_):
        raise ZeroDivisionError("one")

    with start_feed() as here:
        monkeypatch.setattr(feed, "snapshot_to_json", fail)
        with connect(here.path) as connection:
            assert connection.recv(1) == b""
        monkeypatch.setattr(feed, "snapshot_to_json", snapshot_to_json)
        assert read_feed(os.getpid()).pid == os.getpid()
    assert "ZeroDivisionError: one" in capsys.readouterr().err


def test_one_feed_a_process():
    with start_feed() as here:
        assert start_feed() is here
        threads = [thread.name for thread in threading.enumerate()]
        assert threads.count("pagealloc-feed") == 1
    with start_feed() as another:
        assert another is not here


def test_readers_at_the_same_time():
    found = []

    def read():
        found.extend(read_feed(os.getpid()) for _ in range(10))

    with start_feed():
        threads = [threading.Thread(target=read) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 40


# --- forks and ends ---


def test_a_child_does_not_answer_for_its_parent(folder):
    def child():
        with pytest.raises(FileNotFoundError, match="has no feed"):
            read_feed(os.getpid())
        with start_feed() as own:
            assert own.path.name == f"{os.getpid()}.sock"
            assert read_feed(os.getpid()).pid == os.getpid()
            assert len(find_feeds()) == 2

    with start_feed() as here:
        in_child(child)
        in_child(here.close)
        assert read_feed(os.getpid()).pid == os.getpid()


def test_a_child_does_not_keep_the_socket_open():
    def child(here):
        assert here.closed
        assert here._listener.fileno() == -1

    with start_feed() as here:
        in_child(child, here)
        assert here._listener.fileno() >= 0


def run_script(code, *arguments):
    return subprocess.Popen(
        [sys.executable, *arguments, "-c", code] if code else [sys.executable, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


FEED_AND_WAIT = (
    "import sys; from pagealloc.observe import start_feed;"
    "print(start_feed().path, flush=True); sys.stdin.read()"
)


def test_the_socket_goes_with_the_process(folder):
    with run_script(FEED_AND_WAIT) as process:
        path = Path(process.stdout.readline().strip())
        assert read_feed(process.pid).pid == process.pid
        process.stdin.close()
    assert process.returncode == 0
    assert not path.exists()


def test_what_a_killed_process_leaves_is_removed(folder):
    with run_script(FEED_AND_WAIT) as process:
        path = Path(process.stdout.readline().strip())
        process.send_signal(signal.SIGKILL)
    assert path.exists()
    with pytest.raises(ConnectionRefusedError, match="is gone"):
        read_feed(process.pid)
    assert find_feeds() == []
    other = folder / "notes.txt"
    other.write_text("not ours")
    with start_feed():
        assert not path.exists()
        assert other.exists()


def test_a_script_as_it_is(folder, tmp_path):
    (tmp_path / "beside.py").write_text("NAME = 'beside'")
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nimport beside\nprint(__name__, sys.argv[1:], beside.NAME, flush=True)\n"
        "sys.stdin.read()\nsys.exit(7)\n"
    )
    command = [sys.executable, "-m", "pagealloc.observe", str(script), "-x", "y"]
    environment = os.environ | {"PYTHONSAFEPATH": ""}
    with subprocess.Popen(
        command, stdin=-1, stdout=-1, text=True, cwd=tmp_path, env=environment
    ) as process:
        assert process.stdout.readline() == "__main__ ['-x', 'y'] beside\n"
        assert read_feed(process.pid).pid == process.pid
        process.stdin.close()
    assert process.returncode == 7
    assert list(folder.iterdir()) == []


def test_a_module_as_it_is(tmp_path):
    (tmp_path / "some_module.py").write_text("import sys\nprint(__name__, sys.argv[1:])")
    command = [sys.executable, "-m", "pagealloc.observe", "-m", "some_module", "z"]
    environment = os.environ | {"PYTHONSAFEPATH": "", "PYTHONPATH": str(tmp_path)}
    process = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=60
    )
    assert process.stdout == "__main__ ['z']\n"


def test_a_script_that_is_not_there(tmp_path):
    command = [sys.executable, "-m", "pagealloc.observe", str(tmp_path / "none.py")]
    process = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert process.returncode == 2
    assert process.stderr.startswith("there is no script")
    assert len(process.stderr.splitlines()) == 1


@pytest.mark.parametrize("arguments", [["script.py"], ["-m", "script"]])
def test_a_feed_that_cannot_be_opened_is_one_line(tmp_path, arguments):
    (tmp_path / "script.py").write_text("print('it ran')")
    (tmp_path / "pagealloc").touch()  # where the folder would be
    process = subprocess.run(
        [sys.executable, "-m", "pagealloc.observe", *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"XDG_RUNTIME_DIR": str(tmp_path)},
        timeout=60,
    )
    assert (process.returncode, process.stdout) == (2, "")
    assert len(process.stderr.splitlines()) == 1
    assert str(tmp_path / "pagealloc") in process.stderr


@pytest.mark.parametrize(("arguments", "code"), [([], 2), (["--help"], 0), (["--what"], 2)])
def test_how_it_is_used(arguments, code):
    command = [sys.executable, "-m", "pagealloc.observe", *arguments]
    process = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert process.returncode == code
    assert "usage: python -m pagealloc.observe SCRIPT" in process.stdout + process.stderr


# --- folders ---


def test_without_a_runtime_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setattr(feed.tempfile, "gettempdir", lambda: str(tmp_path))
    with start_feed() as here:
        assert here.path.parent == tmp_path / f"pagealloc-{os.geteuid()}"
        assert stat.S_IMODE(here.path.parent.stat().st_mode) == 0o700
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))  # of the reader alone
        assert read_feed(os.getpid()).pid == os.getpid()


@pytest.mark.parametrize("runtime", ["relative", "/no/such/folder"])
def test_a_runtime_folder_that_is_none(monkeypatch, runtime):
    monkeypatch.setenv("XDG_RUNTIME_DIR", runtime)
    assert [path.name for path in feed.feed_folders()] == [f"pagealloc-{os.geteuid()}"]


def test_a_link_in_the_folder_s_place_is_refused(folder, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    folder.symlink_to(elsewhere)
    with pytest.raises(PermissionError, match="no folder of this user's"):
        start_feed()
    listener_at(elsewhere / "7.sock").close()
    with pytest.raises(PermissionError, match="no folder of this user's"):
        read_feed(7)


def test_a_folder_that_others_open_is_refused(folder):
    folder.mkdir()
    folder.chmod(0o750)
    with pytest.raises(PermissionError, match="0750"):
        start_feed()


# --- who answers is not trusted ---


def answering(path, pieces):
    """Somebody who answers one reader with these bytes, and hangs up."""
    listener = listener_at(path)

    def answer():
        connection, _ = listener.accept()
        with connection:
            for piece in pieces:
                try:
                    connection.sendall(piece)
                except OSError:
                    break
        listener.close()

    thread = threading.Thread(target=answer)
    thread.start()
    return thread


@pytest.mark.parametrize(
    ("pieces", "error"),
    [
        ([], ConnectionResetError),
        ([b"half a li"], ConnectionResetError),
        ([b"\x00\xff\n"], ValueError),
        ([snapshot_to_json(snapshot_of(pid=8)).encode(), b"\n"], ValueError),
        ([b"x" * 5000] * 3, ValueError),
    ],
)
def test_answers_that_are_none(folder, monkeypatch, pieces, error):
    monkeypatch.setattr(feed_reader, "MOST_BYTES", 10_000)
    thread = answering(folder / "7.sock", pieces)
    with pytest.raises(error):
        read_feed(7)
    thread.join()


def test_an_answer_that_does_not_come(folder, monkeypatch):
    monkeypatch.setattr(feed_reader, "TIMEOUT_S", 0.05)
    with listener_at(folder / "7.sock"), pytest.raises(TimeoutError, match="may be stopped"):
        read_feed(7)


def test_an_answer_that_drips(folder, monkeypatch):
    monkeypatch.setattr(feed_reader, "TIMEOUT_S", 0.2)
    drops = (time.sleep(0.02) or b"x" for _ in range(1000))
    thread = answering(folder / "7.sock", drops)
    with pytest.raises(TimeoutError):
        read_feed(7)
    thread.join()


@pytest.mark.parametrize(
    "target", ["", "x", "-1", "1.5", "ftp://host", "file:///etc/passwd", "http://"]
)
def test_neither_a_pid_nor_a_url(target):
    with pytest.raises(ValueError, match="neither a process id nor"):
        source_of(target)


def test_a_process_without_a_feed_is_told_how_to_have_one():
    with pytest.raises(FileNotFoundError, match=r"process 7 has no feed: start it with `python -m"):
        source_of("7")()
