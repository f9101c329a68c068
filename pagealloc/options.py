"""Every tunable of pagealloc, in one table.

Floor 0.  The default allocator, documentation and the command line read this table; an environment
variable overrides a default.  What a program makes itself, it sets up by arguments.
"""

import os
from dataclasses import dataclass

__all__ = ["OPTIONS", "Option", "option_value"]


@dataclass(frozen=True, slots=True)
class Option:
    """One tunable: its name, default (as text), unit, environment variable, and meaning."""

    name: str
    default: str | None
    unit: str
    env: str
    meaning: str


OPTIONS = {
    option.name: option
    for option in (
        Option(
            "backing",
            "auto",
            "auto, hugetlb, thp or base",
            "PAGEALLOC_BACKING",
            "What stands behind the arenas of the default allocator.",
        ),
        Option(
            "arena_bytes",
            "64MiB",
            "bytes",
            "PAGEALLOC_ARENA_BYTES",
            "Address space the default allocator reserves at a time.",
        ),
        Option(
            "budget_bytes",
            None,
            "bytes",
            "PAGEALLOC_BUDGET_BYTES",
            "Hard limit of the default allocator's memory; unset: none.",
        ),
        Option(
            "purge_after_s",
            "0.5",
            "seconds, or never",
            "PAGEALLOC_PURGE_AFTER_S",
            "How long memory of the default allocator lies idle before it goes back by itself.",
        ),
        Option(
            "trace",
            "0",
            "0 or 1",
            "PAGEALLOC_TRACE",
            "1: a line on stderr for each arena reserved, purge and collection, of all allocators.",
        ),
        Option(
            "leaks",
            "0",
            "0, or one allocation in how many",
            "PAGEALLOC_LEAKS",
            "Report on stderr at exit what is live, and where it was allocated; 1: all of it.",
        ),
        Option(
            "simd",
            "auto",
            "auto, plain, avx2 or avx512",
            "PAGEALLOC_SIMD",
            "Which loops pack and unpack quantised KV rows; auto: the best the processor can run.",
        ),
        Option(
            "page_bytes",
            None,
            "bytes",
            "PAGEALLOC_PAGE_BYTES",
            "For tests: work in pages larger than the machine's; unset: the machine's.",
        ),
        Option(
            "huge_page_bytes",
            None,
            "bytes",
            "PAGEALLOC_HUGE_PAGE_BYTES",
            "For tests: take huge pages to be larger than the machine's; unset: the machine's.",
        ),
        Option(
            "barrier",
            "1",
            "0 or 1",
            "PAGEALLOC_BARRIER",
            "For tests: 0 does without membarrier, as where the kernel has none.",
        ),
    )
}


def option_value(name: str) -> str | None:
    """Return an option's value: its environment variable if set and not empty, else its default.

    Raises
    ------
    KeyError
        There is no such option.
    """
    option = OPTIONS[name]
    return os.environ.get(option.env) or option.default
