"""Whose native code an address is part of, and which of pagealloc's modules a thread is in.

Source
    /proc/self/maps: proc_pid_maps(5).
"""

from __future__ import annotations

import re
from bisect import bisect_right
from pathlib import Path
from typing import TYPE_CHECKING

import pagealloc
from pagealloc.observe.profiles import Frame

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["NativeCode"]

PACKAGE_FOLDER = Path(pagealloc.__file__).resolve().parent
RUNTIME = re.compile(r"/(libc|libm|libpthread|ld-linux|ld-musl|libgcc_s|libasan|libtsan)\b|^\[v")
"""Whoever called these is what a thread is in."""


class NativeCode:
    """The executable mappings of this process, read when asked for one that is not known."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ranges: list[tuple[int, int, str]] = []

    def file_at(self, address: int) -> str | None:
        """Return the file whose code lies at an address; "": no file's; None: it is no code."""
        at = bisect_right(self._starts, address) - 1
        if at >= 0 and address < self._ranges[at][1]:
            return self._ranges[at][2]
        return None

    def refresh(self) -> None:
        """Read the mappings anew."""
        found = []
        for line in Path("/proc/self/maps").read_text("utf-8", "replace").splitlines():
            fields = line.split(maxsplit=5)
            if "x" in fields[1]:  # of a file, or made by a JIT compiler
                start, end = (int(part, 16) for part in fields[0].split("-"))
                found.append((start, end, fields[5] if len(fields) == 6 else ""))
        self._ranges = found
        self._starts = [start for start, *_ in found]

    def pagealloc_frame(self, addresses: Sequence[int]) -> Frame | None:
        """Return the module of pagealloc's that a thread is in; None: it is elsewhere.

        Parameters
        ----------
        addresses : sequence of int
            Where the thread is, and the words from its stack pointer on: of these the first that is
            code, other than the C library's, is where it came from.
        """
        if addresses and self.file_at(addresses[0]) is None:
            self.refresh()  # a library was loaded meanwhile
        for address in addresses:
            file = self.file_at(address)
            if file is None or RUNTIME.search(file):
                continue
            path = Path(file)
            if not path.is_relative_to(PACKAGE_FOLDER):
                return None
            parts = path.relative_to(PACKAGE_FOLDER.parent).with_suffix("").parts
            return Frame(".".join(parts).partition(".cpython")[0], file)
        return None
