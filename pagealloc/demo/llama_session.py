"""One run of ``pagealloc demo --engine llama``: llama.cpp's prompt cache and KV buffer; ours."""

from __future__ import annotations

import json
from dataclasses import asdict
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from pagealloc.demo.conversations import QUESTIONS
from pagealloc.demo.display import make_display
from pagealloc.demo.english_texts import TEXTS
from pagealloc.demo.errors import DemoError, require_extra
from pagealloc.demo.llama_chart import draw_llama_chart
from pagealloc.demo.llama_side import QUALITY_TOKENS, LlamaJob, run_llama_side
from pagealloc.demo.measure import describe_machine
from pagealloc.demo.report import write_percent
from pagealloc.demo.session import (
    TOKENS_DIFFER,
    TOKENS_IDENTICAL,
    open_model,
    refuse_long_prompt,
    refuse_unwritable,
    system_prompt,
)
from pagealloc.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from pagealloc.demo.llama_side import LlamaResult
    from pagealloc.demo.session import DemoOptions

__all__ = ["run_llama_comparison"]

SIDES = {
    "stock": "(a) llama.cpp: LlamaRAMCache, and its own KV buffer",
    "f16": "(b) pagealloc: PageCache and kv_memory, rows as they are",
    "K8/V4": "(c) pagealloc: PageCache(quantize=True) and kv_memory",
}
COLUMNS = ("", "LlamaRAMCache", "PageCache", "K8/V4")

FOOTNOTES = (
    "(1) By the cache: states and, of LlamaRAMCache, the logits it keeps with each.",
    "(2) Of the process, which has the model, the context and the cache.",
    "(3) Of the KV buffer; of llama.cpp's, what the process grew when its context was made.",
)


class LlamaRow(NamedTuple):
    """One line of the table."""

    label: str
    figures: Sequence[str]
    reference: str = ""

    def cells(self) -> tuple[str, ...]:
        """Return the row in the order of `COLUMNS`."""
        return (self.label, *self.figures)


def run_llama_comparison(options: DemoOptions) -> int:
    """Run all sides, show and write what they cost.

    Returns
    -------
    int
        0, or 3 if the side that stores rows as they are gave other tokens than llama.cpp alone.

    Raises
    ------
    DemoError
        llama-cpp-python is not installed; or the options ask for what this engine does not do.
    """
    _require_llama_cpp()
    if options.temperature or options.kv is not None:
        raise DemoError(
            "--engine llama is greedy and measures all kinds: no --temperature, no --kv"
        )
    for path in (options.json_path, options.png_path):
        refuse_unwritable(path)
    with open_model(options) as model:
        questions = [QUESTIONS[i % len(QUESTIONS)] for i in range(options.n_conversations)]
        parts = [model.prompt(system_prompt(options), question) for question in questions]
        prompts = [part.system_ids + part.question_ids for part in parts]
        n_ctx = min(options.n_ctx, model.shape.max_tokens)
        refuse_long_prompt(max(map(len, prompts)) + options.max_new_tokens, n_ctx)
        texts = [model.tokenizer.encode(text)[:QUALITY_TOKENS] for text in TEXTS.values()]
        machine, results = describe_machine(), {}
        with make_display(model.tokenizer, questions[0]) as display:
            display.say(
                f"{model.path.stem} in llama.cpp: {len(questions)} conversations, each held twice, "
                f"share a system prompt of {len(parts[0].system_ids):,} tokens; context {n_ctx:,}"
            )
            for side, title in SIDES.items():
                display.say(title)
                results[side] = run_llama_side(
                    LlamaJob(
                        side,  # type: ignore[arg-type]
                        str(model.path),
                        n_ctx,
                        prompts,
                        options.max_new_tokens,
                        options.seed,
                        texts,
                    )
                )
            display.show_table(table_rows(results), COLUMNS)
            is_same = results["stock"].token_ids == results["f16"].token_ids
            for line in (*FOOTNOTES, "", *verdicts(results)):
                display.say(line)
            figures = {
                "engine": "llama",
                "machine": machine,
                "settings": {
                    "model": model.path.name,
                    "conversations": len(questions),
                    "n_ctx": n_ctx,
                    "system_prompt_tokens": len(parts[0].system_ids),
                    "max_new_tokens": options.max_new_tokens,
                    "flash_attn": True,
                },
                "tokens_identical": is_same,
                "sides": {side: asdict(result) for side, result in results.items()},
            }
            options.json_path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
            display.say(f"wrote {options.json_path}")
            subtitle = f"{model.path.stem}, context {n_ctx:,}; {machine['cpu']}"
            try:
                draw_llama_chart(results, options.png_path, subtitle)
                display.say(f"wrote {options.png_path}")
            except DemoError as missing:
                display.say(f"no picture: {missing}")
    return TOKENS_IDENTICAL if is_same else TOKENS_DIFFER


def table_rows(results: Mapping[str, LlamaResult]) -> list[LlamaRow]:
    """Return the lines of the table."""

    def row(
        label: str, read: Callable[[LlamaResult], Any], write: Callable[[Any], str]
    ) -> LlamaRow:
        return LlamaRow(label, [write(read(result)) for result in results.values()])

    return [
        row("prompts held (1)", lambda side: side.held_bytes, format_bytes),
        row("RSS (2)", lambda side: side.rss_bytes, format_bytes),
        row("KV resident, context made (3)", lambda side: side.kv_made_bytes, format_bytes),
        row("  at the end", lambda side: side.kv_used_bytes, format_bytes),
        row("page faults, context made", lambda side: side.faults_at_creation, "{:,}".format),
        row("save, median", lambda side: median(side.save_s), _milliseconds),
        row("load of a known prompt, median", lambda side: median(side.load_s), _milliseconds),
        row("first token, new prompt", lambda side: side.new_first_token_s[0], _milliseconds),
        row(
            "first token, known prompt, median",
            lambda side: median(side.first_token_s),
            _milliseconds,
        ),
    ]


def verdicts(results: Mapping[str, LlamaResult]) -> list[str]:
    """Say in a sentence each whether the text is the same, and what fewer bits cost."""
    stock, plain = results["stock"].token_ids, results["f16"].token_ids
    differ = [
        str(i + 1) for i, (one, other) in enumerate(zip(stock, plain, strict=True)) if one != other
    ]
    lines = ["The tokens of (a) and (b) are identical in all answers."]
    if differ:
        lines = [f"THE TOKENS OF (a) AND (b) DIFFER in answer {', '.join(differ)} of {len(stock)}."]
    quality = results["K8/V4"].quality
    if quality is not None:
        lines.append(
            f"Restored in K8/V4, texts go on with perplexity {quality.perplexity:.4g}, "
            f"{write_percent(quality.change_percent, 2)}; mean KL divergence "
            f"{quality.mean_kl:.4f} nats."
        )
    return lines


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _require_llama_cpp() -> None:
    try:
        require_extra("llama_cpp")
    except DemoError as missing:
        raise DemoError(
            "--engine llama needs llama-cpp-python: pip install 'pagealloc[llama]'"
        ) from missing
