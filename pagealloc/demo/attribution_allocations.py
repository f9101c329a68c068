"""How long one allocation of a KV block takes, in a process of its own.

Requests come in batches of 1 to 32, any size as likely as another.  A request takes the blocks of a
prompt of 256 tokens and of an answer of 64; when a batch is done, all its blocks are freed.  Both
allocators are asked in the same way, by ``np.empty``: the one is NumPy's own, which is malloc, the
other pagealloc's under NumPy (`numpy_handler`).

malloc is asked for the same blocks at every step, first, so that what smaller blocks gain can be
told from what the allocator gains.

Each call is timed alone.  One byte of each page of a block is written, outside the time: what a
fault costs shows in the faults.  The first tenth of the batches is not counted: a server's
allocator is a warm one.
"""

import json
import sys
from dataclasses import asdict, dataclass
from time import perf_counter_ns
from typing import Any, Self

import numpy as np

from pagealloc import PageAllocator, numpy_handler, page_size_bytes
from pagealloc.demo.job import Backing, event_line

__all__ = ["AllocationJob", "AllocationResult", "main", "time_allocations"]

MAX_BATCH_REQUESTS = 32
PROMPT_TOKENS, ANSWER_TOKENS = 256, 64
WARM_UP_SHARE = 10


@dataclass(frozen=True)
class AllocationJob:
    """Which blocks are allocated, and by whom."""

    backing: Backing | None  # of the allocator; None: NumPy's malloc
    block_bytes: int
    block_tokens: int
    shares_prompt: bool  # the blocks of the prompt are allocated once a batch, not once a request
    n_batches: int
    seed: int  # of the batches' sizes

    def to_json(self) -> str:
        """Return the job as text for `from_json`."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return the job that `to_json` wrote."""
        return cls(**json.loads(text))


@dataclass(frozen=True)
class AllocationResult:
    """Times of single allocations."""

    block_bytes: int
    n_allocations: int
    p50_ns: float
    p99_ns: float
    malloc_p99_ns: float  # of the same blocks from NumPy's malloc


def time_allocations(job: AllocationJob) -> AllocationResult:
    """Do the job in this process."""
    taken_ns = _time_batches(job)
    malloc_p99_ns = float(np.percentile(taken_ns, 99))
    if job.backing is not None:
        with PageAllocator(backing=job.backing) as allocator, numpy_handler(allocator):
            taken_ns = _time_batches(job)
    p50_ns, p99_ns = np.percentile(taken_ns, (50, 99)).tolist()
    return AllocationResult(job.block_bytes, len(taken_ns), p50_ns, p99_ns, malloc_p99_ns)


def _time_batches(job: AllocationJob) -> list[int]:
    """Serve all batches; return the time of each allocation that counts."""
    sizes = np.random.default_rng(job.seed).integers(1, MAX_BATCH_REQUESTS + 1, job.n_batches)
    n_warm_up = job.n_batches // WARM_UP_SHARE
    taken_ns: list[int] = []
    for index, n_requests in enumerate(sizes.tolist()):
        _batch(job, n_requests, taken_ns if index >= n_warm_up else [])
    return taken_ns


def _batch(job: AllocationJob, n_requests: int, taken_ns: list[int]) -> None:
    """Serve a batch from start to end; note the time of each allocation."""
    n_prompt, n_answer = PROMPT_TOKENS // job.block_tokens, ANSWER_TOKENS // job.block_tokens
    n_blocks = n_prompt * (1 if job.shares_prompt else n_requests) + n_answer * n_requests
    step_bytes, blocks = page_size_bytes(), []
    for _ in range(n_blocks):
        started_ns = perf_counter_ns()
        block = np.empty(job.block_bytes, np.uint8)
        taken_ns.append(perf_counter_ns() - started_ns)
        block[::step_bytes] = 1
        blocks.append(block)


def main() -> None:
    """Be the process: read the job from standard input, write the result to standard output."""
    result: dict[str, Any] = asdict(time_allocations(AllocationJob.from_json(sys.stdin.read())))
    sys.stdout.write(event_line({"event": "result", "result": result}))
    sys.stdout.flush()
