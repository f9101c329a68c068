"""``pagealloc top``: a running process, live: its arenas, size classes, latencies and KV caches."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import select
import sys
import time
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
ROWS_OF_PIPES = 10


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
        lines = "".join(f"\n  {pid:>7}  {_command_line(pid)}" for pid in pids)
        raise CommandError(f"{len(pids)} processes have a feed; which one?{lines}")
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
        except OSError:  # it ended
            break
        print(line, flush=True)
    return 0


def _print_view(read: Callable[[], Snapshot], interval_s: float) -> int:
    from rich.console import Console

    from pagealloc.cli.top_view import view_of
    from pagealloc.observe.live import History

    history = History()
    history.add(read())
    time.sleep(interval_s)
    with contextlib.suppress(ConnectionError, FileNotFoundError):  # it ended: one reading will do
        history.add(read())
    console = Console(highlight=False)
    console.print(view_of(history, console.width, ROWS_OF_PIPES))
    return 0


def _show_live(read: Callable[[], Snapshot], target: str, interval_s: float) -> int:
    from rich.console import Console
    from rich.live import Live

    from pagealloc.cli.top_view import view_of
    from pagealloc.observe.live import History

    history = History()
    history.add(read())
    console: Any = Console(highlight=False)

    def view(note: str = "") -> Any:
        n_rows = max(3, console.height // 5)
        return view_of(history, console.width, n_rows, note or "q ends")

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
    """Read and show until the process ends, which is returned, or a key or Ctrl-C ends it."""
    try:
        while not was_pressed("q", interval_s):
            note = ""
            try:
                history.add(read())
            except TimeoutError as error:  # stopped; it may go on
                note = str(error)
            except (ConnectionError, FileNotFoundError) as error:
                return error
            show(note)
    except KeyboardInterrupt:
        pass
    return None


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[str, float], bool]]:
    """Yield what waits so many seconds for a key, without the Enter that a terminal waits for."""
    if not sys.stdin.isatty():
        yield lambda _key, duration_s: bool(time.sleep(duration_s))  # type: ignore[func-returns-value]
        return
    import os
    import termios
    import tty

    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)

    def was_pressed(key: str, duration_s: float) -> bool:
        end_s = time.monotonic() + duration_s
        while (left_s := end_s - time.monotonic()) > 0:
            if select.select([fd], [], [], left_s)[0]:
                pressed = os.read(fd, 1)
                if not pressed or pressed == key.encode():  # or the terminal is gone
                    return True
        return False

    try:
        tty.setcbreak(fd)
        yield was_pressed
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def _command_line(pid: int) -> str:
    import psutil

    try:
        words = psutil.Process(pid).cmdline()
    except psutil.Error:
        return ""
    line = " ".join(words)[:100]
    return "".join(each if each.isprintable() else "?" for each in line)


def _interval_s(text: str) -> float:
    value = float(text)
    if not LEAST_INTERVAL_S <= value <= 3600:
        raise argparse.ArgumentTypeError(f"{text} is not between {LEAST_INTERVAL_S} and 3600")
    return value
