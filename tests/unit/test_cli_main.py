"""The command line as a whole: errors are one line, and never a traceback."""

import os
import subprocess
import sys
from importlib.metadata import version

import pytest

from pagealloc.cli import CommandError, info, main
from pagealloc.errors import BackingUnavailableError, OutOfMemoryError


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("--ctx must be at least 1"), 2),
        (CommandError("install it"), 1),
        (OutOfMemoryError("asked for 4 KiB"), 1),
        (BackingUnavailableError(12, "no hugetlb here"), 1),
        (FileNotFoundError(2, "No such file or directory", "x.gguf"), 1),
    ],
)
def test_an_error_is_one_line_on_stderr(monkeypatch, capsys, error, code):
    def fail(args):
        raise error

    monkeypatch.setattr(info, "run", fail)
    assert main.main(["info"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"pagealloc: {error}\n"


def test_a_defect_is_not_hidden(monkeypatch):
    def fail(args):
        raise ZeroDivisionError

    monkeypatch.setattr(info, "run", fail)
    with pytest.raises(ZeroDivisionError):
        main.main(["info"])


def test_interrupted(monkeypatch, capsys):
    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "run", interrupt)
    assert main.main(["info"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("arguments", [[], ["no-such-thing"], ["plan", "--ctx", "many"]])
def test_what_argparse_refuses(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        main.main(arguments)
    assert stop.value.code == 2
    assert "usage: pagealloc" in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"pagealloc {version('pagealloc')}\n"


@pytest.mark.parametrize("name", main.SUBCOMMANDS)
def test_every_subcommand_has_help(capsys, name):
    with pytest.raises(SystemExit) as stop:
        main.main([name, "--help"])
    assert stop.value.code == 0
    assert f"usage: pagealloc {name}" in capsys.readouterr().out


def test_python_m_pagealloc_and_a_closed_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as closed_pipe:
        process = subprocess.run(
            [sys.executable, "-m", "pagealloc", "info"],
            stdout=closed_pipe,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    assert process.returncode == 1
    assert process.stderr == ""
