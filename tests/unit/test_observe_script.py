"""run_script(): as ``python SCRIPT`` would, with something to do at its end."""

import builtins
import os
import signal
import subprocess
import sys
import threading

import pytest

from pagealloc.observe.script import run_script


@pytest.fixture
def write(tmp_path):
    def write_script(text: str) -> str:
        path = tmp_path / "script.py"
        path.write_text(text)
        return str(path)

    return write_script


def run(script: str, *arguments: str, **options) -> tuple[int, int]:
    """Return the exit code, and how often the end was told."""
    ends: list[bool] = []
    return run_script(script, arguments, lambda: ends.append(True), **options), len(ends)


def test_as_python_would(write, capfd):
    before = sys.argv, list(sys.path)
    script = write(
        "import sys, os\nprint(__name__, sys.argv[1:], os.path.dirname(__file__) == sys.path[0])"
    )
    assert run(script, "a", "--b") == (0, 1)
    assert capfd.readouterr().out == "__main__ ['a', '--b'] True\n"
    assert (sys.argv, sys.path) == before


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("raise SystemExit", 0, ""),
        ("import sys; sys.exit(7)", 7, ""),
        ("import sys; sys.exit('a reason')", 1, "a reason\n"),
        ("raise KeyboardInterrupt", 130, "interrupted\n"),
    ],
)
def test_exit_codes(write, capfd, text, code, said):
    assert run(write(text)) == (code, 1)
    assert capfd.readouterr().err == said


def test_a_traceback_begins_in_the_script(write, capfd):
    assert run(write("def f():\n    1 / 0\nf()\n")) == (1, 1)
    error = capfd.readouterr().err
    assert error.startswith('Traceback (most recent call last):\n  File "')
    assert "runpy" not in error
    assert "observe/script.py" not in error
    assert error.endswith("ZeroDivisionError: division by zero\n")


def test_variables_are_there_at_the_end(write):
    script = write(
        "import builtins, weakref\n"
        "class Thing: pass\n"
        "thing = Thing()\n"
        "builtins.planted = weakref.ref(thing)\n"
    )
    seen = []
    run_script(script, [], lambda: seen.append(builtins.planted() is not None))
    assert seen == [True]
    del builtins.planted


def test_modules(tmp_path, monkeypatch, capfd):
    (tmp_path / "planted_module.py").write_text("import sys; print(__name__, sys.argv[1:])")
    monkeypatch.chdir(tmp_path)
    assert run("planted_module", "x", is_module=True) == (0, 1)
    assert capfd.readouterr().out == "__main__ ['x']\n"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package in the current folder: without ``__main__``, and with a module ``part``."""
    folder = tmp_path / "planted_package"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "part.py").write_text("if __name__ == '__main__': print(__package__)\n")
    monkeypatch.chdir(tmp_path)
    yield folder
    for name in [name for name in sys.modules if name.startswith("planted_package")]:
        del sys.modules[name]


def test_a_module_of_a_package(package, capfd):
    assert run("planted_package.part", is_module=True) == (0, 1)
    assert capfd.readouterr().out == "planted_package\n"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nothere", "No module named nothere"),
        ("nothere.part", "No module named 'nothere'"),
        ("planted_package.nothere", "No module named planted_package.nothere"),
        ("planted_package", "'planted_package' is a package and cannot be directly executed"),
        ("planted_package.part.deeper", "planted_package.part.deeper"),
        (".part", "Relative module names not supported"),
        ("math", "No code object available for math"),
    ],
)
def test_no_such_module(package, capfd, name, reason):
    before = sys.argv, list(sys.path), signal.getsignal(signal.SIGTERM)
    ends = []
    with pytest.raises(FileNotFoundError) as refused:
        run_script(name, [], lambda: ends.append(True), is_module=True)
    assert str(refused.value).startswith(f"cannot run '{name}': ")
    assert reason in str(refused.value)
    assert ends == []
    assert capfd.readouterr() == ("", "")
    assert (sys.argv, sys.path, signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.parametrize("where", ["__init__.py", "part.py"])
@pytest.mark.parametrize(
    "text", ["import nothere", "import runpy; runpy.run_module('nothere')", "raise ImportError"]
)
def test_import_errors_of_the_script_are_its_own(package, capfd, where, text):
    (package / where).write_text(text)
    assert run("planted_package.part", is_module=True) == (1, 1)
    error = capfd.readouterr().err
    assert error.startswith("Traceback (most recent call last):\n")
    assert f"planted_package/{where}" in error


def test_no_such_script(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no script"):
        run(str(tmp_path / "none.py"))


def test_threads_of_the_script_end_first(write):
    """As Python waits for those that are no daemons before it ends."""
    script = write(
        "import builtins, threading, time\n"
        "def work():\n"
        "    time.sleep(0.1)\n"
        "    builtins.planted = True\n"
        "threading.Thread(target=work).start()\n"
        "threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
    )
    seen = []
    run_script(script, [], lambda: seen.append(hasattr(builtins, "planted")))
    assert seen == [True]
    del builtins.planted


def test_a_forked_child_does_not_tell_the_end(tmp_path):
    (tmp_path / "script.py").write_text(
        "import os, sys\npid = os.fork()\nif pid == 0: sys.exit(0)\nos.waitpid(pid, 0)\n"
    )
    runner = (
        "import sys; from pagealloc.observe.script import run_script\n"
        "sys.exit(run_script('script.py', [], lambda: print('the end', flush=True)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", runner], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout == "the end\n"


def test_the_excepthook_of_the_script(write, monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    script = write("import sys\nsys.excepthook = lambda *e: sys.planted.append(e[0])\n1 / 0\n")
    monkeypatch.setattr(sys, "planted", [], raising=False)
    assert run(script) == (1, 1)
    assert sys.planted == [ZeroDivisionError]


# --- SIGTERM ---

TELL = "print('the end', flush=True)"
not_under_tsan = pytest.mark.skipif(
    os.environ.get("PAGEALLOC_SANITIZE") == "thread",
    reason="ThreadSanitizer holds signals back until a call that it knows to block",
)


@pytest.fixture
def start(tmp_path):
    """Start a script in a process of its own, which tells its end by a line on stdout."""
    started = []

    def start_script(text: str, at_end: str = TELL) -> subprocess.Popen:
        (tmp_path / "script.py").write_text(text)
        runner = (
            "import sys; from pagealloc.observe.script import run_script\n"
            f"def at_end():\n    {at_end}\n"
            "sys.exit(run_script('script.py', [], at_end))\n"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", runner],
            cwd=tmp_path,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start_script
    for process in started:
        process.kill()
        process.communicate()


READY = "import os, signal, sys, threading, time\nprint('ready', flush=True)\n"


def terminated(process: subprocess.Popen, after: str = "ready\n") -> tuple[int, str, str]:
    """Send SIGTERM once the line is said; return the exit code, and what was said then."""
    assert process.stdout.readline() == after
    process.terminate()
    out, err = process.communicate(timeout=30)
    return process.returncode, out, err


@pytest.mark.parametrize(
    "waiting",
    [
        "time.sleep(60)",
        pytest.param("while True: pass", marks=not_under_tsan),
        "threading.Thread(target=time.sleep, args=(60,)).start()",
        "sys.exit(threading.Thread(target=time.sleep, args=(60,)).start())",
    ],
)
def test_the_end_is_told_before_sigterm_ends_the_script(start, waiting):
    assert terminated(start(READY + waiting)) == (-signal.SIGTERM, "the end\n", "")


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_the_end_is_told_though_sigterm_has_interrupted_a_print(start, stream):
    process = start(
        "import io, signal, sys\n"
        "class Terminal(io.RawIOBase):\n"
        "    def writable(self):\n"
        "        return True\n"
        "    def write(self, data):\n"
        "        signal.raise_signal(signal.SIGTERM)\n"
        f"sys.{stream} = io.TextIOWrapper(io.BufferedWriter(Terminal()))\n"
        f"print('cut short', file=sys.{stream}, flush=True)\n",
        f"print('the end', file=sys.{stream}); 1 / 0",
    )
    texts = dict(zip(("stdout", "stderr"), process.communicate(timeout=30), strict=True))
    assert process.returncode == -signal.SIGTERM
    assert texts[stream].startswith("the end\n")
    assert texts["stderr"].endswith("ZeroDivisionError: division by zero\n")


def test_an_end_that_is_being_told_is_not_told_again(start):
    process = start("", "print('begun', flush=True); sys.stdin.readline(); " + TELL)
    assert process.stdout.readline() == "begun\n"
    for _ in range(2):
        process.terminate()
    out, err = process.communicate("go on\n", timeout=30)
    assert (process.returncode, out, err) == (-signal.SIGTERM, "the end\n", "")


def test_what_goes_wrong_at_the_end_is_said_before_sigterm_ends_the_script(start):
    code, out, err = terminated(start(READY + "time.sleep(60)", "1 / 0"))
    assert (code, out) == (-signal.SIGTERM, "")
    assert err.endswith("ZeroDivisionError: division by zero\n")


@pytest.mark.parametrize(
    "fork", ["os.fork()", pytest.param("fork_in_a_thread()", marks=not_under_tsan)]
)
def test_a_forked_child_dies_of_sigterm_and_tells_nothing(start, fork):
    process = start(
        "import os, signal, threading, time, warnings\n"
        "warnings.simplefilter('ignore', DeprecationWarning)  # of a fork beside threads\n"
        "def child():\n"
        "    os.write(1, b'ready\\n')\n"
        "    time.sleep(60)\n"
        "def fork_in_a_thread():\n"
        "    pids = []\n"
        "    def work():\n"
        "        pids.append(os.fork())\n"
        "        if pids == [0]: child()\n"
        "    thread = threading.Thread(target=work)\n"
        "    thread.start()\n"
        "    thread.join()\n"
        "    return pids[0]\n"
        f"pid = {fork}\n"
        "if pid == 0: child()\n"
        "input()\n"
        "os.kill(pid, signal.SIGTERM)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)\n"
    )
    assert process.stdout.readline() == "ready\n"
    out, err = process.communicate("kill it\n", timeout=30)
    assert (process.returncode, out, err) == (0, "-15\nthe end\n", "")


def test_a_handler_of_the_scripts_own_replaces_ours(start):
    own = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))\n"
    process = start("import signal, sys\n" + own + READY + "time.sleep(60)")
    assert terminated(process) == (3, "the end\n", "")


def test_the_action_before_is_restored_unless_the_script_has_changed_it(write):
    script = write("import signal\nassert callable(signal.getsignal(signal.SIGTERM))\n")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert run(script) == (0, 1)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    try:
        run(write("import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"))
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
        ignored = "import signal\nassert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN\n"
        assert run(write(ignored)) == (0, 1)  # who ignores it, goes on ignoring it
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_another_thread_handles_no_signals(write):
    script = write("import signal\nassert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL\n")
    codes = []
    thread = threading.Thread(target=lambda: codes.append(run(script)))
    thread.start()
    thread.join()
    assert codes == [(0, 1)]
