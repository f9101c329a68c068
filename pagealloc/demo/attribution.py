"""Where each percent came from: the same work at every step, and what each step changed.

Structure
    ::

        Step --in processes of its own, once a round--> StepRun
        TakenStep: a step's runs, their medians
        Attribution: all steps, each one's difference from the step before it
Invariants
    For every figure the percent points of all steps add up to the change from the first step to the
    last, in percent: each is a difference of neighbours over one and the same denominator.
"""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Protocol

from pagealloc.demo.attribution_allocations import AllocationResult
from pagealloc.demo.attribution_steps import HUGE_PAGES, STEPS, Step, Unavailable
from pagealloc.demo.child import run_child
from pagealloc.demo.comparison import REFERENCE_PERCENT, Watcher, run_side_process
from pagealloc.demo.job import SideJob, SideResult
from pagealloc.demo.weights import LlamaShape

__all__ = [
    "FIGURES",
    "Attribution",
    "Figure",
    "StepRun",
    "StepWatcher",
    "TakenStep",
    "attribute",
    "share_of_same_tokens",
]


class StepWatcher(Watcher, Protocol):
    """Is told what the comparison is doing."""

    def step_started(self, round_number: int, step: Step) -> None:
        """A step of a round begins; rounds count from 1."""


@dataclass(frozen=True)
class StepRun:
    """What one step cost in one round."""

    side: SideResult
    allocations: AllocationResult


@dataclass(frozen=True)
class Figure:
    """Something that every step is measured by."""

    name: str
    key: str  # its name in report.json, with the unit
    read: Callable[[StepRun], float]
    reference_percent: float | None = None  # the change that the reference claims


REFERENCE_P99_PERCENT = -62.0

FIGURES = (
    Figure("kv", "kv_bytes", lambda run: run.side.kv_bytes, REFERENCE_PERCENT["kv_bytes"]),
    Figure(
        "faults", "n_faults", lambda run: run.side.faults_total, REFERENCE_PERCENT["faults_total"]
    ),
    Figure("faults_startup", "n_faults_startup", lambda run: run.side.faults_startup),
    Figure(
        "faults_first_inference",
        "n_faults_first_inference",
        lambda run: run.side.faults_first_inference,
    ),
    Figure("alloc_p99", "alloc_p99_ns", lambda run: run.allocations.p99_ns, REFERENCE_P99_PERCENT),
    Figure("malloc_p99", "malloc_p99_ns", lambda run: run.allocations.malloc_p99_ns),
    Figure("alloc_p50", "alloc_p50_ns", lambda run: run.allocations.p50_ns),
)

DENOMINATORS = {"n_faults_startup": "n_faults", "n_faults_first_inference": "n_faults"}
"""Parts are told in percent points of their whole, so that they add up to the whole's."""


@dataclass(frozen=True)
class TakenStep:
    """A step and what it cost in every round; no runs: it could not be taken."""

    step: Step
    runs: tuple[StepRun, ...]
    unavailable: Unavailable | None = None

    def values(self, key: str) -> list[float]:
        """Return a figure in each round."""
        figure = next(each for each in FIGURES if each.key == key)
        return [figure.read(run) for run in self.runs]

    def value(self, key: str) -> float:
        """Return the median of a figure."""
        if key == "n_faults":  # its parts add up to it
            return self.value("n_faults_startup") + self.value("n_faults_first_inference")
        return median(self.values(key))

    @property
    def huge_bytes(self) -> int | None:
        """Bytes of the KV cache that huge pages mapped in the last round; None: not known."""
        return self.runs[-1].side.huge_bytes

    @property
    def token_ids(self) -> list[list[int]]:
        """What the conversations answered in the last round."""
        return self.runs[-1].side.token_ids


@dataclass(frozen=True)
class Attribution:
    """All steps, the first of them the reference."""

    steps: tuple[TakenStep, ...]

    @property
    def taken(self) -> tuple[TakenStep, ...]:
        """The steps that were measured."""
        return tuple(each for each in self.steps if each.runs)

    @property
    def has_failed(self) -> bool:
        """Whether a step that stores float16 gave other tokens than the reference."""
        reference = self.steps[0].token_ids
        return any(each.step.kv == "f16" and each.token_ids != reference for each in self.taken)

    def percent_points(self, key: str) -> list[float]:
        """Return what each step of `taken` added, in percent of the first; 0 for the first."""
        denominator = self.taken[0].value(DENOMINATORS.get(key, key))
        values = [each.value(key) for each in self.taken]
        before = values[:1] + values[:-1]
        return [
            100.0 * (here - last) / denominator for here, last in zip(values, before, strict=True)
        ]

    def total_percent(self, key: str) -> float:
        """Return the change from the first step to the last, in percent of the first."""
        first, last = self.taken[0], self.taken[-1]
        denominator = first.value(DENOMINATORS.get(key, key))
        return 100.0 * (last.value(key) - first.value(key)) / denominator


def attribute(
    work: SideJob,
    shape: LlamaShape,
    watcher: StepWatcher,
    *,
    n_rounds: int,
    n_batches: int,
    no_huge_pages: Unavailable | None = None,
) -> Attribution:
    """Do the work at every step, once a round, so that what disturbs the machine disturbs all.

    Parameters
    ----------
    work : SideJob
        The conversations; how they are kept is the steps' business.
    shape : LlamaShape
        Of the model of the work.
    watcher : StepWatcher
        Is told what happens.
    n_rounds, n_batches : int
        How often everything is done; how many batches of allocations each time.
    no_huge_pages : Unavailable, optional
        Why that step is left out, and the one behind it taken without.

    Raises
    ------
    DemoError
        A process failed; the message ends with what it wrote to standard error.
    """
    skipped = {} if no_huge_pages is None else {HUGE_PAGES: no_huge_pages}
    steps = [step.without_huge_pages() if skipped else step for step in STEPS]
    runs: dict[str, list[StepRun]] = {step.key: [] for step in steps}
    for round_number in range(1, n_rounds + 1):
        for step in steps:
            if step.key in skipped:
                continue
            watcher.step_started(round_number, step)
            told = run_child(
                "pagealloc.demo.attribution_allocations",
                step.allocation_job(shape, n_batches, seed=round_number).to_json(),
                lambda _event: None,
                f"the allocations of the step {step.key!r}",
            )
            side = run_side_process(step.side_job(work), watcher)
            runs[step.key].append(StepRun(side, AllocationResult(**told)))
    return Attribution(
        tuple(TakenStep(step, tuple(runs[step.key]), skipped.get(step.key)) for step in steps)
    )


def share_of_same_tokens(reference: list[list[int]], answers: list[list[int]]) -> float:
    """Return how many of the reference's tokens came before the first that is another, 0 to 1.

    Behind that token a conversation goes its own way, and says nothing about the rows.
    """
    n_same = 0
    for theirs, ours in zip(reference, answers, strict=True):
        pairs = list(zip(theirs, ours, strict=False))
        n_same += next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
    return n_same / sum(map(len, reference))
