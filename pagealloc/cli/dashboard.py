"""``pagealloc dashboard``: what Grafana and Prometheus import, on stdout."""

import argparse
import sys

from pagealloc.observe.dashboard import dashboard_json, rules_yaml

__all__ = ["HELP", "NAME", "add_arguments", "run"]

NAME = "dashboard"
HELP = "print the dashboard for Grafana, or the rules for Prometheus"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``pagealloc dashboard``."""
    parser.add_argument(
        "--rules",
        action="store_true",
        help="print recording rules and alerts for Prometheus instead (YAML)",
    )


def run(args: argparse.Namespace) -> int:
    """Print one of the two files."""
    sys.stdout.write(rules_yaml() if args.rules else dashboard_json())
    return 0
