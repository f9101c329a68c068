"""Runs both sides on the same work, each in a process of its own, and compares what they say."""

from dataclasses import dataclass, replace
from typing import Any, Protocol

from pagealloc.demo.child import run_child
from pagealloc.demo.job import SideJob, SideResult
from pagealloc.demo.sides import SIDES

__all__ = ["REFERENCE_PERCENT", "Comparison", "Watcher", "compare_sides", "run_side_process"]

REFERENCE_PERCENT = {"kv_bytes": -57.3, "faults_total": -57.5}
"""The changes that the reference claims for the same two figures."""


class Watcher(Protocol):
    """Is told what a side's process is doing."""

    def side_started(self, side: str) -> None:
        """A process begins."""

    def phase_started(self, phase: str, total_tokens: int) -> None:
        """The process begins a phase of so many tokens; 0 where tokens are not counted."""

    def advanced(self, n_tokens: int) -> None:
        """So many tokens more of the phase are done."""

    def token_chosen(self, conversation: int, token_id: int) -> None:
        """A conversation has one token more."""

    def side_finished(self, side: str) -> None:
        """The process is done."""


@dataclass(frozen=True)
class Comparison:
    """The figures of both sides."""

    baseline: SideResult
    pagealloc: SideResult
    kv: str = "f16"
    """How pagealloc stored K and V: a key of `kv.quantisation.KV_KINDS`."""

    @property
    def is_quantised(self) -> bool:
        """Whether the tokens may differ, because rows were rounded."""
        return self.kv != "f16"

    @property
    def tokens_identical(self) -> list[bool]:
        """Whether both sides gave the same tokens, by conversation."""
        pairs = zip(self.baseline.token_ids, self.pagealloc.token_ids, strict=True)
        return [ours == theirs for theirs, ours in pairs]

    @property
    def has_failed(self) -> bool:
        """Whether tokens differ that must not."""
        return not self.is_quantised and not all(self.tokens_identical)

    def reduction_percent(self, figure: str) -> float:
        """Return how far a figure of `SideResult` lies below the baseline's, in percent."""
        before: float = getattr(self.baseline, figure)
        after: float = getattr(self.pagealloc, figure)
        return 100.0 * (before - after) / before

    def to_json(self) -> dict[str, Any]:
        """Return what `pagealloc-demo.json` says about the two sides."""
        return {
            "baseline": self.baseline.to_json(),
            "pagealloc": self.pagealloc.to_json(),
            "reduction_percent": {
                figure: round(self.reduction_percent(figure), 2) for figure in REFERENCE_PERCENT
            },
            "reference_percent": {
                figure: -percent for figure, percent in REFERENCE_PERCENT.items()
            },
            "tokens_identical": all(self.tokens_identical),
        }


def compare_sides(job: SideJob, watcher: Watcher) -> Comparison:
    """Run the job on every side, one after the other."""
    return Comparison(
        **{side: run_side_process(replace(job, side=side), watcher) for side in SIDES}, kv=job.kv
    )


def run_side_process(job: SideJob, watcher: Watcher) -> SideResult:
    """Run one side in a fresh interpreter, and pass on what it says.

    Raises
    ------
    DemoError
        If the process failed; the message ends with what it wrote to standard error.
    """
    watcher.side_started(job.side)
    told = run_child(
        "pagealloc.demo.side",
        job.to_json(),
        lambda event: _tell(watcher, event),
        f"the side {job.side!r}",
    )
    watcher.side_finished(job.side)
    return SideResult.from_json(told)


def _tell(watcher: Watcher, event: dict[str, Any]) -> None:
    match event["event"]:
        case "phase":
            watcher.phase_started(event["phase"], event["total_tokens"])
        case "advance":
            watcher.advanced(event["tokens"])
        case "token":
            watcher.token_chosen(event["conversation"], event["token_id"])
