"""The demo's one table, as rows of text; how they are drawn is the display's business."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from pagealloc.demo.comparison import REFERENCE_PERCENT, Comparison
from pagealloc.demo.job import SideResult
from pagealloc.demo.perplexity import Quality
from pagealloc.units import format_bytes

__all__ = [
    "COLUMNS",
    "Row",
    "footnotes",
    "quality_line",
    "table_rows",
    "verdict",
    "write_percent",
    "write_points",
]

MINUS = "\u2212"

COLUMNS = ("", "baseline", "pagealloc", "change", "reference")

FOOTNOTES = (
    "(1) Physical memory, page tables included, with all conversations alive.",
    (
        "(2) Minor and major faults from the moment the weights are loaded until the last "
        "conversation has its first token: all caches created, then every first inference. The "
        "baseline's memory is ordinary pages, as llama.cpp's is; an array of NumPy's own asks for "
        "huge pages where THP is 'madvise', and would take a fault for 2 MiB instead of one a page."
    ),
    (
        "(3) Of the whole process, weights included. RSS counts a shared page once per mapping: "
        "here the pages of the shared prompt, once for each conversation that read them."
    ),
)

THP_NOTE = (
    "(2) Transparent huge pages are 'always' on this machine: one fault brings the baseline 2 MiB "
    "of its cleared cache. The reference's figure is about base pages."
)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    label: str
    baseline: str
    pagealloc: str
    change: str = ""
    reference: str = ""

    def cells(self) -> tuple[str, ...]:
        """Return the row in the order of `COLUMNS`."""
        return (self.label, self.baseline, self.pagealloc, self.change, self.reference)


def table_rows(comparison: Comparison) -> list[Row]:
    """Return the lines of the table."""

    def row(label: str, read: Callable[[SideResult], float], write: Callable[[Any], str]) -> Row:
        return Row(label, write(read(comparison.baseline)), write(read(comparison.pagealloc)))

    def compared(label: str, figure: str, write: Callable[[Any], str]) -> Row:
        plain = row(label, lambda side: float(getattr(side, figure)), write)
        change = write_percent(-comparison.reduction_percent(figure))
        reference = REFERENCE_PERCENT.get(figure)
        return replace(
            plain, change=change, reference="" if reference is None else write_percent(reference)
        )

    return [
        compared("KV memory held (1)", "kv_bytes", _bytes),
        compared("page faults (2)", "faults_total", _count),
        row("  of these at start-up", lambda side: side.faults_startup, _count),
        row("  of these in the first inference", lambda side: side.faults_first_inference, _count),
        compared("peak RSS (3)", "peak_rss_bytes", _bytes),
        row("creating the caches", lambda side: side.startup_s, _seconds),
        row("time to first token, first conversation", lambda s: s.first_token_s[0], _seconds),
        row("time to first token, median of all", lambda s: median(s.first_token_s), _seconds),
        row("prompt tokens computed", lambda side: side.prompt_tokens_computed, _count),
        row("tokens/s, decoding", lambda side: side.decode_tokens_per_s, "{:.1f}".format),
    ]


def footnotes(transparent_huge_pages: str) -> tuple[str, ...]:
    """Return what the marks in the table mean on a machine with this THP setting."""
    return (*FOOTNOTES, THP_NOTE) if "[always]" in transparent_huge_pages else FOOTNOTES


def verdict(comparison: Comparison) -> str:
    """Say in one sentence whether both sides gave the same text."""
    same = comparison.tokens_identical
    if all(same):
        return f"The generated tokens are identical in all {len(same)} conversations."
    if comparison.is_quantised:
        return (
            f"The generated tokens are identical in {sum(same)} of {len(same)} conversations: "
            "rows are rounded, and where two tokens were nearly as likely the other may be chosen."
        )
    different = [str(index + 1) for index, is_same in enumerate(same) if not is_same]
    return f"THE GENERATED TOKENS DIFFER in conversation {', '.join(different)} of {len(same)}."


def quality_line(kv: str, quality: Quality, n_texts: int, n_tokens: int) -> str:
    """Say in one sentence what storing rows like this costs."""
    return (
        f"{n_texts} texts of {n_tokens} tokens, every row stored as --kv {kv} says: perplexity "
        f"{quality.perplexity:.4g}, {write_percent(quality.change_percent, 2)} against float16's "
        f"{quality.float16_perplexity:.4g}; mean KL divergence {quality.mean_kl:.4f} nats; the "
        f"likeliest next token is the same in {quality.same_top_percent:.1f} %."
    )


def write_percent(change: float, n_digits: int = 1) -> str:
    """Return a change in percent with its sign."""
    return f"{change:+.{n_digits}f} %".replace("-", MINUS)


def write_points(change: float, n_digits: int = 1) -> str:
    """Return percent points with their sign; what rounds to nothing is +0.0."""
    return f"{round(change, n_digits) + 0.0:+.{n_digits}f}".replace("-", MINUS)


def _bytes(value: float) -> str:
    return format_bytes(int(value))


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms"
