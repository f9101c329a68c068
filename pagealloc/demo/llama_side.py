"""One side of ``pagealloc demo --engine llama``, in a process of its own: its RSS is its own.

Every side holds the same conversations twice, greedily: the first time each prompt is new, the
second time each is known.
"""

from __future__ import annotations

import multiprocessing
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import psutil

from pagealloc.demo.llama_quality import restored_quality
from pagealloc.demo.measure import page_faults, peak_rss_bytes, pss_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pagealloc.demo.perplexity import Quality

__all__ = ["LlamaJob", "LlamaResult", "context_costs", "run_llama_side"]

SideName = Literal["stock", "f16", "K8/V4"]

BUDGET_BYTES = 8 << 30
QUALITY_TOKENS = 512
QUALITY_PREFIX_TOKENS = 256


@dataclass(frozen=True)
class LlamaJob:
    """What a side is asked for; token ids throughout."""

    side: SideName
    model_path: str
    n_ctx: int
    prompts: list[list[int]]
    max_new_tokens: int
    seed: int
    texts: list[list[int]]


@dataclass
class LlamaResult:
    """What a side measured."""

    held_bytes: int = 0
    rss_bytes: int = 0
    peak_rss_bytes: int = 0
    faults_at_creation: int = 0
    kv_made_bytes: int = 0
    kv_used_bytes: int = 0
    save_s: list[float] = field(default_factory=list)
    load_s: list[float] = field(default_factory=list)
    first_token_s: list[float] = field(default_factory=list)
    """Of the prompts when they come for the second time."""
    new_first_token_s: list[float] = field(default_factory=list)
    token_ids: list[list[int]] = field(default_factory=list)
    """Answers, those of the second time behind those of the first."""
    quality: Quality | None = None


def run_llama_side(job: LlamaJob) -> LlamaResult:
    """Run a side in a new process.

    Raises
    ------
    Exception
        What it raised.
    """
    # Spawned: llama.cpp's threads do not survive a fork.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_run, (job,))


@contextmanager
def context_costs() -> Iterator[list[tuple[int, int]]]:
    """Note the page faults, and the bytes the process grew, of each context made meanwhile."""
    from llama_cpp import llama_cpp as bindings

    costs: list[tuple[int, int]] = []
    init = bindings.llama_init_from_model

    def counting(model: Any, params: Any) -> Any:
        before_bytes, before = pss_bytes(), page_faults()
        context = init(model, params)
        n_faults = page_faults() - before
        costs.append((n_faults, max(0, pss_bytes() - before_bytes)))
        return context

    bindings.llama_init_from_model = counting
    try:
        yield costs
    finally:
        bindings.llama_init_from_model = init


def _run(job: LlamaJob) -> LlamaResult:
    from llama_cpp import Llama, LlamaRAMCache

    from pagealloc.llama import PageCache, attach, kv_memory

    result = LlamaResult()
    is_ours = job.side != "stock"
    options = {"n_ctx": job.n_ctx, "seed": job.seed, "flash_attn": True, "verbose": False}
    with context_costs() as costs, kv_memory() if is_ours else nullcontext() as kv:
        llm = Llama(job.model_path, **options)
    result.faults_at_creation, result.kv_made_bytes = costs[0]
    cache: Any = LlamaRAMCache(BUDGET_BYTES)
    if is_ours:
        cache = PageCache(BUDGET_BYTES, quantize=job.side == "K8/V4")
        attach(llm, cache)
    else:
        llm.set_cache(cache)
    llm.save_state = _timed(llm.save_state, result.save_s)
    llm.load_state = _timed(llm.load_state, result.load_s)
    _converse(llm, job, result.token_ids, result.new_first_token_s)
    result.load_s.clear()  # of the beginning that all share
    _converse(llm, job, result.token_ids, result.first_token_s)
    result.rss_bytes = psutil.Process().memory_info().rss
    result.peak_rss_bytes = peak_rss_bytes()
    result.kv_used_bytes = result.kv_made_bytes
    if kv is not None:
        result.kv_used_bytes = kv.stats().resident_bytes
        cache.trim()
        result.held_bytes = cache.cache_size
    else:
        result.held_bytes = sum(
            len(state.llama_state) + state.scores.nbytes + state.input_ids.nbytes
            for state in cache.cache_state.values()
        )
    llm.close()
    if job.side == "K8/V4":
        reader = Llama(job.model_path, **options | {"n_ctx": QUALITY_TOKENS, "logits_all": True})
        attach(reader, cache)
        result.quality = restored_quality(reader, job.texts, QUALITY_PREFIX_TOKENS)
        reader.close()
    return result


def _timed(method: Any, times_s: list[float]) -> Any:
    def timed(*arguments: Any) -> Any:
        started = time.perf_counter()
        result = method(*arguments)
        times_s.append(time.perf_counter() - started)
        return result

    return timed


def _converse(
    llm: Any, job: LlamaJob, answers: list[list[int]], first_token_s: list[float]
) -> None:
    """Answer every prompt; note the answers' tokens, and how long each first one took."""
    for prompt in job.prompts:
        started, is_first = time.perf_counter(), True
        for _ in llm.create_completion(
            prompt, max_tokens=job.max_new_tokens, temperature=0.0, seed=job.seed, stream=True
        ):
            if is_first:
                first_token_s.append(time.perf_counter() - started)
                is_first = False
        answers.append(llm.input_ids[len(prompt) : llm.n_tokens].tolist())
