"""``pagealloc plan``: what a KV cache costs, and how many sequences fit here."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pagealloc.cli import KV_CHOICES
from pagealloc.cli.model_shape import LayerGroup, ModelShape, read_model_shape
from pagealloc.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from pagealloc.cli.plan_costs import Cost, Question

NAME = "plan"
HELP = "show what a KV cache costs, and how many sequences fit here"

MOST = 1 << 40  # of anything that is counted here: beyond it only typing errors lie

# A layer of a forked sequence: the shared pages, and its own after them.
MAPPINGS_PER_LAYER = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``pagealloc plan``."""
    shape = parser.add_argument_group("the model: a file, or its shape")
    shape.add_argument("--model", type=Path, metavar="FILE.gguf", help="read the shape from here")
    shape.add_argument("--layers", type=int, metavar="N", help="layers that have a KV cache")
    shape.add_argument("--kv-heads", type=int, metavar="N", help="KV heads of a layer")
    shape.add_argument("--head-dim", type=int, metavar="N", help="values of a head")
    load = parser.add_argument_group("the load")
    load.add_argument("--ctx", type=int, metavar="N", help="tokens a sequence may have")
    load.add_argument(
        "--tokens",
        type=int,
        metavar="N",
        help="tokens a sequence is expected to have (default: ctx)",
    )
    load.add_argument(
        "--shared-prefix",
        type=int,
        default=0,
        metavar="N",
        help="how many of these all sequences share: a system prompt (default: 0)",
    )
    load.add_argument(
        "--sequences", type=int, default=1, metavar="N", help="sequences at a time (default: 1)"
    )
    load.add_argument(
        "--memory",
        metavar="SIZE",
        help="memory for the cache, such as 16GiB (default: what this process may still take)",
    )
    parser.add_argument(
        "--kv",
        choices=KV_CHOICES,
        help="only rows stored so: float16; 8 bits; K in 8 bits and V in 4; 4 bits (default: each)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def run(args: argparse.Namespace) -> int:
    """Print the plan."""
    from pagealloc.cli.plan_costs import costs_of

    question = question_of(args)
    costs = costs_of(question)
    print(json.dumps(as_json(question, costs), indent=2) if args.json else as_text(question, costs))
    return 0


# --- the question ---


def question_of(args: argparse.Namespace) -> Question:
    """Return what the arguments ask.

    Raises
    ------
    ValueError
        An argument is missing, impossible, or contradicts another.
    """
    from pagealloc.cli.plan_costs import Question
    from pagealloc.observe.system_report import read_system_report

    report = read_system_report()
    shape = _shape_of(args)
    context_tokens = args.ctx if args.ctx is not None else shape.context_tokens
    if context_tokens is None:
        raise ValueError("--ctx is needed: how many tokens may a sequence have?")
    used_tokens = args.tokens if args.tokens is not None else context_tokens
    for option, value, least in (
        ("--ctx", context_tokens, 1),
        ("--tokens", used_tokens, 1),
        ("--shared-prefix", args.shared_prefix, 0),
        ("--sequences", args.sequences, 1),
    ):
        if value < least:
            raise ValueError(f"{option} must be at least {least}, not {value}")
        if value > MOST:
            raise ValueError(f"{option} must be at most {MOST:,}, not {value}")
    if used_tokens > context_tokens:
        raise ValueError(f"--tokens {used_tokens} is more than --ctx {context_tokens}")
    if args.shared_prefix > used_tokens:
        raise ValueError(
            f"--shared-prefix {args.shared_prefix} is more than --tokens {used_tokens}"
        )
    if args.memory is not None:
        memory_bytes = parse_bytes(args.memory, name="--memory")
    elif report.usable_bytes is not None:
        memory_bytes = report.usable_bytes
    else:
        import psutil

        memory_bytes = psutil.virtual_memory().available
    return Question(
        shape=shape,
        context_tokens=context_tokens,
        used_tokens=used_tokens,
        shared_tokens=args.shared_prefix,
        sequences=args.sequences,
        memory_bytes=memory_bytes,
        page_bytes=report.page_bytes,
        max_map_count=report.max_map_count,
        kv=args.kv,
    )


def _shape_of(args: argparse.Namespace) -> ModelShape:
    by_hand = {
        "--layers": args.layers,
        "--kv-heads": args.kv_heads,
        "--head-dim": args.head_dim,
    }
    if args.model is not None:
        if given := [option for option, value in by_hand.items() if value is not None]:
            raise ValueError(f"--model tells the shape already: leave out {', '.join(given)}")
        return read_model_shape(args.model)
    if missing := [option for option, value in by_hand.items() if value is None]:
        raise ValueError(f"give --model FILE.gguf, or the shape: {', '.join(missing)} is missing")
    for option, value in by_hand.items():
        if value < 1:
            raise ValueError(f"{option} must be at least 1, not {value}")
    return ModelShape((LayerGroup(args.layers, args.kv_heads, args.head_dim),), context_tokens=None)


# --- the answer ---


def as_json(question: Question, costs: Sequence[Cost]) -> dict[str, Any]:
    """Return the plan for machines."""
    return {**asdict(question), "costs": [asdict(cost) for cost in costs]}


def as_text(question: Question, costs: Sequence[Cost]) -> str:
    """Return the plan for people: what was asked, and a row for each cost."""
    count = question.sequences
    header = (
        "",
        "per token",
        "per sequence",
        "+ page tables",
        "shared, once",
        f"{count:,} sequence{'s' if count > 1 else ''}",
        f"fit in {format_bytes(question.memory_bytes)}",
    )
    rows = [
        (
            cost.name,
            format_bytes(cost.token_bytes),
            format_bytes(cost.sequence_bytes),
            format_bytes(cost.page_table_bytes),
            format_bytes(cost.shared_bytes),
            format_bytes(cost.total_bytes),
            f"{cost.fitting_sequences:,}",
        )
        for cost in costs
    ]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    table = [
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (header, *rows)
    ]
    return "\n".join([*_asked(question), "", *table, "", *_notes(question, costs)])


def _asked(question: Question) -> list[str]:
    sharing = f", {question.shared_tokens:,} of them shared" if question.shared_tokens else ""
    return [
        f"model     {question.shape}",
        f"sequence  {question.used_tokens:,} of {question.context_tokens:,} tokens{sharing}",
    ]


def _notes(question: Question, costs: Sequence[Cost]) -> list[str]:
    from pagealloc.cli.plan_costs import BLOCK_VALUES, is_quantisable
    from pagealloc.kv.quantisation import RESIDUAL_TOKENS

    notes = [
        f"Paged: pages of {format_bytes(question.page_bytes)} hold each layer's tokens in use.",
        f"Quantised: all but the newest {RESIDUAL_TOKENS} tokens, or a few more, of a sequence.",
        "Not counted: the model's weights and what inference needs besides the cache.",
    ]
    if question.shared_tokens and question.max_map_count:
        mappings = MAPPINGS_PER_LAYER * sum(group.n_layers for group in question.shape.groups)
        most_sequences = question.max_map_count // mappings
        if most_sequences < max(cost.fitting_sequences for cost in costs):
            notes.append(
                f"Sharing takes {mappings} mappings a sequence, and vm.max_map_count allows "
                f'{most_sequences:,} such sequences; with order="block" it takes '
                f"{MAPPINGS_PER_LAYER}."
            )
    if not is_quantisable(question.shape):
        notes.append(f"Not quantisable: rows are no multiple of {BLOCK_VALUES} values.")
    if question.shape.sliding_window_tokens:
        notes.append(
            f"Layers with a sliding window of {question.shape.sliding_window_tokens:,} tokens "
            "are counted in full."
        )
    return notes
