"""One run of ``pagealloc report``: the steps, and the files that tell of them."""

import json
import platform
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pagealloc import huge_page_size_bytes
from pagealloc.demo.attribution import Attribution, attribute
from pagealloc.demo.attribution_chart import draw_waterfalls
from pagealloc.demo.attribution_json import attribution_json
from pagealloc.demo.attribution_markdown import attribution_markdown, summary_table
from pagealloc.demo.attribution_progress import make_progress
from pagealloc.demo.attribution_steps import why_no_huge_pages
from pagealloc.demo.conversations import QUESTIONS
from pagealloc.demo.errors import require_extra
from pagealloc.demo.job import SideJob
from pagealloc.demo.measure import describe_machine
from pagealloc.demo.session import (
    TOKENS_DIFFER,
    TOKENS_IDENTICAL,
    DemoOptions,
    OpenModel,
    make_job,
    open_model,
    refuse_unwritable,
    refuse_what_does_not_fit,
)
from pagealloc.observe.system_report import read_system_report

__all__ = ["ReportOptions", "run_report"]

N_BATCHES, N_QUICK_BATCHES = 200, 20


@dataclass(frozen=True)
class ReportOptions:
    """What the command line asks for."""

    work: DemoOptions
    folder: Path
    n_rounds: int
    command: str  # repeats the run
    prints_json: bool = False


def run_report(options: ReportOptions) -> int:
    """Take every step, write report.md, report.json and the pictures.

    Returns
    -------
    int
        0, or 3 if a step that stores float16 generated other tokens than the reference.

    Raises
    ------
    DemoError
        A package of the extra ``demo`` is missing; there is no model, no memory for the reference,
        or no right to write; or a process failed.
    """
    require_extra("matplotlib.figure")  # not after minutes of work
    options.folder.mkdir(parents=True, exist_ok=True)
    refuse_unwritable(options.folder / "report.json")
    work = options.work
    with open_model(work) as model:
        questions = [QUESTIONS[i % len(QUESTIONS)] for i in range(work.n_conversations)]
        n_ctx = min(work.n_ctx, model.shape.max_tokens)
        refuse_what_does_not_fit(model.shape, len(questions) * n_ctx)
        job = make_job(model, work, questions, n_ctx)
        with make_progress(options.n_rounds) as progress:
            attribution = attribute(
                job,
                model.shape,
                progress,
                n_rounds=options.n_rounds,
                n_batches=N_QUICK_BATCHES if work.quick else N_BATCHES,
                no_huge_pages=why_no_huge_pages(),
            )
        facts = _facts(options, model, job)
    subtitle = (
        f"{facts['model']['name']}, {len(questions)} conversations, context {n_ctx:,}; percent "
        f"points of the first bar; {facts['machine']['cpu']}"
    )
    written = _write(options, attribution, facts, subtitle)
    if options.prints_json:
        print((options.folder / "report.json").read_text(encoding="utf-8"), end="")
    else:
        print(summary_table(attribution))
        for path in written:
            print(f"wrote {path}")
    return TOKENS_DIFFER if attribution.has_failed else TOKENS_IDENTICAL


def _write(
    options: ReportOptions, attribution: Attribution, facts: dict[str, Any], subtitle: str
) -> list[Path]:
    pictures = draw_waterfalls(attribution, options.folder, subtitle)
    markdown, figures = options.folder / "report.md", options.folder / "report.json"
    text = attribution_markdown(
        attribution,
        facts=facts,
        n_rounds=options.n_rounds,
        pictures=[path.name for path in pictures],
    )
    markdown.write_text(text, encoding="utf-8")
    told = attribution_json(attribution) | facts
    figures.write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return [markdown, figures, *pictures]


def _facts(options: ReportOptions, model: OpenModel, job: SideJob) -> dict[str, Any]:
    """Return what a reader needs to know to repeat the measurement."""
    machine = describe_machine()
    shmem = read_system_report().shmem_enabled
    versions = {
        "pagealloc": version("pagealloc"),
        "Python": machine.pop("python"),
        "NumPy": machine.pop("numpy"),
        "libc": " ".join(platform.libc_ver()),
    }
    return {
        "command": options.command,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": {
            "n_cpus": machine.pop("cpus"),
            **machine,
            "huge_page_bytes": huge_page_size_bytes(),
            "shmem_huge_pages": "none" if shmem is None else shmem.value,
            "versions": versions,
        },
        "model": {
            "name": model.path.stem,  # as the demo calls it
            "file": model.path.name,
            "kv_token_bytes": model.shape.kv_token_bytes,
        },
        "settings": {
            "n_rounds": options.n_rounds,
            "n_conversations": len(job.question_ids),
            "n_ctx_tokens": job.n_ctx,
            "n_prompt_tokens": len(job.system_ids),
            "n_max_new_tokens": job.max_new_tokens,
            "random_seed": job.seed,
        },
    }
