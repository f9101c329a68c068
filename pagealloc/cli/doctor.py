"""``pagealloc doctor``: what is wrong with the use of memory, and what to do."""

from __future__ import annotations

import argparse
import json
import os
import runpy
import sys
import threading
import traceback
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pagealloc.cli import CommandError
from pagealloc.errors import BackingUnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import TracebackType

    from pagealloc.observe.doctor_finding import Finding

__all__ = ["HELP", "NAME", "add_arguments", "run"]

NAME = "doctor"
HELP = "say what is wrong with the use of memory, and what to do"

EXIT_FOUND = 1
EXIT_FAILED = 1
EXIT_INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the options of this subcommand."""
    parser.epilog = (
        "The exit code is 1 if there is a problem, else the script's own; advice alone is 0."
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object instead; what the script prints goes to stderr",
    )
    parser.add_argument(
        "script",
        nargs="?",
        metavar="SCRIPT.py",
        help="a Python program to run and watch (default: the machine alone is examined)",
    )
    parser.add_argument(
        "arguments", nargs=argparse.REMAINDER, metavar="...", help="the script's arguments"
    )


def run(args: argparse.Namespace) -> int:
    """Examine the machine, or a script's run; 1 if there is a problem, else the script's code."""
    from pagealloc.observe.doctor import examine, examine_machine, settle
    from pagealloc.observe.doctor_watch import Watch

    if args.script is None:
        return report(examine_machine(), as_json=args.json)
    if not Path(args.script).is_file():
        raise CommandError(f"{args.script} is no file: give a Python program to run")
    pid = os.getpid()
    with stdout_to_stderr(args.json), Watch() as watch:
        code = run_script(args.script, args.arguments)
        if os.getpid() != pid:  # a child of the script's, which nobody watches
            raise SystemExit(code)
        settle(watch)
    unavailable = tuple(str(each) for each in kept if isinstance(each, BackingUnavailableError))
    findings = examine(replace(watch.evidence(), unavailable=unavailable))
    return report(findings, as_json=args.json) or code


def report(findings: Sequence[Finding], *, as_json: bool) -> int:
    """Print the findings, and return the exit code."""
    from pagealloc.observe import doctor_finding

    if as_json:
        print(json.dumps(doctor_finding.as_json(findings), indent=2))
    else:
        print(doctor_finding.as_text(findings, colour=sys.stdout.isatty()))
    is_problem = any(finding.severity == "problem" for finding in findings)
    return EXIT_FOUND if is_problem else 0


def run_script(script: str, arguments: Sequence[str]) -> int:
    """Run a program as ``python SCRIPT`` does, and return the exit code it would have had.

    Its variables live on until the process ends: what it left open is part of what is examined.
    """
    sys.argv = [script, *arguments]
    if not sys.flags.safe_path:
        sys.path[0] = str(Path(script).resolve().parent)
    try:
        kept.append(runpy.run_path(script, run_name="__main__"))
    except SystemExit as stop:
        kept.append(stop)
        return exit_code(stop.code)
    except KeyboardInterrupt as interrupt:
        kept.append(interrupt)
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BaseException as error:  # noqa: BLE001  whatever it is, it is the script's
        kept.append(error)
        traceback.print_exception(error.with_traceback(own_frames(error, script)))
        return EXIT_FAILED
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    return 0


def own_frames(error: BaseException, script: str) -> TracebackType | None:
    """Return the error's frames from the script's on; all of them if it never began."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename != script:
        frames = frames.tb_next
    return frames or error.__traceback__


kept: list[object] = []
"""What the script left: its variables, or what it raised, whose frames have them."""


def exit_code(code: object) -> int:
    """Return the exit code of ``sys.exit(code)``, and say what there is to say."""
    if code is None:
        return 0
    if isinstance(code, int):
        return code & 0xFF
    print(code, file=sys.stderr)
    return EXIT_FAILED


@contextmanager
def stdout_to_stderr(is_wanted: bool) -> Iterator[None]:  # noqa: FBT001
    """Send to stderr what is written to stdout meanwhile, by subprocesses too."""
    if not is_wanted:
        yield
        return
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(saved, 1)
        os.close(saved)
