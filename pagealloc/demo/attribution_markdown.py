"""report.md: the tables, what each step is, how it was measured, on which machine."""

from collections.abc import Callable, Iterable
from typing import Any

from pagealloc.demo.attribution import FIGURES, Attribution, TakenStep, share_of_same_tokens
from pagealloc.demo.attribution_chart import CHARTS
from pagealloc.demo.attribution_steps import HUGE_PAGES
from pagealloc.demo.report import THP_NOTE, write_percent, write_points
from pagealloc.units import format_bytes

__all__ = ["attribution_markdown", "summary_table"]

METHOD = """\
- Every step does the same work: the same conversations, token for token, on the same model; all
  stay alive until the figures are read. Each step runs in processes of its own.
- **KV memory held** is physical: the pages of the cache's memory file (`st_blocks`), or the
  resident pages of the preallocated arrays (pagemap), and the growth of the page tables. "In huge
  pages" counts a shared one once for each conversation that maps it.
- **Page faults** are minor and major ones of the whole process (getrusage), from the moment the
  weights are loaded: at start-up until all caches are made, at first inference from there until
  every conversation has its first token. The engine's own faults are in them, at every step. The
  preallocated arrays lie on ordinary pages, as llama.cpp's do; arrays of NumPy's own ask for huge
  pages where THP is 'madvise', and would take a fault for 2 MiB instead of one a page.
- **Allocation P99** is that of single calls of `np.empty` for a block of 16 tokens as the step
  stores them, in batches of 1 to 32 requests of 256 + 64 tokens, by NumPy's malloc or by pagealloc
  under NumPy. Blocks of fewer bits are smaller ones; "malloc, same blocks" is the P99 of malloc for
  these. What a first write costs is not in it, but in the faults.
- **pp**, percent points, are the difference from the step before, in percent of the first step;
  they add up to the total. **The order matters**: a step is judged on top of those before it, and
  another order gives the same total in other shares.
- **Same tokens** is the share of the answers' tokens before the first that differs from float16's.
  What quantised rows cost in perplexity, `pagealloc demo --kv q4_0` measures."""


def attribution_markdown(
    attribution: Attribution,
    *,
    facts: dict[str, Any],
    n_rounds: int,
    pictures: Iterable[str],
) -> str:
    """Return report.md.

    Parameters
    ----------
    attribution : Attribution
        What was measured.
    facts : dict
        What report.json says of the run: command, date, machine, model, settings.
    n_rounds : int
        How often.
    pictures : iterable of str
        Names of the PNGs beside the file; those that are not there are not shown.
    """
    there, settings, machine = set(pictures), facts["settings"], facts["machine"]
    thp = machine["transparent_huge_pages"]
    rounds = f"medians of {n_rounds} rounds" if n_rounds > 1 else "one round"
    work = (
        f"{settings['n_conversations']} conversations share a prompt of "
        f"{settings['n_prompt_tokens']:,} tokens; context {settings['n_ctx_tokens']:,} tokens, "
        f"answers of up to {settings['n_max_new_tokens']}"
    )
    sections = [
        "# Where each percent came from",
        f"{facts['model']['name']}: {work}; {rounds}.",
        summary_table(attribution),
        *(f"**{each.step.title} is not available here**: {_why(each)}"
          for each in attribution.steps if each.unavailable is not None),
        *_remarks(attribution),
        "## KV memory",
        *_picture(there, "kv_bytes"),
        _kv_table(attribution),
        "## Page faults",
        *_picture(there, "n_faults"),
        _fault_table(attribution),
        *([THP_NOTE.removeprefix("(2) ")] if "[always]" in thp else []),
        "## Allocation P99",
        *_picture(there, "alloc_p99_ns"),
        _allocation_table(attribution),
        "## The steps",
        "\n".join(f"- **{each.step.title}**: {each.step.what}" for each in attribution.steps),
        "## How it was measured",
        METHOD,
        "## The machine",
        "\n".join(f"- {name}: {value}" for name, value in _machine_lines(facts)),
        f"```console\n$ {facts['command']}\n```",
    ]  # fmt: skip
    return "\n\n".join(sections) + "\n"


def summary_table(attribution: Attribution) -> str:
    """Return the table of all steps: each figure, and the percent points it came by."""
    reference = attribution.steps[0].token_ids

    def cells(taken: TakenStep) -> list[str]:
        same = 100 * share_of_same_tokens(reference, taken.token_ids)
        return [*_pairs(attribution, taken, SUMMARY), f"{same:.0f} %"]

    header = ["KV memory held", "pp", "page faults", "pp", "alloc P99", "pp",
              "same tokens"]  # fmt: skip
    totals, claims = (
        [cell for key, _ in SUMMARY for cell in ("", f"**{write_percent(percents[key])}**")]
        for percents in (
            {key: attribution.total_percent(key) for key, _ in SUMMARY},
            CLAIMS,
        )
    )
    rows = [*_rows(attribution, cells, len(header))]
    return _table(
        ["step", *header],
        [*rows, ["**all steps**", *totals, ""], ["reference's claim", *claims, ""]],
    )


def _remarks(attribution: Attribution) -> list[str]:
    """Say what a reader would else have to work out, or might miss."""
    said = [
        f"{each.step.title}: the machine has them, but here no window of a conversation holds a "
        "whole one of committed rows of its own, so none was made. Longer conversations have them."
        for each in attribution.taken
        if each.step.key == HUGE_PAGES and each.huge_bytes == 0
    ]
    if attribution.has_failed:
        said.append("**A step that stores float16 gave other tokens than the reference: a bug.**")
    return said


def _kv_table(attribution: Attribution) -> str:
    def cells(taken: TakenStep) -> list[str]:
        huge = "" if taken.huge_bytes is None else format_bytes(taken.huge_bytes)
        tables = format_bytes(taken.runs[-1].side.page_table_bytes)
        change = _of_step_before(attribution, taken, "kv_bytes")
        return [*_pairs(attribution, taken, SUMMARY[:1]), change, tables, huge]

    header = ["held", "pp", "of the step before", "page tables", "in huge pages"]
    return _table(["step", *header], _rows(attribution, cells, len(header)))


def _fault_table(attribution: Attribution) -> str:
    keys = [(key, _count) for key in ("n_faults_startup", "n_faults_first_inference", "n_faults")]

    def cells(taken: TakenStep) -> list[str]:
        change = _of_step_before(attribution, taken, "n_faults")
        return [*_pairs(attribution, taken, keys), change]

    header = ["start-up", "pp", "first inference", "pp", "together", "pp",
              "of the step before"]  # fmt: skip
    return _table(["step", *header], _rows(attribution, cells, len(header)))


def _allocation_table(attribution: Attribution) -> str:
    def cells(taken: TakenStep) -> list[str]:
        allocations, values_ns = taken.runs[-1].allocations, taken.values("alloc_p99_ns")
        return [
            format_bytes(allocations.block_bytes),
            _count(allocations.n_allocations),
            _time(taken.value("alloc_p50_ns")),
            *_pairs(attribution, taken, SUMMARY[2:]),
            _of_step_before(attribution, taken, "alloc_p99_ns"),
            _time(taken.value("malloc_p99_ns")),
            " to ".join(_time(each) for each in sorted({min(values_ns), max(values_ns)})),
        ]

    header = [
        "block",
        "calls",
        "P50",
        "P99",
        "pp",
        "of the step before",
        "malloc, same blocks",
        "P99 by round",
    ]
    return _table(["step", *header], _rows(attribution, cells, len(header)))


# --- cells ---


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _bytes(value: float) -> str:
    return format_bytes(int(value))


def _time(value_ns: float) -> str:
    return f"{value_ns:.0f} ns" if value_ns < 1000 else f"{value_ns / 1000:.2f} µs"


Write = Callable[[float], str]

SUMMARY: list[tuple[str, Write]] = [
    ("kv_bytes", _bytes),
    ("n_faults", _count),
    ("alloc_p99_ns", _time),
]
CLAIMS = {each.key: each.reference_percent for each in FIGURES if each.reference_percent}


def _pairs(
    attribution: Attribution, taken: TakenStep, keys: Iterable[tuple[str, Write]]
) -> list[str]:
    """Return a value and its percent points for each key; the first step has no points."""
    index = attribution.taken.index(taken)
    found = []
    for key, write in keys:
        points = write_points(attribution.percent_points(key)[index]) if index else ""
        found += [write(taken.value(key)), points]
    return found


def _of_step_before(attribution: Attribution, taken: TakenStep, key: str) -> str:
    index = attribution.taken.index(taken)
    if index == 0:
        return ""
    before = attribution.taken[index - 1].value(key)
    return write_percent(100.0 * (taken.value(key) - before) / before) if before else ""


def _rows(
    attribution: Attribution, cells: Callable[[TakenStep], list[str]], n_cells: int
) -> list[list[str]]:
    nothing = ["not available here", *[""] * (n_cells - 1)]
    return [
        [each.step.title, *(cells(each) if each.runs else nothing)] for each in attribution.steps
    ]


def _table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table; all columns but the first to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _picture(there: set[str], key: str) -> list[str]:
    file_name, title, *_ = CHARTS[key]
    return [f"![{title}]({file_name})"] if file_name in there else []


def _why(taken: TakenStep) -> str:
    if taken.unavailable is None:
        return ""
    return f"{taken.unavailable.reason}. To change that: `{taken.unavailable.command}`"


def _machine_lines(facts: dict[str, Any]) -> list[tuple[str, Any]]:
    machine = facts["machine"]
    versions = (f"{name} {version}" for name, version in machine["versions"].items())
    return [
        ("CPU", f"{machine['cpu']}, {machine['n_cpus']} of them usable"),
        ("memory", format_bytes(machine["memory_bytes"])),
        ("kernel", machine["kernel"]),
        ("page", format_bytes(machine["page_bytes"])),
        ("huge page", format_bytes(machine["huge_page_bytes"])),
        ("transparent huge pages", f"`{machine['transparent_huge_pages']}`"),
        ("for shared memory", f"`{machine['shmem_huge_pages']}`"),
        ("versions", ", ".join(versions)),
        ("date", facts["date"]),
    ]
