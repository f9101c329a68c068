"""``python -m pagealloc.observe SCRIPT ...``: run a program as it is, with a feed.

As ``python SCRIPT ...`` or ``python -m MODULE ...`` would run it.
"""

from __future__ import annotations

import sys

from pagealloc.observe.feed import start_feed
from pagealloc.observe.script import run_script

USAGE = """\
usage: python -m pagealloc.observe SCRIPT [ARGUMENT ...]
       python -m pagealloc.observe -m MODULE [ARGUMENT ...]

Runs a program as it is, and lets `pagealloc top` and `pagealloc serve` show it."""


def main() -> int:
    """Run what the arguments name; return what it ends with."""
    match sys.argv[1:]:
        case ["-m", module, *rest]:
            return _run(module, rest, is_module=True)
        case [script, *rest] if not script.startswith("-"):
            return _run(script, rest, is_module=False)
        case ["-h" | "--help"]:
            print(USAGE)
            return 0
    print(USAGE, file=sys.stderr)
    return 2


def _run(script: str, arguments: list[str], *, is_module: bool) -> int:
    try:
        start_feed()  # closed at exit: threads may go on when the script's own lines have ended
        return run_script(script, arguments, _nothing, is_module=is_module)
    except OSError as error:  # no folder for the feed, or no such script
        print(error, file=sys.stderr)
        return 2


def _nothing() -> None:
    pass


if __name__ == "__main__":
    sys.exit(main())
