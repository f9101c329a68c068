"""One run of ``pagealloc demo``: the comparison of both sides, or one turn of chat."""

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import psutil

from pagealloc.demo.chart import draw_chart
from pagealloc.demo.chat import ChatPrompt, chat_prompt, find_chat_format
from pagealloc.demo.comparison import Comparison, compare_sides
from pagealloc.demo.conversations import QUESTIONS, SYSTEM_PROMPT
from pagealloc.demo.display import TextStream, make_display
from pagealloc.demo.engine import Llama
from pagealloc.demo.english_texts import TEXT_TOKENS, TEXTS
from pagealloc.demo.errors import DemoError
from pagealloc.demo.generation import Sampler, generate, prefill
from pagealloc.demo.job import SideJob
from pagealloc.demo.kv_stores import PagedKV, every_row, paged_layout
from pagealloc.demo.measure import describe_machine
from pagealloc.demo.model_file import find_model_file
from pagealloc.demo.perplexity import Quality, compare_with_float16, pool
from pagealloc.demo.report import footnotes, quality_line, table_rows, verdict
from pagealloc.demo.tiny_model import write_tiny_model
from pagealloc.demo.tokenizer import Tokenizer
from pagealloc.demo.weights import LlamaShape, open_gguf, read_shape
from pagealloc.kv import KVCache
from pagealloc.kv.quantisation import KV_KINDS
from pagealloc.slow_events import slow_event
from pagealloc.units import format_bytes

__all__ = [
    "TOKENS_DIFFER",
    "TOKENS_IDENTICAL",
    "DemoOptions",
    "OpenModel",
    "make_job",
    "open_model",
    "refuse_long_prompt",
    "refuse_unwritable",
    "refuse_what_does_not_fit",
    "run_comparison",
    "run_prompt",
    "system_prompt",
]

QUICK_SYSTEM_CHARACTERS = 1000
"""The byte vocabulary makes a token of every character."""

CHAT_SYSTEM_PROMPT = "You are a helpful assistant. You answer briefly and clearly."

TOKENS_IDENTICAL, TOKENS_DIFFER = 0, 3

SHOWN_KV = {"f16": "float16", "recommended": "q8_0/q4_0"}


@dataclass(frozen=True)
class DemoOptions:
    """What the command line asks for."""

    model: str | None = None
    quick: bool = False
    n_conversations: int = 8
    n_ctx: int = 8192
    max_new_tokens: int = 48
    temperature: float = 0.0
    seed: int = 0
    kv: str | None = None
    json_path: Path = Path("pagealloc-demo.json")
    png_path: Path = Path("pagealloc-demo.png")


@dataclass(frozen=True)
class OpenModel:
    """A model file with all that is cheap to read: everything but the weights."""

    path: Path
    shape: LlamaShape
    tokenizer: Tokenizer
    reader: Any

    def prompt(self, system: str, question: str) -> ChatPrompt:
        """Return a prompt in the model's chat format."""
        return chat_prompt(self.tokenizer, find_chat_format(self.reader), system, question)


def run_comparison(options: DemoOptions) -> int:
    """Run both sides, show and write what they cost.

    Returns
    -------
    int
        0, or 3 if the sides generated other tokens though both store float16.
    """
    for path in (options.json_path, options.png_path):
        refuse_unwritable(path)
    with open_model(options) as model:
        questions = [QUESTIONS[i % len(QUESTIONS)] for i in range(options.n_conversations)]
        n_ctx = min(options.n_ctx, model.shape.max_tokens)
        refuse_what_does_not_fit(model.shape, len(questions) * n_ctx)
        job = make_job(model, options, questions, n_ctx)
        machine = describe_machine()
        with make_display(model.tokenizer, questions[0]) as display:
            display.say(
                f"{model.path.stem}: {len(questions)} conversations share a "
                f"system prompt of {len(job.system_ids):,} tokens; context {job.n_ctx:,} tokens, "
                f"{format_bytes(model.shape.kv_token_bytes)} of float16 KV a token"
            )
            comparison = compare_sides(job, display)
            display.say("")
            display.show_table(table_rows(comparison))
            for line in (*footnotes(machine["transparent_huge_pages"]), "", verdict(comparison)):
                display.say(line)
            quality = None
            if options.kv is not None:
                display.say("measuring perplexity ...")
                quality = _measure_quality(model, job.kv)
                display.say(quality_line(job.kv, quality, len(TEXTS), TEXT_TOKENS))
            _write_json(options.json_path, model, machine, job, questions, comparison, quality)
            display.say(f"wrote {options.json_path}")
            subtitle = (
                f"{model.path.stem}, context {job.n_ctx:,}, {SHOWN_KV.get(job.kv, job.kv)} KV; "
                f"baseline: float16, preallocated and cleared; {machine['cpu']}"
            )
            display.say(_write_chart(options.png_path, comparison, subtitle))
    return TOKENS_DIFFER if comparison.has_failed else TOKENS_IDENTICAL


def _measure_quality(model: OpenModel, kv: str) -> Quality:
    """Read the texts with every row stored as `kv`; return what that costs."""
    llama, kinds = Llama.load(model.path), {kv: every_row(kv)}
    texts = [model.tokenizer.encode(text)[:TEXT_TOKENS] for text in TEXTS.values()]
    return pool([compare_with_float16(llama, ids, kinds)[kv] for ids in texts])


def run_prompt(options: DemoOptions, question: str) -> int:
    """Answer one question, streaming, with the KV cache in pagealloc."""
    with open_model(options) as model:
        prompt = model.prompt(CHAT_SYSTEM_PROMPT, question)
        prompt_ids = prompt.system_ids + prompt.question_ids
        n_ctx = min(options.n_ctx, model.shape.max_tokens)
        refuse_long_prompt(len(prompt_ids) + options.max_new_tokens, n_ctx)
        llama = Llama.load(model.path)
        cache = KVCache(paged_layout(model.shape, n_ctx), **KV_KINDS[options.kv or "f16"])
        kv = PagedKV(cache.sequence())
        stream = TextStream(model.tokenizer)
        started = perf_counter()
        with slow_event("demo_request") as request:
            hidden = prefill(llama, kv, prompt_ids)
            first_token_s = perf_counter() - started
            n_tokens = 0
            for token_id in generate(
                llama,
                kv,
                hidden,
                Sampler(options.temperature, options.seed),
                max_new_tokens=options.max_new_tokens,
                stop_ids=model.tokenizer.stop_ids,
            ):
                n_tokens += 1
                sys.stdout.write(stream.push(token_id))
                sys.stdout.flush()
            request["n_prompt_tokens"] = len(prompt_ids)
            request["n_tokens"] = n_tokens
        elapsed_s = perf_counter() - started
        held_bytes = cache.stats().held_bytes
        sys.stdout.write(
            f"\n\n{len(prompt_ids)} + {n_tokens} tokens in {elapsed_s:.1f} s, the first after "
            f"{first_token_s:.2f} s; KV memory held: {format_bytes(held_bytes)} of "
            f"{format_bytes(n_ctx * model.shape.kv_token_bytes)} for the whole context\n"
        )
        kv.close()
        cache.close()
    return 0


@contextmanager
def open_model(options: DemoOptions) -> Iterator[OpenModel]:
    """Find the model's file, or make one, and read all but its weights."""
    with tempfile.TemporaryDirectory(prefix="pagealloc-demo-") as folder:
        if options.quick:
            path = Path(folder) / "tiny-random.gguf"
            write_tiny_model(path, options.seed)
        else:
            path = find_model_file(options.model)
        reader = open_gguf(path)
        yield OpenModel(path, read_shape(reader), Tokenizer(reader), reader)


def make_job(model: OpenModel, options: DemoOptions, questions: list[str], n_ctx: int) -> SideJob:
    """Return the work of both sides: the model's tokens of every prompt."""
    prompts = [model.prompt(system_prompt(options), question) for question in questions]
    longest = max(len(prompt.system_ids) + len(prompt.question_ids) for prompt in prompts)
    refuse_long_prompt(longest + options.max_new_tokens, n_ctx)
    return SideJob(
        side="baseline",
        kv=options.kv or "f16",
        model_path=str(model.path),
        n_ctx=n_ctx,
        system_ids=prompts[0].system_ids,
        question_ids=[prompt.question_ids for prompt in prompts],
        stop_ids=sorted(model.tokenizer.stop_ids),
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        seed=options.seed,
    )


def system_prompt(options: DemoOptions) -> str:
    """Return what all conversations begin with."""
    return SYSTEM_PROMPT[:QUICK_SYSTEM_CHARACTERS] if options.quick else SYSTEM_PROMPT


def refuse_long_prompt(needed_tokens: int, n_ctx: int) -> None:
    """Say before anything runs that a prompt and its answer leave no room."""
    if needed_tokens > n_ctx:
        raise DemoError(
            f"the prompt and its answer are up to {needed_tokens:,} tokens long, and the context "
            f"has {n_ctx:,}; ask for a larger --n-ctx or fewer --max-new-tokens"
        )


def refuse_what_does_not_fit(shape: LlamaShape, preallocated_tokens: int) -> None:
    """Say before anything runs that the preallocated caches would not fit into memory."""
    kv_bytes = preallocated_tokens * shape.kv_token_bytes
    needed_bytes = kv_bytes + shape.weights_bytes
    available_bytes = psutil.virtual_memory().available
    if needed_bytes > available_bytes:
        raise DemoError(
            f"the baseline needs {format_bytes(needed_bytes)} ({format_bytes(kv_bytes)} of it KV "
            f"caches) and {format_bytes(available_bytes)} are available; ask for fewer "
            "--conversations or a smaller --n-ctx"
        )


def _write_json(
    path: Path,
    model: OpenModel,
    machine: dict[str, Any],
    job: SideJob,
    questions: list[str],
    comparison: Comparison,
    quality: Quality | None,
) -> None:
    answers = [model.tokenizer.decode(ids).strip() for ids in comparison.pagealloc.token_ids]
    figures = comparison.to_json() | {
        "model": {
            "name": model.shape.name,
            "file": model.path.name,
            "kv_bytes_per_token": model.shape.kv_token_bytes,
        },
        "machine": machine,
        "settings": {
            "conversations": len(questions),
            "n_ctx": job.n_ctx,
            "system_prompt_tokens": len(job.system_ids),
            "max_new_tokens": job.max_new_tokens,
            "temperature": job.temperature,
            "seed": job.seed,
            "kv": job.kv,
        },
        "quality": None if quality is None else asdict(quality),
        "conversations": [
            {"question": question, "answer": answer, "tokens_identical": same}
            for question, answer, same in zip(
                questions, answers, comparison.tokens_identical, strict=True
            )
        ],
    }
    path.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def refuse_unwritable(path: Path) -> None:
    """Say now, not after minutes of work, that a result could not be written."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise DemoError(f"cannot write {path}: there is no folder {folder}")
    if path.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise DemoError(f"cannot write {path}: no permission, or it is a folder")


def _write_chart(path: Path, comparison: Comparison, subtitle: str) -> str:
    """Write the picture; return what to say about it."""
    try:
        draw_chart(comparison, path, subtitle)
    except DemoError as missing:
        return f"no picture: {missing}"
    return f"wrote {path}"
