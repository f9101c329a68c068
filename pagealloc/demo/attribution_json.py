"""report.json: every figure of every step, the unit of each number in its key.

Keys end in ``_bytes``, ``_ns``, ``_tokens``, ``_percent`` or ``_percent_points``, or begin with
``n_``.  Lists under ``rounds`` hold a value a round.  `SCHEMA_VERSION` grows when a key changes its
meaning or goes; new keys may come at any time.
"""

from dataclasses import asdict
from typing import Any

from pagealloc.demo.attribution import FIGURES, Attribution, TakenStep, share_of_same_tokens

__all__ = ["SCHEMA", "SCHEMA_VERSION", "attribution_json"]

SCHEMA, SCHEMA_VERSION = "pagealloc-report", 1


def attribution_json(attribution: Attribution) -> dict[str, Any]:
    """Return steps, totals and claims as report.json has them; the caller adds what was run."""
    return {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "steps": [_step(attribution, step) for step in attribution.steps],
        "total": {
            f"{figure.name}_percent": attribution.total_percent(figure.key) for figure in FIGURES
        },
        "reference_claim": {
            f"{figure.name}_percent": figure.reference_percent
            for figure in FIGURES
            if figure.reference_percent is not None
        },
    }


def _step(attribution: Attribution, taken: TakenStep) -> dict[str, Any]:
    step = taken.step
    described = {
        "key": step.key,
        "title": step.title,
        "what": step.what,
        "side": step.side,
        "kv": step.kv,
        "backing": step.backing if step.side == "pagealloc" else None,
        "shares_prompt": step.shares_prompt,
        "unavailable": None if taken.unavailable is None else asdict(taken.unavailable),
    }
    if not taken.runs:
        return described
    index = attribution.taken.index(taken)
    reference = attribution.steps[0].token_ids
    last = taken.runs[-1]
    return described | {
        "medians": {figure.key: taken.value(figure.key) for figure in FIGURES},
        "rounds": {figure.key: taken.values(figure.key) for figure in FIGURES},
        "of_reference": {
            f"{figure.name}_percent_points": attribution.percent_points(figure.key)[index]
            for figure in FIGURES
        },
        "huge_bytes": taken.huge_bytes,
        "page_table_bytes": last.side.page_table_bytes,
        "peak_rss_bytes": last.side.peak_rss_bytes,
        "n_prompt_tokens_computed": last.side.prompt_tokens_computed,
        "alloc_block_bytes": last.allocations.block_bytes,
        "n_allocations": last.allocations.n_allocations,
        "same_tokens_percent": 100.0 * share_of_same_tokens(reference, taken.token_ids),
    }
