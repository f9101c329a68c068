"""Expressions: what the panels ask Prometheus for, of the jobs and instances that are selected.

A ratio without a denominator is no sample, never 0 or NaN.
"""

SELECTED = 'job=~"$job", instance=~"$instance"'
LATENCY = "mem_page_aligned_alloc_latency_seconds"
LATENCY_SELECTED = f'{SELECTED}, size_class=~"$size_class"'


def total(metric: str, by: str = "") -> str:
    """Return the sum of a gauge over what is selected."""
    return f"sum{_by(by)} ({metric}{{{SELECTED}}})"


def rate(counter: str, by: str = "") -> str:
    """Return how much a counter grows a second, over what is selected."""
    return f"sum{_by(by)} (rate({counter}{{{SELECTED}}}[$__rate_interval]))"


def ratio(part: str, whole: str) -> str:
    """Return a share; no sample where there is nothing to have a share in."""
    return f"{part} / ({whole} > 0)"


def quantile(q: float, by: str) -> str:
    """Return a quantile of the latency; no sample without durations, where it would be NaN."""
    buckets = f"{LATENCY}_bucket{{{LATENCY_SELECTED}}}"
    labels = f"{by}, le" if by else "le"
    return f"histogram_quantile({q}, sum by ({labels}) (rate({buckets}[$__rate_interval]))) >= 0"


def _by(labels: str) -> str:
    return f" by ({labels})" if labels else ""


SERVED = rate("pagealloc_allocs_total")
REFUSED = rate("pagealloc_failed_allocs_total")
REQUESTS = f"{SERVED} + {REFUSED}"
HELD = f"sum (pagealloc_held_bytes{{{SELECTED}}} or pagealloc_kv_held_bytes{{{SELECTED}}})"
BUDGET_USED = ratio(
    f"pagealloc_committed_bytes{{{SELECTED}}}", f"pagealloc_budget_bytes{{{SELECTED}}}"
)
# Not what is committed: published prefixes fill a budget in peace, and give way.
KV_BUDGET_USED = ratio(
    f"pagealloc_kv_needed_bytes{{{SELECTED}}}", f"pagealloc_kv_budget_bytes{{{SELECTED}}}"
)
HIT_TOKENS = ratio(
    rate("pagealloc_prefix_hit_tokens_total"), rate("pagealloc_prefix_asked_tokens_total")
)
BUDGET_LEFT = 'min(job:pagealloc_error_budget:remaining_ratio30d{job=~"$job"})'
