"""``pagealloc profile``: a script, and where its memory, time and waits went."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from pagealloc.cli import CommandError
from pagealloc.cli.arguments import port
from pagealloc.units import format_bytes

if TYPE_CHECKING:
    from pagealloc.observe.profiles import Frame, Profile

__all__ = ["HELP", "NAME", "add_arguments", "run"]

NAME = "profile"
HELP = "run a script and show by line what it allocates, computes, and waits for"

DEFAULT_PERIOD = "512KiB"
DEFAULT_FOLDER = Path("pagealloc-profile")
N_HOTTEST = 5
LIBRARIES = ("site-packages", "dist-packages")
KINDS = ("heap", "cpu", "contention")
LABELS = {
    "alloc_space": "allocated",
    "inuse_space": "live at the end",
    "cpu": "CPU time",
    "delay": "waited for the core's mutexes",
}
"""The values that are shown, of those that profiles have."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``pagealloc profile``."""
    parser.epilog = "Without --heap, --cpu or --contention all three are taken."
    parser.add_argument("--heap", action="store_true", help="bytes allocated and live, by stack")
    parser.add_argument("--cpu", action="store_true", help="CPU time, inside pagealloc marked")
    parser.add_argument(
        "--contention", action="store_true", help="time threads waited for each other"
    )
    parser.add_argument(
        "--period",
        metavar="BYTES",
        help=f"note one byte of so many allocated; 1: each block (default: {DEFAULT_PERIOD})",
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="DIR",
        type=Path,
        help=f"where the files go (default: {DEFAULT_FOLDER})",
    )
    parser.add_argument(
        "--diff",
        nargs=2,
        metavar=("A", "B"),
        type=Path,
        help="run nothing: show what profile B.pb.gz has more, or less, than A.pb.gz",
    )
    parser.add_argument(
        "--serve",
        metavar="PORT",
        type=port,
        help="let go tool pprof look in meanwhile, at /debug/pprof/; 0: any port",
    )
    parser.add_argument(
        "-m", dest="module", action="store_true", help="SCRIPT is a module, as for python -m"
    )
    parser.add_argument("script", metavar="SCRIPT", nargs="?", help="what to run")
    parser.add_argument("arguments", metavar="ARGS", nargs=argparse.REMAINDER, help="its arguments")


def run(args: argparse.Namespace) -> int:
    """Run the script, or compare two profiles."""
    kinds = [kind for kind in KINDS if getattr(args, kind)]
    _refuse_what_would_be_ignored(args, kinds)
    folder = args.output or DEFAULT_FOLDER
    if args.diff:
        return _show_difference(args.diff[0], args.diff[1], folder)
    if args.script is None:
        raise ValueError("which script? pagealloc profile [options] SCRIPT.py [its arguments]")
    period = DEFAULT_PERIOD if args.period is None else args.period
    if args.serve is not None:
        return _serve(args, period)
    return _profile_script(args, kinds or list(KINDS), period, folder)


def _refuse_what_would_be_ignored(args: argparse.Namespace, kinds: list[str]) -> None:
    of_run = (args.script, args.serve, args.period)
    if args.diff and (kinds or args.module or any(each is not None for each in of_run)):
        raise ValueError(
            "--diff compares two profiles and runs nothing: leave the script out, and all options "
            "but -o"
        )
    if args.serve is not None and (kinds or args.output is not None):
        raise ValueError("--serve profiles on demand: leave --heap, --cpu, --contention and -o out")


def _profile_script(args: argparse.Namespace, kinds: list[str], period: str, folder: Path) -> int:
    from pagealloc.observe.profiling import profile
    from pagealloc.observe.script import run_script

    _check_folder(folder)
    folder = folder.absolute()  # the script may go elsewhere
    options = {"heap": {"period": period}}
    profilings = [profile(kind, **options.get(kind, {})) for kind in kinds]
    with ExitStack() as running:
        for profiling in profilings:
            running.enter_context(profiling)

        def finish() -> None:
            running.close()
            folder.mkdir(parents=True, exist_ok=True)
            for profiling in profilings:
                _write(profiling.kind, profiling.profile, folder)

        return run_script(args.script, args.arguments, finish, is_module=args.module)


def _check_folder(folder: Path) -> None:
    """Say now, not when the script has run, that nothing can be written there; make nothing yet."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise CommandError(f"cannot write to {folder}: {nearest} is no folder; -o DIR names one")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise CommandError(f"cannot write to {folder}: no permission; -o DIR names another folder")


def _serve(args: argparse.Namespace, period: str) -> int:
    from pagealloc.observe.pprof_server import start_profile_server
    from pagealloc.observe.script import run_script

    with start_profile_server(args.serve, heap_period=period) as server:
        return run_script(args.script, args.arguments, server.close, is_module=args.module)


def _write(kind: str, profile: Profile, folder: Path) -> None:
    from pagealloc.observe.profiling import write_profile

    for suffix in (".pb.gz", ".html", ".folded"):
        write_profile(profile, folder / f"{kind}{suffix}", f"{kind} profile")
    name = _short(folder / kind, Path.cwd())
    _say(f"{kind}: {name}.html; go tool pprof {name}.pb.gz")
    _print_values(profile)


def _print_values(profile: Profile) -> None:
    """Print what the profile is about, and the lines with most of it."""
    for which, (name, unit) in enumerate(profile.value_types):
        if name in LABELS:
            _say(f"  {_amount(profile.total(which), unit)} {LABELS[name]}")
            _print_lines(profile.hottest(N_HOTTEST, which), unit)


def _say(line: str) -> None:
    print(line, file=sys.stderr)  # stdout is the script's


def _print_lines(lines: list[tuple[Frame, int]], unit: str) -> None:
    for frame, value in lines:
        if value:
            _say(f"    {_amount(value, unit):>12}  {frame.function}  {_place(frame)}")


def _place(frame: Frame) -> str:
    """Return file and line, the file as short as it is clear: below here, or below its package."""
    path = Path(frame.file)
    libraries = (parent for parent in path.parents if parent.name in LIBRARIES)
    path = _short(path, Path.cwd(), *libraries)
    return f"{path}:{frame.line}" if frame.line else str(path)


def _short(path: Path, *folders: Path) -> Path:
    """Return the path from the first of the folders that it lies in."""
    return next((path.relative_to(each) for each in folders if path.is_relative_to(each)), path)


def _amount(value: int, unit: str) -> str:
    if unit == "bytes":
        return ("-" if value < 0 else "") + format_bytes(abs(value))
    return f"{value / 1e6:,.1f} ms" if unit == "nanoseconds" else f"{value:,}"


def _show_difference(first: Path, second: Path, folder: Path) -> int:
    from pagealloc.observe.flamegraph import flame_graph
    from pagealloc.observe.pprof import from_pprof

    profiles = []
    for path in (first, second):
        try:
            profiles.append(from_pprof(path.read_bytes()))
        except ValueError as error:
            raise CommandError(f"{path}: {error}") from error
    before, after = profiles
    difference = after.minus(before)
    _check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "diff.html"
    title = f"{second} less {first}"
    page.write_text(flame_graph(difference, title, is_difference=True), encoding="utf-8")
    _say(f"{page}: {title}")
    _print_values(difference)
    return 0
