"""What a person sees while the demo runs: with `rich` where it is installed, else plain lines."""

import importlib.util
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Protocol, Self

from pagealloc.demo.report import COLUMNS
from pagealloc.demo.tokenizer import Tokenizer

__all__ = ["Display", "PlainDisplay", "RichDisplay", "make_display"]

SHOWN_CONVERSATION = 0
"""The conversation whose text is streamed."""

SIDE_TITLES = {
    "baseline": "(a) baseline: a preallocated cache each, every prompt computed in full",
    "pagealloc": "(b) pagealloc: windows; the shared prompt computed once and forked",
}


class TableRow(Protocol):
    """A line of a table."""

    @property
    def reference(self) -> str:
        """What it is compared with; such a line stands out."""

    def cells(self) -> tuple[str, ...]:
        """Return a text for each column."""


class TextStream:
    """Turns tokens into text as they come, holding back characters that are not whole yet."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._token_ids: list[int] = []
        self.text = ""

    def push(self, token_id: int) -> str:
        """Add a token; return the text that is new."""
        self._token_ids.append(token_id)
        text = self._tokenizer.decode(self._token_ids)
        if text.endswith("\ufffd"):
            return ""
        new, self.text = text[len(self.text) :], text
        return new


class Display(ABC):
    """Shows progress, streams the text of one conversation, draws the table.

    A `comparison.Watcher`; used as a context manager around one comparison.
    """

    def __init__(self, tokenizer: Tokenizer, question: str) -> None:
        self._tokenizer = tokenizer
        self._question = question
        self._stream = TextStream(tokenizer)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        return None

    def side_started(self, side: str) -> None:
        """Begin a side: its text is streamed anew."""
        self._stream = TextStream(self._tokenizer)
        self.say("")
        self.say(SIDE_TITLES[side])

    @abstractmethod
    def phase_started(self, phase: str, total_tokens: int) -> None:
        """Show a new phase."""

    @abstractmethod
    def advanced(self, n_tokens: int) -> None:
        """Show that tokens of the phase are done."""

    def token_chosen(self, conversation: int, token_id: int) -> None:
        """Show the new text, if the conversation is the one that is shown."""
        if conversation == SHOWN_CONVERSATION:
            self.show_text(self._stream.push(token_id))

    @abstractmethod
    def side_finished(self, side: str) -> None:
        """Leave the side's text on the screen."""

    @abstractmethod
    def show_text(self, new_text: str) -> None:
        """Show more of the streamed text."""

    @abstractmethod
    def say(self, line: str) -> None:
        """Print a line."""

    @abstractmethod
    def show_table(self, rows: Sequence[TableRow], columns: Sequence[str] = COLUMNS) -> None:
        """Draw the table."""


class PlainDisplay(Display):
    """Lines of text, for logs and for machines without `rich`."""

    def phase_started(self, phase: str, total_tokens: int) -> None:
        """Print the phase."""
        self.say(f"  {phase}" + (f", up to {total_tokens:,} tokens" if total_tokens else ""))

    def advanced(self, n_tokens: int) -> None:
        """Print nothing: a log has no use for it."""

    def side_finished(self, side: str) -> None:  # noqa: ARG002
        """Print the streamed text, which would be torn apart by the lines between."""
        self.say(f"  {self._question}\n  > {self._stream.text.strip()}")

    def show_text(self, new_text: str) -> None:
        """Wait for the whole text."""

    def say(self, line: str) -> None:
        """Print a line."""
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    def show_table(self, rows: Sequence[TableRow], columns: Sequence[str] = COLUMNS) -> None:
        """Print the columns, the first to the left and the others to the right."""
        lines = [tuple(columns), *(row.cells() for row in rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        for line in lines:
            cells = [line[0].ljust(widths[0])]
            cells += [cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True)]
            self.say("  ".join(cells).rstrip())


class RichDisplay(Display):
    """A progress bar under the streamed text, and a drawn table."""

    def __init__(self, tokenizer: Tokenizer, question: str) -> None:
        super().__init__(tokenizer, question)
        from rich import progress
        from rich.console import Console
        from rich.live import Live

        self._console: Any = Console(highlight=False)
        self._progress: Any = progress.Progress(
            progress.SpinnerColumn(),
            progress.TextColumn("{task.description:<20}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("tokens"),
            progress.TimeElapsedColumn(),
        )
        self._task = self._progress.add_task("", total=None)
        self._live: Any = Live(console=self._console, transient=True)

    def phase_started(self, phase: str, total_tokens: int) -> None:
        """Start the bar anew."""
        self._progress.reset(self._task, description=phase, total=total_tokens or None)
        self._draw()

    def side_started(self, side: str) -> None:
        """Start the live part of the screen."""
        super().side_started(side)
        self._live.start()

    def advanced(self, n_tokens: int) -> None:
        """Move the bar."""
        self._progress.advance(self._task, n_tokens)

    def side_finished(self, side: str) -> None:  # noqa: ARG002
        """Put the streamed text in the place of the live part."""
        self._live.stop()
        self._console.print(self._panel())

    def show_text(self, new_text: str) -> None:
        """Redraw the streamed text."""
        if new_text:
            self._draw()

    def say(self, line: str) -> None:
        """Print a line."""
        self._console.print(line, markup=False, soft_wrap=True)

    def show_table(self, rows: Sequence[TableRow], columns: Sequence[str] = COLUMNS) -> None:
        """Draw the table."""
        from rich.table import Table

        table = Table(*columns[:1], header_style="bold")
        for column in columns[1:]:
            table.add_column(column, justify="right", no_wrap=True)
        for row in rows:
            table.add_row(*row.cells(), style="bold" if row.reference else None)
        self._console.print(table)

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._live.stop()

    def _panel(self) -> Any:
        from rich.panel import Panel
        from rich.text import Text

        return Panel(
            Text(self._stream.text.strip() or "\u2026"), title=self._question, title_align="left"
        )

    def _draw(self) -> None:
        from rich.console import Group

        self._live.update(Group(self._panel(), self._progress))


def make_display(tokenizer: Tokenizer, question: str) -> Display:
    """Return the best display for this machine and this output."""
    has_rich = importlib.util.find_spec("rich") is not None
    kind = RichDisplay if has_rich and sys.stdout.isatty() else PlainDisplay
    return kind(tokenizer, question)
