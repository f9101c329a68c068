"""The command line, one module a subcommand.

A subcommand's module has ``NAME``, ``HELP``, ``add_arguments(parser)`` and ``run(args) -> int``
(the exit code), and is listed in `pagealloc.cli.main`.  Importing it must stay cheap: what a
command needs beyond argparse is imported in its ``run``.
"""

__all__ = ["KV_CHOICES", "CommandError"]

KV_CHOICES = ("f16", "q8_0", "recommended", "q4_0")
"""The keys of `pagealloc.kv.quantisation.KV_KINDS`, which is not cheap to import."""


class CommandError(Exception):
    """A subcommand cannot go on; the message says what would help."""
