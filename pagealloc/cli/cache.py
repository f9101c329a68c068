"""``pagealloc cache``: files of published KV blocks: what is in them, and are they whole."""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pagealloc.cli import CommandError
from pagealloc.errors import CacheFileError
from pagealloc.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pagealloc.kv.cache_file import CacheFile

NAME = "cache"
HELP = "list, show, verify or remove files of published KV blocks"

SHOW_AFTER_S = 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands of ``pagealloc cache``."""
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    for name, action, text in (
        ("ls", ls, "list the files in a folder"),
        ("info", info, "show what a file holds"),
        ("verify", verify, "read all blocks of a file and compare their checksums"),
        ("rm", rm, "remove a file, if it is one of KV blocks"),
    ):
        subparser = actions.add_parser(
            name, help=text, description=f"{text[:1].upper()}{text[1:]}."
        )
        subparser.add_argument("path", type=Path, metavar="PATH")
        if name in ("ls", "info"):
            subparser.add_argument("--json", action="store_true", help="print JSON instead")
        subparser.set_defaults(action=action)


def run(args: argparse.Namespace) -> int:
    """Carry out the action."""
    code: int = args.action(args)
    return code


def ls(args: argparse.Namespace) -> int:
    """Print a line a file; those that cannot be used say why."""
    rows = [_facts(path) for path in sorted(_files(args.path))]
    if args.json:
        print(json.dumps(rows, indent=2))
        return 0
    if not rows:
        print(f"no file of KV blocks in {args.path}")
    width = max((len(row["name"]) for row in rows), default=0)
    for row in rows:
        print(f"{row['name']:<{width}}  {row.get('error') or _summary(row)}")
    return 0


def info(args: argparse.Namespace) -> int:
    """Print what a file holds."""
    facts = _facts(args.path, reraise=True)
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    layout = facts["layout"]
    heads = f"{layout['n_layers']} layers x {layout['n_kv_heads']} KV heads x {layout['head_dim']}"
    stored = facts["quantisation"] or {"k_type": layout["k_dtype"], "v_type": layout["v_dtype"]}
    lines = {
        "file": f"{args.path}, {format_bytes(facts['nbytes'])}, saved {facts['saved']}",
        "blocks": f"{facts['n_blocks']} of {facts['block_tokens']} tokens: {facts['n_tokens']}",
        "prompts": f"{facts['n_prompts']} that end apart, {facts['n_beginnings']} that begin apart",
        "longest": f"{facts['longest_tokens']} tokens",
        "rows": f"{heads}, {layout['k_dtype']} and {layout['v_dtype']}",
        "stored as": f"K {stored['k_type']}, V {stored['v_type']}",
        "block": f"{format_bytes(facts['block_bytes'])} of rows",
    }
    for label, text in lines.items():
        print(f"{label:<10} {text}")
    return 0


def verify(args: argparse.Namespace) -> int:
    """Read all blocks; 1 if one is damaged."""
    n_damaged = 0
    with _open(args.path) as file:
        n_blocks = file.header.n_blocks
        piece = memoryview(bytearray(file.header.block_bytes))
        started = told = time.monotonic()
        for block in range(n_blocks):
            try:
                file.read(block, [piece])
            except CacheFileError as error:
                n_damaged += 1
                print(error)
            now = time.monotonic()
            if now - told > SHOW_AFTER_S and sys.stderr.isatty():
                told = now
                rate = (block + 1) * file.header.block_bytes / (now - started)
                text = f"{block + 1} of {n_blocks} blocks, {format_bytes(int(rate))}/s"
                print(f"\r{text:<60}", end="", file=sys.stderr, flush=True)
        if told != started:
            print(file=sys.stderr)
    if n_damaged:
        print(f"{args.path}: {n_damaged} of {n_blocks} blocks are damaged; load it with")
        print("KVCache.load(path, on_error='skip') to use the others")
        return 1
    print(f"{args.path}: all {n_blocks} blocks are as they were saved")
    return 0


def rm(args: argparse.Namespace) -> int:
    """Remove a file that begins as one of KV blocks does, whole or not."""
    from pagealloc.kv.cache_file import is_cache_file

    if not is_cache_file(args.path):
        raise CommandError(f"{args.path} is no file of KV blocks: it stays")
    args.path.unlink()
    return 0


def _files(folder: Path) -> "Iterator[Path]":
    from pagealloc.kv.cache_file import is_cache_file

    if not folder.is_dir():
        raise CommandError(f"{folder} is no folder; for one file there is `pagealloc cache info`")
    return (path for path in folder.iterdir() if is_cache_file(path))


def _open(path: Path) -> "CacheFile":
    from pagealloc.kv.cache_file import CacheFile

    try:
        return CacheFile(path)
    except ImportError as error:
        raise CommandError(str(error)) from error


def _facts(path: Path, *, reraise: bool = False) -> dict[str, Any]:
    """Return what a file says of itself, or why it cannot be used."""
    try:
        with _open(path) as file:
            header, parents = file.header, file.parents()
            depths: list[int] = []
            for parent in parents:
                depths.append(1 if parent < 0 else depths[parent] + 1)
            return {
                "name": path.name,
                "nbytes": file.nbytes,
                "saved": time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime)),
                "n_blocks": header.n_blocks,
                "block_tokens": header.block_tokens,
                "block_bytes": header.block_bytes,
                "n_tokens": header.n_blocks * header.block_tokens,
                "n_prompts": len(set(range(header.n_blocks)) - set(parents)),
                "n_beginnings": parents.count(-1),
                "longest_tokens": max(depths, default=0) * header.block_tokens,
                "layout": file.description.get("layout"),
                "quantisation": file.description.get("quantisation"),
            }
    except CacheFileError as error:
        if reraise:
            raise
        return {"name": path.name, "error": str(error).removeprefix(f"{path}: ")}


def _summary(facts: dict[str, Any]) -> str:
    return (
        f"{format_bytes(facts['nbytes']):>10}  {facts['n_blocks']} blocks, "
        f"{facts['n_prompts']} prompts, the longest of {facts['longest_tokens']} tokens, "
        f"saved {facts['saved']}"
    )
