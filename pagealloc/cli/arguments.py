"""Options that several subcommands have, and types of their values for argparse."""

import argparse

__all__ = ["add_conversations", "port", "positive"]


def add_conversations(parser: argparse.ArgumentParser) -> None:
    """Add which model answers, in how many conversations of what length."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--model",
        metavar="FILE.gguf",
        help="a Llama model of your own (default: SmolLM2-135M-Instruct, if it is installed)",
    )
    source.add_argument(
        "--quick", action="store_true", help="a tiny random model: seconds, but no sense"
    )
    parser.add_argument(
        "--conversations", type=positive, default=8, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--n-ctx",
        type=positive,
        default=8192,
        metavar="TOKENS",
        help="context of each conversation (default: %(default)s)",
    )


def port(text: str) -> int:
    """Return a port to listen at; 0 is any that is free."""
    value = int(text)
    if not 0 <= value < 1 << 16:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 65535")
    return value


def positive(text: str) -> int:
    """Return a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value
