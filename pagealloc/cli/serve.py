"""``pagealloc serve``: a web page of a running process, live."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from pagealloc.cli.arguments import port
from pagealloc.cli.top import add_target, find_target

if TYPE_CHECKING:
    import argparse

__all__ = ["HELP", "NAME", "add_arguments", "run"]

NAME = "serve"
HELP = "serve a web page of what a running process holds and does"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the options of this subcommand."""
    add_target(parser)
    parser.add_argument(
        "--port", type=port, default=0, help="where to listen (default: any that is free)"
    )
    parser.add_argument(
        "--addr",
        default="127.0.0.1",
        help="address to listen at (default: %(default)s, this machine alone); whoever reaches it "
        "may read the page",
    )
    parser.add_argument(
        "--host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name by which browsers may ask for the page, besides the address and localhost; "
        "may be given several times",
    )


def run(args: argparse.Namespace) -> int:
    """Serve until Ctrl-C."""
    from pagealloc.observe.feed_reader import source_of
    from pagealloc.observe.web import serve_source

    target = find_target(args.process)
    read = source_of(target)
    read()  # what cannot be read is an error now, not a page of it
    with serve_source(read, args.port, args.addr, hosts=args.host) as server:
        print(f"process {target} is shown at {server.url} until Ctrl-C", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            return 0
    return 0
