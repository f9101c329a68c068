"""``python -m bench NAME``: runs one benchmark, prints its table, writes its JSON."""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import sys
from pathlib import Path

from bench.installed import ROOT, prefer_installed_package

BENCH = ROOT / "bench"


def summaries() -> dict[str, str]:
    """Return each benchmark's name and the line that says what it measures."""
    found = {}
    for path in sorted(BENCH.glob("bench_*.py")):
        docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
        found[path.stem.removeprefix("bench_")] = docstring.partition("\n")[0]
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 0: all bars hold, 1: a bar is missed, 2: called the wrong way."""
    known = summaries()
    listing = "\n".join(f"  {name:12} {summary}" for name, summary in known.items())
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measure pagealloc.",
        epilog=f"benchmarks:\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="which benchmark; none: list them")
    parser.add_argument(
        "--rounds", type=int, default=25, help="repetitions of each case (%(default)s)"
    )
    parser.add_argument(
        "--json", type=Path, metavar="PATH", help="where the JSON goes (.benchmarks/NAME.json)"
    )
    parser.add_argument("--quick", action="store_true", help="a shortened version (core, memory)")
    parser.add_argument(
        "--markdown",
        type=Path,
        metavar="PATH",
        help="its page of docs/benchmarks, if it has one",
    )
    options = parser.parse_args(arguments)
    if options.name is None:
        print(listing)
        return 0
    if options.name not in known:
        parser.error(f"there is no benchmark {options.name!r}; there are: {', '.join(known)}")
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: at least 1 is possible")
    prefer_installed_package()
    run = importlib.import_module(f"bench.bench_{options.name}").run
    signature = inspect.signature(run, eval_str=True)
    if options.quick and "quick" not in signature.parameters:
        parser.error(f"{options.name} has no --quick")
    if options.markdown and not hasattr(signature.return_annotation, "write_markdown"):
        parser.error(f"{options.name} has no --markdown")
    report = run(options.rounds, quick=True) if options.quick else run(options.rounds)
    if options.markdown:
        report.write_markdown(options.markdown)
    path = options.json or Path(".benchmarks", f"{options.name}.json")
    report.write_json(path)
    print(report)
    print(f"written to {path}")
    return 0 if report.holds else 1


if __name__ == "__main__":
    sys.exit(main())
