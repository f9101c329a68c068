"""``pagealloc doctor``: what is wrong with the use of memory, and what to do."""

from __future__ import annotations

import argparse
import json
import os
import sys
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from pagealloc.errors import BackingUnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pagealloc.observe.doctor_finding import Finding

__all__ = ["HELP", "NAME", "add_arguments", "run"]

NAME = "doctor"
HELP = "say what is wrong with the use of memory, and what to do"

EXIT_FOUND = 1
DEFAULT_SECONDS = 5.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the options of this subcommand."""
    parser.epilog = (
        "Without a script or a process, the machine alone is examined.  The exit code is 1 if "
        "there is a problem, else the script's own; advice alone is 0."
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object instead; what the script prints goes to stderr",
    )
    parser.add_argument(
        "--pid", type=int, help="watch a running process of this user's, which has a feed"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        metavar="N",
        help=f"for how long, with --pid (default: {DEFAULT_SECONDS:g})",
    )
    parser.add_argument(
        "-m", dest="module", action="store_true", help="SCRIPT is a module, as for python -m"
    )
    parser.add_argument("script", metavar="SCRIPT", nargs="?", help="what to run and watch")
    parser.add_argument("arguments", metavar="ARGS", nargs=argparse.REMAINDER, help="its arguments")


def run(args: argparse.Namespace) -> int:
    """Examine a script's run, a process or the machine; 1 if there is a problem."""
    from pagealloc.observe.doctor import examine_machine, examine_pid

    if args.pid is not None:
        if args.script is not None or args.module:
            raise ValueError("--pid watches a process that runs: leave -m and the script out")
        seconds = DEFAULT_SECONDS if args.seconds is None else args.seconds
        return report(examine_pid(args.pid, seconds), as_json=args.json)
    if args.seconds is not None:
        raise ValueError("--seconds says how long --pid watches: leave it out without --pid")
    if args.script is None:
        if args.module:
            raise ValueError("which module? pagealloc doctor [options] -m MODULE [its arguments]")
        return report(examine_machine(), as_json=args.json)
    return examine_script(args)


def examine_script(args: argparse.Namespace) -> int:
    """Run a script under the doctor's eyes, and report; return 1 or the script's exit code."""
    from pagealloc.observe.doctor import examine, settle
    from pagealloc.observe.doctor_watch import Watch
    from pagealloc.observe.script import run_script

    found = 0
    with ExitStack() as watching:
        watching.enter_context(stdout_to_stderr(is_wanted=args.json))
        watch = watching.enter_context(Watch())

        def finish() -> None:
            # The report is made here, for SIGTERM leaves no other time; nor are buffers flushed.
            nonlocal found
            settle(watch)
            watching.close()
            error = getattr(sys, "last_value", None)
            unavailable = (str(error),) if isinstance(error, BackingUnavailableError) else ()
            findings = examine(replace(watch.evidence(), unavailable=unavailable))
            found = report(findings, as_json=args.json)
            sys.stdout.flush()

        code = run_script(args.script, args.arguments, finish, is_module=args.module)
    return found or code


def report(findings: Sequence[Finding], *, as_json: bool) -> int:
    """Print the findings, and return the exit code."""
    from pagealloc.observe import doctor_finding

    if as_json:
        print(json.dumps(doctor_finding.as_json(findings), indent=2))
    else:
        print(doctor_finding.as_text(findings, colour=sys.stdout.isatty()))
    is_problem = any(finding.severity == "problem" for finding in findings)
    return EXIT_FOUND if is_problem else 0


@contextmanager
def stdout_to_stderr(*, is_wanted: bool) -> Iterator[None]:
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
