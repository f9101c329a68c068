"""The process of one side: a job in, events out.

Each side has a fresh interpreter of its own, so that peak RSS, page faults and page tables are its
own. Both load the weights the same way, and nothing is warmed up before the counting begins.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

from pagealloc.demo.engine import Llama
from pagealloc.demo.generation import Sampler, generate, prefill
from pagealloc.demo.job import Emit, SideJob, SideResult, event_line
from pagealloc.demo.kv_stores import KVStore
from pagealloc.demo.measure import page_faults, page_table_bytes, peak_rss_bytes
from pagealloc.demo.sides import SIDES, Side

__all__ = ["main", "run_side"]


def run_side(job: SideJob, emit: Emit) -> SideResult:
    """Do all of a side's work; every conversation stays alive until the figures are read."""
    emit({"event": "phase", "phase": "loading the model", "total_tokens": 0})
    model = Llama.load(Path(job.model_path))

    emit({"event": "phase", "phase": "creating the caches", "total_tokens": 0})
    faults_loaded, page_tables_loaded_bytes = page_faults(), page_table_bytes()
    started = perf_counter()
    side = SIDES[job.side](model.shape, job)
    startup_s = perf_counter() - started
    faults_started = page_faults()

    conversations = _Conversations(job, model, side, emit)
    conversations.compute_prompts()
    faults_first_tokens = page_faults()
    conversations.decode_answers()

    page_table_growth_bytes = page_table_bytes() - page_tables_loaded_bytes
    result = SideResult(
        kv_bytes=side.kv_bytes(page_table_growth_bytes),
        page_table_bytes=page_table_growth_bytes,
        huge_bytes=side.huge_bytes(),
        peak_rss_bytes=peak_rss_bytes(),
        faults_startup=faults_started - faults_loaded,
        faults_first_inference=faults_first_tokens - faults_started,
        startup_s=startup_s,
        first_token_s=conversations.first_token_s,
        prompt_tokens_computed=conversations.prompt_tokens_computed,
        decode_tokens_per_s=conversations.decode_tokens_per_s,
        token_ids=conversations.token_ids,
    )
    side.close()
    return result


class _Conversations:
    """All conversations of a side: first every prompt, then every answer."""

    def __init__(self, job: SideJob, model: Llama, side: Side, emit: Emit) -> None:
        self._job, self._model, self._side, self._emit = job, model, side, emit
        self._answers: list[Iterator[int]] = []
        self.token_ids: list[list[int]] = [[] for _ in job.question_ids]
        self.first_token_s: list[float] = []
        self.prompt_tokens_computed = 0
        self.decode_tokens_per_s = 0.0

    def compute_prompts(self) -> None:
        """Bring every conversation to its first token."""
        total_tokens = self._job.prompt_tokens
        self._emit({"event": "phase", "phase": "first inference", "total_tokens": total_tokens})
        for index in range(len(self._job.question_ids)):
            started, n_computed_before = perf_counter(), self.prompt_tokens_computed
            self._answers.append(self._answer(index))
            self._take_token(index)
            self.first_token_s.append(perf_counter() - started)
            n_prompt = len(self._job.system_ids) + len(self._job.question_ids[index])
            n_shared = n_prompt - (self.prompt_tokens_computed - n_computed_before)
            self._emit({"event": "advance", "tokens": n_shared})

    def decode_answers(self) -> None:
        """Finish every answer."""
        total_tokens = len(self._answers) * (self._job.max_new_tokens - 1)
        self._emit({"event": "phase", "phase": "answers", "total_tokens": total_tokens})
        started, n_tokens = perf_counter(), 0
        for index in range(len(self._answers)):
            while self._take_token(index):
                self._emit({"event": "advance", "tokens": 1})
                n_tokens += 1
            n_saved = self._job.max_new_tokens - len(self.token_ids[index])
            self._emit({"event": "advance", "tokens": n_saved})  # stopped earlier
        self.decode_tokens_per_s = n_tokens / (perf_counter() - started)

    def _answer(self, index: int) -> Iterator[int]:
        kv = self._side.conversation(index, self._compute_shared_prompt)
        return generate(
            self._model,
            kv,
            self._compute(kv, self._job.question_ids[index]),
            Sampler(self._job.temperature, [self._job.seed, index]),
            max_new_tokens=self._job.max_new_tokens,
            stop_ids=frozenset(self._job.stop_ids),
        )

    def _compute_shared_prompt(self, kv: KVStore) -> None:
        self._compute(kv, self._job.system_ids)

    def _compute(self, kv: KVStore, token_ids: list[int]) -> Any:
        return prefill(self._model, kv, token_ids, self._count_prompt_tokens)

    def _count_prompt_tokens(self, n_tokens: int) -> None:
        self.prompt_tokens_computed += n_tokens
        self._emit({"event": "advance", "tokens": n_tokens})

    def _take_token(self, index: int) -> bool:
        token_id = next(self._answers[index], None)
        if token_id is None:
            return False
        self.token_ids[index].append(token_id)
        self._emit({"event": "token", "conversation": index, "token_id": token_id})
        return True


def main() -> None:
    """Be the process: read the job from standard input, write events to standard output."""

    def emit(event: dict[str, Any]) -> None:
        sys.stdout.write(event_line(event))
        sys.stdout.flush()

    result = run_side(SideJob.from_json(sys.stdin.read()), emit)
    emit({"event": "result", "result": result.to_json()})
