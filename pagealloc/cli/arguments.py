"""Values of options that several subcommands read: types for argparse."""

import argparse

__all__ = ["positive"]


def positive(text: str) -> int:
    """Return a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value
