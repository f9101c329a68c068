"""Finding: what is wrong, how that was seen, why it matters, and what to do.

Structure
    a rule (`doctor_machine_rules`, `doctor_use_rules`): Evidence -> Finding or None
"""

from __future__ import annotations

import textwrap
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Finding", "as_json", "as_text"]

Severity = Literal["problem", "advice"]

WIDTH = 96
COLOURS = {"problem": "31", "advice": "33"}


@dataclass(frozen=True)
class Finding:
    """One thing to do something about.

    Parameters
    ----------
    rule : str
        Name of the rule that found it; docs/doctor.md has a section of that name.
    severity : {"problem", "advice"}
        Whether it costs much, or would be better otherwise.
    title : str
        What it is.
    figure : str
        What was measured, with units.
    why : str
        What it costs.
    fix : tuple of str
        What to do, one thing a line; a line that starts with ``$`` is a command.
    """

    rule: str
    severity: Severity
    title: str
    figure: str
    why: str
    fix: tuple[str, ...]


def as_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """Return the findings for machines."""
    return {
        "healthy": not findings,
        "findings": [{**asdict(finding), "fix": list(finding.fix)} for finding in findings],
    }


def as_text(findings: Sequence[Finding], *, colour: bool = False) -> str:
    """Return the findings for people, the problems first.

    Parameters
    ----------
    colour : bool
        Whether a terminal shows it.
    """
    if not findings:
        return "nothing found"
    parts = []
    for finding in sorted(findings, key=lambda found: found.severity != "problem"):
        head = f"{finding.severity}: {finding.title}  [{finding.rule}]"
        if colour:
            head = f"\x1b[1;{COLOURS[finding.severity]}m{head}\x1b[0m"
        lines = [head, *_paragraph("seen", finding.figure), *_paragraph("why", finding.why)]
        for number, step in enumerate(finding.fix):
            label = "" if number else "fix"
            # A command is copied as it stands, however long.
            if step.startswith("$"):
                lines.append(f"  {label:<5} {step}")
            else:
                lines += _paragraph(label, step)
        parts.append("\n".join(lines))
    n_problems = sum(finding.severity == "problem" for finding in findings)
    n_advices = len(findings) - n_problems
    parts.append(f"{_counted(n_problems, 'problem')}, {_counted(n_advices, 'piece')} of advice")
    return "\n\n".join(parts)


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _paragraph(label: str, text: str) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=f"  {label:<5} ",
        subsequent_indent=" " * 8,
        break_long_words=False,
        break_on_hyphens=False,
    )
