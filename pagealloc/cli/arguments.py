"""Values of options that several subcommands read: types for argparse."""

import argparse

__all__ = ["port", "positive"]


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
