"""Rows: what the dashboard shows, a row a function, and in what order.

What is recorded comes from ``pagealloc/observe/prometheus_rules.yml``; everything else straight
from the metrics, so that the dashboard is of use without the rules as well.
"""

from collections.abc import Iterator

from allocator_rows import faults_and_purges, latency, memory
from expressions import (
    BUDGET_LEFT,
    BUDGET_USED,
    HELD,
    HIT_TOKENS,
    KV_BUDGET_USED,
    REFUSED,
    REQUESTS,
    SERVED,
    quantile,
    rate,
    ratio,
    total,
)
from kv_rows import kv_cache
from limits import BUDGET_LIMITS, LATENCY_LIMITS, REFUSED_LIMITS
from panels import AnyPanel, Limits, Query, graph, linked, number

BURN_WINDOWS = ("5m", "30m", "1h", "6h", "3d")
BURN_RATE_PAGE = "https://sre.google/workbook/alerting-on-slos/"


def overview() -> Iterator[AnyPanel]:
    """Yield eight numbers: is anything wrong?"""
    yield number(
        "Allocations",
        Query(SERVED, "served"),
        "ops",
        "Allocations served a second. Falls to nothing when the program idles, or hangs.",
    )
    yield number(
        "Refused",
        Query(ratio(REFUSED, REQUESTS), "refused"),
        "percentunit",
        "Share of allocations that were refused. Anything but 0 means that a budget or the machine "
        "ran out: see *Budgets*, then run `pagealloc doctor` on the machine.",
        limits=REFUSED_LIMITS,
    )
    yield number(
        "Error budget left",
        Query(BUDGET_LEFT, "left"),
        "percentunit",
        "What is left of the refusals that 99.9 % of served allocations allow in 30 days; below 0 "
        "the promise is broken. The worst of the selected jobs, all instances of each. "
        "No data: load the rules (`pagealloc dashboard --rules`).",
        limits=Limits(0.5, 0.1, is_low_bad=True),
    )
    yield number(
        "P99 latency",
        Query(quantile(0.99, ""), "P99"),
        "s",
        "One allocation in a hundred takes longer than this, all size classes together. If it is "
        "red, the row *Latency* shows which class it is.",
        limits=LATENCY_LIMITS,
    )
    yield number(
        "Held",
        Query(HELD, "held"),
        "bytes",
        "Physical memory behind allocators and KV caches. A page that many sequences share counts "
        "once, where the RSS of the process counts it once a mapping.",
    )
    yield number(
        "Budget used",
        Query(f"max({BUDGET_USED} or {KV_BUDGET_USED})", "used"),
        "percentunit",
        "The fullest of the selected budgets. Past 100 % requests are refused: raise "
        "`budget_bytes`, or hold less at a time. No data: nothing has a budget.",
        limits=BUDGET_LIMITS,
    )
    yield number(
        "KV held / needed",
        Query(ratio(total("pagealloc_kv_held_bytes"), total("pagealloc_kv_needed_bytes")), "held"),
        "percentunit",
        "Physical bytes of KV caches for each byte of distinct rows. 100 % is perfect; far above, "
        "warm windows or many short sequences hold more than their rows take: see *KV cache*.",
        limits=Limits(1.5, 3),
    )
    yield number(
        "Prefix hit rate",
        Query(HIT_TOKENS, "hit"),
        "percentunit",
        "Share of the tokens asked for that a stored prefix had. Low on prompts that you know are "
        "shared: they differ early (a date in the system prompt), or were evicted.",
    )


def error_budget() -> Iterator[AnyPanel]:
    """Yield how the promise is kept: 99.9 % of allocations served, over 30 days."""
    yield linked(
        graph(
            "Budget left",
            [
                Query(
                    'job:pagealloc_error_budget:remaining_ratio30d{job=~"$job"}',
                    "{{job}}",
                )
            ],
            "percentunit",
            "Of the refusals that 99.9 % served allocations allow in 30 days, by job, all "
            "instances together. Below 0 the promise is broken. No data: load the rules.",
            width=8,
            limits=Limits(0.5, 0.1, is_low_bad=True),
        ),
        "Alerting on objectives",
        BURN_RATE_PAGE,
    )
    yield linked(
        graph(
            "Burn rate",
            [
                Query(
                    f'max by (job) (job:pagealloc_error_budget_burn:rate{window}{{job=~"$job"}})',
                    f"{{{{job}}}} {window}",
                )
                for window in BURN_WINDOWS
            ],
            "short",
            "How many times too fast the budget is spent, over windows of several lengths; 1 "
            "spends it in 30 days. Alerts: 14.4 over 1 h and 5 min, 6 over 6 h and 30 min, 1 over "
            "3 days and 6 h.",
            width=8,
            limits=Limits(1, 14.4),
        ),
        "Alerting on objectives",
        BURN_RATE_PAGE,
    )
    yield graph(
        "Refused by instance",
        [
            Query(
                rate("pagealloc_failed_allocs_total", "instance, allocator"),
                "{{instance}}/{{allocator}}",
            )
        ],
        "ops",
        "Who spends the budget. Run `pagealloc doctor` on that machine.",
        width=8,
    )


ROWS = (
    ("Overview", overview),
    ("Latency", latency),
    ("Memory", memory),
    ("Faults and purges", faults_and_purges),
    ("KV cache", kv_cache),
    ("Error budget", error_budget),
)
