"""A room imports only rooms on lower floors.

The floors of the core stand once, in the docstring of ``pagealloc/core/__init__.py``; this reads
them, and the import and cimport lines of every source file.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent

SUFFIXES = (".py", ".pyx", ".pxd", ".pyi")

# The areas of the package, bottom up; "" is `pagealloc` itself, the public names.  An area imports
# from those before it and from itself; areas in one row do not know each other.
AREAS = (
    ("errors", "units", "options", "slow_events"),
    ("core",),
    ("",),
    ("kv",),
    ("llama", "observe"),
    ("demo",),
    ("cli",),
    ("__main__",),
)
HEIGHTS = {area: height for height, row in enumerate(AREAS) for area in row}


@dataclass(frozen=True)
class Import:
    """One import or cimport: in which file, of which module of pagealloc's."""

    path: Path
    line: int
    importer: str
    """Dotted name below pagealloc, such as ``core.arena``; empty is pagealloc itself."""
    imported: str
    is_star: bool = False
    is_for_types: bool = False
    """Only a type checker follows it: the floors bind it, circles do not come of it."""

    def __str__(self) -> str:
        name = "pagealloc." + self.imported if self.imported else "pagealloc"
        return f"{self.path.name}:{self.line} imports {name}"


# --- reading ---


def read_floors(package: Path) -> dict[str, int]:
    """Return the floor of each room of the core: lines such as ``    3  arena   reserves ...``."""
    tree = ast.parse((package / "core/__init__.py").read_text())
    docstring = ast.get_docstring(tree, clean=False) or ""
    rows = re.findall(r"^ {4}(\d+)  (\w+) {2,}\S", docstring, re.MULTILINE)
    return {room: int(floor) for floor, room in rows}


def sources(package: Path) -> list[Path]:
    return sorted(path for path in package.rglob("*") if path.suffix in SUFFIXES)


def module_name(package: Path, path: Path) -> str:
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def read_imports(package: Path, path: Path) -> Iterator[Import]:
    """Yield what a file imports of pagealloc, at whatever depth."""
    importer = module_name(package, path)
    folder = "pagealloc." + ".".join(path.relative_to(package).parent.parts)
    text = path.read_text()
    type_lines = {
        line
        for found in re.finditer(r"^if TYPE_CHECKING:\n(?:(?:[ \t]+.*)?\n)+", text, re.MULTILINE)
        for line in range(*(text.count("\n", 0, end) + 1 for end in found.span()))
    }
    for line, written, names in statements(text):
        base = written
        if level := len(written) - len(written.lstrip(".")):
            parts = folder.strip(".").split(".")
            base = ".".join([*parts[: len(parts) - level + 1], written[level:]]).strip(".")
        if base != "pagealloc" and not base.startswith("pagealloc."):
            continue
        for name in names or [""]:
            # `from pagealloc.core import arena` imports the room; `... import Buffer` a name.
            full = f"{base}.{name}"[len("pagealloc.") :] if is_module(package, base, name) else None
            target = full if full is not None else base[len("pagealloc.") :]
            yield Import(path, line, importer, target, name == "*", line in type_lines)


def is_module(package: Path, base: str, name: str) -> bool:
    stem = package.joinpath(*base.split(".")[1:], name)
    return bool(name.strip("*")) and (
        stem.is_dir() or any(stem.with_suffix(suffix).exists() for suffix in SUFFIXES)
    )


def statements(text: str) -> Iterator[tuple[int, str, list[str]]]:
    """Yield (line, module, names) of each statement that imports; Cython is no Python to ast."""
    # Keep the line count, lose what strings and comments say.
    text = re.sub(r'"""[\s\S]*?"""|#.*', lambda found: "\n" * found[0].count("\n"), text)
    for found in re.finditer(
        r"^[ \t]*from[ \t]+([\w.]+)[ \t]+c?import[ \t]+(\([^)]*\)|.+)$", text, re.MULTILINE
    ):
        names = re.sub(r"[()\s]+", " ", found[2]).split(",")
        line = text.count("\n", 0, found.start()) + 1
        yield line, found[1], [name.split()[0] for name in names if name.strip()]
    for found in re.finditer(r"^[ \t]*c?import[ \t]+([\w.]+.*)$", text, re.MULTILINE):
        for module in found[1].split(","):
            yield text.count("\n", 0, found.start()) + 1, module.split()[0], []


# --- judging ---


def broken_rules(package: Path) -> list[str]:
    """Return what is wrong with the package, a sentence each."""
    floors = read_floors(package)
    imports = [one for path in sources(package) for one in read_imports(package, path)]
    found = [complaint for one in imports if (complaint := judge(one, floors))]
    found += [f"{one}: a star hides what is used" for one in imports if one.is_star]
    rooms = {path.stem for path in sources(package / "core")} - {"__init__"}
    found += [f"core/{room} stands on no floor" for room in sorted(rooms - floors.keys())]
    found += [f"the floors name {room}, which is not there" for room in floors.keys() - rooms]
    for path in sources(package):
        if path.stem in ("util", "utils"):
            found.append(f"{path.name}: what is it about?")
        if re.search(r"^\s*include\s+['\"]", path.read_text(), re.MULTILINE):
            found.append(f"{path.name}: includes a file")
    return list(dict.fromkeys(found + circles(imports)))


def judge(one: Import, floors: dict[str, int]) -> str | None:
    importer_area, _, importer_room = one.importer.partition(".")
    imported_area, _, imported_room = one.imported.partition(".")
    for area in (importer_area, imported_area):
        if area not in HEIGHTS:
            return f"{one}: pagealloc/{area} has no place in the house"
    if importer_area == "core" == imported_area:
        if importer_room == imported_room:
            return None
        if not imported_room:
            return f"{one}: a room of the core imports the whole core"
        if importer_room and not floors.get(importer_room, -1) > floors.get(imported_room, 99):
            return f"{one}, which is on no lower floor"
        return None
    if importer_area == imported_area or HEIGHTS[importer_area] == HEIGHTS[imported_area] == 0:
        return None
    if HEIGHTS[importer_area] <= HEIGHTS[imported_area]:
        return f"{one}, which lies above or beside it"
    if importer_area == "kv" and imported_area == "core" and imported_room:
        return f"{one}: kv uses the public names of the core alone"
    return None


def circles(imports: list[Import]) -> list[str]:
    """Return one sentence for each circle that a walk along the imports runs into."""
    graph: dict[str, set[str]] = {}
    for one in imports:
        if one.importer != one.imported and not one.is_for_types:
            graph.setdefault(one.importer, set()).add(one.imported)
    found: list[str] = []
    finished: set[str] = set()

    def walk(module: str, trail: list[str]) -> None:
        if module in trail:
            circle = [*trail[trail.index(module) :], module]
            found.append("a circle: " + " -> ".join(name or "pagealloc" for name in circle))
            return
        if module in finished:
            return
        for imported in sorted(graph.get(module, ())):
            walk(imported, [*trail, module])
        finished.add(module)

    for module in sorted(graph):
        walk(module, [])
    return found


# --- the house ---


def test_the_house_stands():
    found = broken_rules(ROOT / "pagealloc")
    assert not found, "\n".join(found)


def test_the_house_was_looked_at():
    package = ROOT / "pagealloc"
    floors = read_floors(package)
    assert floors["os_memory"] < floors["arena"] < floors["buffer"]
    imports = [one for path in sources(package) for one in read_imports(package, path)]
    assert any(one.importer == "core.arena" for one in imports)
    assert any(one.path.suffix == ".pxd" for one in imports)


# --- houses that do not stand ---

SOUND = {
    "__init__.py": "from pagealloc.core.buffer import Buffer\n",
    "errors.py": "",
    "units.py": "from pagealloc.errors import PageallocError\n",
    "core/__init__.py": '''"""Rooms::

    1  os_memory  the OS
    3  arena      ranges
    7  buffer     handle
"""
''',
    "core/os_memory.pyx": "import os\nfrom libc.errno cimport errno\n",
    "core/os_memory.pxd": "",
    "core/arena.pyx": "from pagealloc.core.os_memory cimport (\n    os_reserve,  # a comment\n)\n",
    "core/buffer.pyx": (
        "from pagealloc.core cimport arena\nfrom pagealloc.errors import PageallocError\n"
        '"""\nfrom pagealloc.kv import words_in_a_docstring\n"""\n'
    ),
    "kv/__init__.py": "from pagealloc.kv.layout import KVLayout\n",
    "kv/layout.py": "from pagealloc import Buffer\n",
    "kv/cache.py": "from pagealloc.kv.view import View\n",
    "kv/view.py": (
        "from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    import numpy\n\n"
        "    from pagealloc.kv.cache import KVCache\n\nx = 1\n"
    ),
    "cli/main.py": "def run():\n    import pagealloc.kv\n",
}


def build(folder: Path, files: dict[str, str]) -> Path:
    package = folder / "pagealloc"
    for name, text in files.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return package


def test_a_sound_house(tmp_path):
    assert broken_rules(build(tmp_path, SOUND)) == []


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("core/os_memory.pyx", "from pagealloc.core.arena cimport x\n", "on no lower floor"),
        ("core/os_memory.pxd", "cimport pagealloc.core.arena\n", "on no lower floor"),
        ("core/os_memory.pyx", "from .arena cimport x\n", "on no lower floor"),
        ("core/os_memory.pyx", "from . cimport arena as a\n", "on no lower floor"),
        ("core/os_memory.pyx", "from pagealloc.core cimport (\n  arena,\n)\n", "on no lower floor"),
        ("core/os_memory.pyx", "def f():\n    import pagealloc.core.arena\n", "on no lower floor"),
        ("core/arena.pyx", "from pagealloc.kv import KVLayout\n", "above or beside"),
        ("core/arena.pyx", "from pagealloc import Buffer\n", "above or beside"),
        ("core/arena.pyx", "from pagealloc.core import Buffer\n", "the whole core"),
        ("errors.py", "from pagealloc.core.arena import x\n", "above or beside"),
        ("__init__.py", "import pagealloc.kv\n", "above or beside"),
        ("kv/layout.py", "from pagealloc.core.arena import x\n", "the public names"),
        ("kv/layout.py", "from pagealloc.cli import main\n", "above or beside"),
        ("kv/layout.py", "from pagealloc.core import *\n", "a star"),
        ("kv/layout.py", "from pagealloc.kv import block\n", "a circle"),
        ("errors.py", "from pagealloc.units import parse_bytes\n", "a circle"),
        ("kv/view.py", "from pagealloc.kv.cache import KVCache\n", "a circle"),
        ("kv/view.py", "if TYPE_CHECKING:\n    import pagealloc.cli\n", "above or beside"),
        ("core/secret.pyx", "", "stands on no floor"),
        ("core/arena.pxd", "include 'more.pxi'\n", "includes a file"),
        ("kv/utils.py", "", "what is it about"),
        ("attic/box.py", "import pagealloc\n", "no place in the house"),
    ],
)
def test_a_planted_fault_is_found(tmp_path, name, text, complaint):
    found = broken_rules(build(tmp_path, SOUND | {name: text}))
    assert any(complaint in sentence for sentence in found), found


def test_a_room_that_went_is_missed(tmp_path):
    package = build(tmp_path, SOUND)
    (package / "core/arena.pyx").unlink()
    assert "the floors name arena, which is not there" in broken_rules(package)
