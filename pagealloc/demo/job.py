"""What the demo and a side's process say to each other.

The demo writes one `SideJob` as JSON to the process's standard input. The process answers with one
JSON object a line: its progress, every token as it is chosen, and at last its `SideResult`.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

__all__ = ["Emit", "SideJob", "SideResult", "event_line"]

Backing = Literal["auto", "base", "folios", "hugetlb"]

Emit = Callable[[dict[str, Any]], None]
"""Sends one event."""


@dataclass(frozen=True)
class SideJob:
    """The same work for both sides."""

    side: str  # a key of `sides.SIDES`
    kv: str  # a key of `kv.quantisation.KV_KINDS`: how the side with pagealloc stores K and V
    model_path: str
    n_ctx: int
    system_ids: list[int]  # the prompt that all conversations share
    question_ids: list[list[int]]  # one list a conversation
    stop_ids: list[int]
    max_new_tokens: int
    temperature: float
    seed: int
    backing: Backing = "auto"  # of the side with pagealloc, see `KVCache`
    shares_prompt: bool = True  # there, or else each conversation computes the whole prompt

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all conversations' prompts, the shared one counted in each."""
        return sum(len(self.system_ids) + len(ids) for ids in self.question_ids)

    def to_json(self) -> str:
        """Return the job as text for `from_json`."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return the job that `to_json` wrote."""
        return cls(**json.loads(text))


@dataclass(frozen=True)
class SideResult:
    """What a side did and what it cost.

    Page faults count from the moment the weights are loaded: `faults_startup` until all caches are
    created, `faults_first_inference` from there until every conversation has its first token.
    """

    kv_bytes: int  # held, page tables included, with all conversations alive
    page_table_bytes: int  # growth since the weights were loaded
    huge_bytes: int | None  # of the caches, mapped by huge pages; None: not known
    peak_rss_bytes: int
    faults_startup: int
    faults_first_inference: int
    startup_s: float
    first_token_s: list[float]  # one a conversation
    prompt_tokens_computed: int
    decode_tokens_per_s: float
    token_ids: list[list[int]] = field(repr=False)  # one list a conversation

    @property
    def faults_total(self) -> int:
        """Page faults of start-up and first inference together."""
        return self.faults_startup + self.faults_first_inference

    def to_json(self) -> dict[str, Any]:
        """Return the figures, `faults_total` among them."""
        return asdict(self) | {"faults_total": self.faults_total}

    @classmethod
    def from_json(cls, figures: dict[str, Any]) -> Self:
        """Return the result that `to_json` wrote."""
        return cls(**{name: value for name, value in figures.items() if name != "faults_total"})


def event_line(event: dict[str, Any]) -> str:
    """Return an event as one line of JSON."""
    return json.dumps(event, separators=(",", ":")) + "\n"
