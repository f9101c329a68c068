"""``python -m pagealloc.observe SCRIPT ...``: run a program as it is, with a feed.

As ``python SCRIPT ...`` or ``python -m MODULE ...`` would run it.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from pagealloc.observe.feed import start_feed

USAGE = """\
usage: python -m pagealloc.observe SCRIPT [ARGUMENT ...]
       python -m pagealloc.observe -m MODULE [ARGUMENT ...]

Runs a program as it is, and lets `pagealloc top` and `pagealloc serve` show it."""


def main() -> None:
    """Run what the arguments name; exits as it does."""
    match sys.argv[1:]:
        case ["-m", module, *rest]:
            start_feed()
            sys.argv = [module, *rest]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        case [script, *rest] if not script.startswith("-"):
            start_feed()
            sys.argv = [script, *rest]
            if not sys.flags.safe_path:
                sys.path[0] = str(Path(script).resolve().parent)
            runpy.run_path(script, run_name="__main__")
        case ["-h" | "--help"]:
            print(USAGE)
        case _:
            print(USAGE, file=sys.stderr)
            sys.exit(2)


if __name__ == "__main__":
    main()
