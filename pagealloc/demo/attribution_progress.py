"""What a person sees while the steps run, on standard error: a bar with `rich`, else lines."""

import importlib.util
import sys
from types import TracebackType
from typing import Any, Self

from pagealloc.demo.attribution_steps import Step

__all__ = ["PlainProgress", "RichProgress", "make_progress"]


class PlainProgress:
    """A line a step; an `attribution.StepWatcher`, used as a context manager around the run."""

    def __init__(self, n_rounds: int) -> None:
        self._n_rounds = n_rounds

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        return None

    def step_started(self, round_number: int, step: Step) -> None:
        """Print the step."""
        print(f"round {round_number} of {self._n_rounds}: {step.title}", file=sys.stderr)

    def side_started(self, side: str) -> None:
        """Say nothing: the step was said."""

    def phase_started(self, phase: str, total_tokens: int) -> None:
        """Say nothing: a log needs no more than the steps."""

    def advanced(self, n_tokens: int) -> None:
        """Say nothing."""

    def token_chosen(self, conversation: int, token_id: int) -> None:
        """Say nothing."""

    def side_finished(self, side: str) -> None:
        """Say nothing."""


class RichProgress(PlainProgress):
    """One bar, of the phase that runs."""

    def __init__(self, n_rounds: int) -> None:
        super().__init__(n_rounds)
        from rich import progress
        from rich.console import Console

        self._bar: Any = progress.Progress(
            progress.SpinnerColumn(),
            progress.TextColumn("{task.description:<58}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._bar.add_task("", total=None)
        self._title = ""

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def step_started(self, round_number: int, step: Step) -> None:
        """Name the step."""
        self._title = f"{round_number}/{self._n_rounds} {step.title}"
        self._bar.reset(self._task, description=f"{self._title}: allocations", total=None)

    def phase_started(self, phase: str, total_tokens: int) -> None:
        """Start the bar anew."""
        description = f"{self._title}: {phase}"
        self._bar.reset(self._task, description=description, total=total_tokens or None)

    def advanced(self, n_tokens: int) -> None:
        """Move the bar."""
        self._bar.advance(self._task, n_tokens)


def make_progress(n_rounds: int) -> PlainProgress:
    """Return the best one for this machine and this standard error."""
    has_rich = importlib.util.find_spec("rich") is not None
    return (RichProgress if has_rich and sys.stderr.isatty() else PlainProgress)(n_rounds)
