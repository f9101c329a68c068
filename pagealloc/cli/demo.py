"""``pagealloc demo``: a language model on pagealloc, beside the usual preallocated caches."""

import argparse
from pathlib import Path

from pagealloc.cli import KV_CHOICES, CommandError
from pagealloc.cli.arguments import add_conversations, positive

__all__ = ["HELP", "NAME", "add_arguments", "run"]

NAME = "demo"
HELP = "run a language model on pagealloc and show what that saves"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the options of this subcommand."""
    add_conversations(parser)
    parser.add_argument(
        "--engine",
        choices=("numpy", "llama"),
        default="numpy",
        help="what computes: the demo's own engine in NumPy, or llama.cpp by way of "
        "llama-cpp-python, whose prompt cache and KV buffer are compared (default: %(default)s)",
    )
    parser.add_argument(
        "--prompt", metavar="TEXT", help="answer this one question, and compare nothing"
    )
    parser.add_argument(
        "--max-new-tokens",
        type=positive,
        metavar="TOKENS",
        help="longest answer (default: 48; with --prompt 256)",
    )
    parser.add_argument(
        "--temperature",
        type=_not_negative,
        default=0.0,
        help="0 takes the likeliest token (default: %(default)s)",
    )
    parser.add_argument(
        "--kv",
        choices=KV_CHOICES,
        help="how pagealloc stores K and V: float16, as the baseline (default); 8 bits; K in 8 and "
        "V in 4; or 4 bits. If given, what it costs in perplexity is measured too",
    )
    parser.add_argument("--seed", type=int, default=0, help="for --temperature and --quick")
    parser.add_argument(
        "--json",
        type=Path,
        default=Path("pagealloc-demo.json"),
        metavar="PATH",
        help="where the figures go (default: %(default)s)",
    )
    parser.add_argument(
        "--png",
        type=Path,
        default=Path("pagealloc-demo.png"),
        metavar="PATH",
        help="where the picture goes (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Run the demo; 3 if the two sides gave other tokens though both store float16, else 0."""
    from pagealloc.demo.session import DemoOptions, run_comparison, run_prompt

    options = DemoOptions(
        model=args.model,
        quick=args.quick,
        n_conversations=args.conversations,
        n_ctx=args.n_ctx,
        max_new_tokens=args.max_new_tokens or (48 if args.prompt is None else 256),
        temperature=args.temperature,
        seed=args.seed,
        kv=args.kv,
        json_path=args.json,
        png_path=args.png,
    )
    if args.engine == "llama":
        if args.prompt is not None:
            raise CommandError("--engine llama compares: no --prompt")
        from pagealloc.demo.llama_session import run_llama_comparison

        return run_llama_comparison(options)
    if args.prompt is not None:
        return run_prompt(options, args.prompt)
    return run_comparison(options)


def _not_negative(text: str) -> float:
    value = float(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return value
