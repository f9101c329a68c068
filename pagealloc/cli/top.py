"""``pagealloc top``: a running process, live: its arenas, size classes, latencies and KV caches."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import math
import os
import select
import signal
import sys
import termios
import time
import tty
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from pagealloc.cli import CommandError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pagealloc.observe.live import History
    from pagealloc.observe.snapshot import Snapshot

__all__ = ["HELP", "NAME", "add_arguments", "find_target", "run"]

NAME = "top"
HELP = "show what a running process holds and does, live"

LEAST_INTERVAL_S = 0.1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the options of this subcommand."""
    add_target(parser)
    parser.add_argument(
        "--interval",
        type=_interval_s,
        default=1.0,
        metavar="SECONDS",
        help="between two readings (default: 1)",
    )
    parser.add_argument(
        "--once", action="store_true", help="print one view, of two readings, and end"
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print each reading as a line of JSON instead; with --once, one",
    )


def add_target(parser: argparse.ArgumentParser) -> None:
    """Add the argument that names the process."""
    parser.add_argument(
        "process",
        nargs="?",
        metavar="PID | URL",
        help="a process of this user's that has a feed, or a page of `pagealloc serve`; it may be "
        "left out if only one process has a feed",
    )


def find_target(asked: str | None) -> str:
    """Return the pid or URL that was asked for, or the pid of the only process that has a feed.

    Raises
    ------
    CommandError
        None has, or more than one; the message says what to do.
    """
    if asked is not None:
        return asked
    from pagealloc.observe.feed_reader import HOW_TO_FEED, find_feeds

    pids = find_feeds()
    if not pids:
        raise CommandError(f"no process of this user's has a feed: {HOW_TO_FEED}")
    if len(pids) > 1:
        found = ", ".join(f"{pid} ({_command_line(pid)})" for pid in pids)
        raise CommandError(f"{len(pids)} processes have a feed, say which one: {found}")
    return str(pids[0])


def run(args: argparse.Namespace) -> int:
    """Show the process until it ends, or somebody has seen enough."""
    from pagealloc.observe.feed_reader import source_of

    if not args.json and importlib.util.find_spec("rich") is None:
        raise CommandError(
            "`pagealloc top` draws with the package 'rich', which is not installed. "
            "Install it with: pip install 'pagealloc[cli]'; --json does without"
        )
    target = find_target(args.process)
    read = source_of(target)
    if args.json:
        return _print_lines(read, None if args.once else args.interval)
    if args.once:
        return _print_view(read, args.interval)
    if not sys.stdout.isatty():
        raise CommandError(
            "the output is no terminal: --once prints one view, --json a line for each reading"
        )
    return _show_live(read, target, args.interval)


def _print_lines(read: Callable[[], Snapshot], interval_s: float | None) -> int:
    from pagealloc.observe.snapshot_json import snapshot_to_json

    print(snapshot_to_json(read()), flush=True)
    while interval_s is not None:
        time.sleep(interval_s)
        try:
            line = snapshot_to_json(read())
        except (ConnectionError, FileNotFoundError):  # it ended
            break
        print(line, flush=True)
    return 0


def _print_view(read: Callable[[], Snapshot], interval_s: float) -> int:
    from rich.console import Console

    from pagealloc.cli.top_view import MOST_ROWS, view_of
    from pagealloc.observe.live import History

    history = History()
    history.add(read())
    time.sleep(interval_s)
    with contextlib.suppress(ConnectionError, FileNotFoundError):  # it ended: one reading will do
        history.add(read())
    console = Console(highlight=False)
    console.print(view_of(history, console.width, MOST_ROWS))
    return 0


def _show_live(read: Callable[[], Snapshot], target: str, interval_s: float) -> int:
    from rich.console import Console
    from rich.live import Live

    from pagealloc.cli.top_view import fitting_view
    from pagealloc.observe.live import History

    history = History()
    history.add(read())
    console: Any = Console(highlight=False)

    def view(note: str = "") -> Any:
        return fitting_view(history, console, note or "q ends")

    with (
        _keys() as was_pressed,
        Live(view(), console=console, screen=True, auto_refresh=False) as live,
    ):
        live.refresh()
        ending = _follow(
            read,
            history,
            interval_s,
            was_pressed,
            lambda note: live.update(view(note), refresh=True),
        )
    if ending is not None:
        console.print(view(f"the last view of {target}"))
        console.print(f"process {target} ended, or closed its feed: {ending}", markup=False)
    return 0


def _follow(
    read: Callable[[], Snapshot],
    history: History,
    interval_s: float,
    was_pressed: Callable[[str, float], bool],
    show: Callable[[str], None],
) -> OSError | None:
    """Read and show until a key is pressed, or the process ends; return why it did."""
    while not was_pressed("q", interval_s):
        note = ""
        try:
            history.add(read())
        except TimeoutError as error:  # stopped; it may go on
            note = str(error)
        except (ConnectionError, FileNotFoundError) as error:
            return error
        show(note)
    return None


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[str, float], bool]]:
    """Yield what waits so many seconds for a key or Ctrl-C, without the Enter a terminal waits for.

    Ctrl-C is no exception meanwhile: one amid rich's drawing would leave its screen in place.
    """
    interrupted, interrupt = os.pipe()
    keyboard = sys.stdin.fileno() if sys.stdin.isatty() else None
    watched = [interrupted] if keyboard is None else [interrupted, keyboard]

    def was_pressed(key: str, duration_s: float) -> bool:
        end_s = time.monotonic() + duration_s
        while (left_s := end_s - time.monotonic()) > 0:
            ready = select.select(watched, [], [], left_s)[0]
            if interrupted in ready:
                return True
            if ready and os.read(watched[1], 1) in (key.encode(), b""):  # or the terminal is gone
                return True
        return False

    def note_interrupt(*_: object) -> None:
        os.write(interrupt, b"!")

    handler = signal.signal(signal.SIGINT, note_interrupt)
    before = None if keyboard is None else termios.tcgetattr(keyboard)
    try:
        if keyboard is not None:
            tty.setcbreak(keyboard)
        yield was_pressed
    finally:
        if keyboard is not None and before is not None:
            termios.tcsetattr(keyboard, termios.TCSADRAIN, before)
        signal.signal(signal.SIGINT, handler)
        os.close(interrupted)
        os.close(interrupt)


def _command_line(pid: int) -> str:
    import psutil

    try:
        words = psutil.Process(pid).cmdline()
    except psutil.Error:
        return ""
    # Where the interpreter lies tells processes apart no better, and leaves no room for the rest.
    line = " ".join([PurePath(word).name for word in words[:1]] + words[1:])[:60]
    return "".join(each if each.isprintable() else "?" for each in line)


def _interval_s(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not LEAST_INTERVAL_S <= value <= 3600:
        raise argparse.ArgumentTypeError(f"{text} is not between {LEAST_INTERVAL_S} and 3600")
    return value
