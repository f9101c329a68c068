"""The command ``pagealloc``: finds the subcommand, and turns its errors into one clear line."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from pagealloc.cli import CommandError
from pagealloc.errors import PageallocError

__all__ = ["main"]

SUBCOMMANDS = (
    "info",
    "plan",
    "cache",
    "demo",
    "report",
    "profile",
    "top",
    "serve",
    "doctor",
    "dashboard",
)

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


class _Version(argparse.Action):
    """Print the installed version; asking for it takes longer than parsing, so it is asked late."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"pagealloc {version('pagealloc')}")
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="pagealloc",
        description="Page-aligned memory and a KV cache for LLM inference on CPUs.",
        epilog="Under `python -X dev -m pagealloc` an error shows its traceback.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    subparsers = parser.add_subparsers(title="subcommands", metavar="SUBCOMMAND", required=True)
    for name in SUBCOMMANDS:
        module = importlib.import_module(f"pagealloc.cli.{name}")
        subparser = subparsers.add_parser(
            module.NAME,
            help=module.HELP,
            description=module.HELP[:1].upper() + module.HELP[1:] + ".",
        )
        module.add_arguments(subparser)
        subparser.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return the exit code.

    A failure of the machine's or a refusal of the kernel's is 1, an impossible value is 2 as
    argparse has it; either is one line on stderr.
    """
    args = build_parser().parse_args(argv)
    try:
        code: int = args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:
        # Who read our output stopped reading, `head` say.  Nothing may be flushed at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except (CommandError, PageallocError, OSError, ValueError) as error:
        if sys.flags.dev_mode:
            raise
        print(f"pagealloc: {error}", file=sys.stderr)
        is_usage = isinstance(error, ValueError) and not isinstance(error, PageallocError)
        return EXIT_USAGE if is_usage else EXIT_FAILED
    return code
