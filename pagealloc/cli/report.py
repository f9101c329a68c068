"""``pagealloc report``: where each percent came from, one step at a time."""

import argparse
import shlex
from pathlib import Path

from pagealloc.cli.arguments import add_conversations, positive

__all__ = ["HELP", "NAME", "add_arguments", "run"]

NAME = "report"
HELP = "say where each percent came from: a float16 cache, and what each step saves against it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the options of this subcommand."""
    add_conversations(parser)
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("pagealloc-report"),
        metavar="DIR",
        help="folder for report.md, report.json and the pictures (default: %(default)s)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print what report.json has, and not the table"
    )
    parser.add_argument(
        "--rounds",
        type=positive,
        default=3,
        metavar="N",
        help="how often every step is taken; medians are shown (default: %(default)s)",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=positive,
        default=48,
        metavar="TOKENS",
        help="longest answer (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="for --quick")


def run(args: argparse.Namespace) -> int:
    """Write the report; 3 if a step that stores float16 gave other tokens, else 0."""
    from pagealloc.demo.attribution_session import ReportOptions, run_report
    from pagealloc.demo.session import DemoOptions

    work = DemoOptions(
        model=args.model,
        quick=args.quick,
        n_conversations=args.conversations,
        n_ctx=args.n_ctx,
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
    )
    return run_report(
        ReportOptions(
            work,
            folder=args.output,
            n_rounds=args.rounds,
            command=_command(args),
            prints_json=args.json,
        )
    )


def _command(args: argparse.Namespace) -> str:
    """Return what repeats the measurement; where its files go makes no difference to it."""
    words = ["pagealloc", "report"]
    if args.quick:
        words += ["--quick", "--seed", str(args.seed)]
    elif args.model is not None:
        words += ["--model", Path(args.model).name]
    for option in ("rounds", "conversations", "n_ctx", "max_new_tokens"):
        words += ["--" + option.replace("_", "-"), str(getattr(args, option))]
    return shlex.join(words)
