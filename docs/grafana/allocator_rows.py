"""The rows of the allocators: latency, memory, faults and purges."""

from collections.abc import Iterator

from expressions import (
    BUDGET_USED,
    KV_BUDGET_USED,
    LATENCY,
    LATENCY_SELECTED,
    REQUESTS,
    quantile,
    rate,
    ratio,
    total,
)
from limits import BUDGET_LIMITS
from panels import AnyPanel, Query, bars, graph, heat, linked

P99_BOUND = Query("pagealloc:alloc_latency_p99_bound:seconds", "bound", "red", is_dashed=True)
THP_PAGE = "https://docs.kernel.org/admin-guide/mm/transhuge.html"


def latency() -> Iterator[AnyPanel]:
    """Yield how long allocations take; sampled, the allocator times one in many."""
    yield graph(
        "P99 by size class",
        [Query(quantile(0.99, "size_class"), "{{size_class}}"), P99_BOUND],
        "s",
        "One allocation in a hundred of each size class takes longer. Buckets grow by the factor "
        "two, so a line is exact to that. All classes up at once: the processors are overbooked; "
        "one class: it goes to the kernel each time, `prefault` or a longer `purge_after_s` help. "
        "The bound comes from the rules.",
        width=12,
        is_log=True,
    )
    yield heat(
        "Latency",
        Query(
            f"sum by (le) (increase({LATENCY}_bucket{{{LATENCY_SELECTED}}}[$__rate_interval]))",
            "{{le}}",
        ),
        "s",
        "How many of the sampled allocations took how long. Two bands are usual: served from a "
        "thread's magazine in tens of nanoseconds, and what goes further. A band that moves up is "
        "worth a look, a few lone cells at the top are not.",
        width=12,
    )
    yield graph(
        "P50 by size class",
        [Query(quantile(0.5, "size_class"), "{{size_class}}")],
        "s",
        "The usual allocation. It should be flat from the smallest class to the largest.",
        width=8,
        is_log=True,
    )
    yield graph(
        "P99.9 by size class",
        [Query(quantile(0.999, "size_class"), "{{size_class}}")],
        "s",
        "One allocation in a thousand takes longer. Of fewer than a thousand samples it is the "
        "longest of them: widen the time range before you trust it.",
        width=8,
        is_log=True,
    )
    yield graph(
        "P99 by NUMA node",
        [Query(quantile(0.99, "numa_node"), "node {{numa_node}}")],
        "s",
        "By the node the allocating thread ran on. If one node is slower, its memory is short or "
        "far: `pagealloc info` shows what each has.",
        width=8,
        is_log=True,
    )


def memory() -> Iterator[AnyPanel]:
    """Yield what allocators hold, and against what."""
    yield graph(
        "Held against live",
        [
            Query(
                total("pagealloc_committed_bytes"),
                "committed: may be backed",
                "purple",
                is_dashed=True,
            ),
            Query(total("pagealloc_held_bytes"), "held: physical", "blue"),
            Query(total("pagealloc_active_bytes"), "active: pages in use or at hand", "yellow"),
            Query(total("pagealloc_live_bytes"), "live: handed out", "green"),
            Query(total("pagealloc_idle_bytes"), "idle: freed, at hand", "text"),
        ],
        "bytes",
        "Memory of allocators, KV caches apart. Held should follow live within seconds. Held far "
        "above active: waiting to be purged, or long-lived blocks lie scattered: call `trim()`.",
        width=12,
    )
    yield bars(
        "Budgets",
        [
            Query(
                f"max by (instance, allocator) ({BUDGET_USED})",
                "{{instance}}: allocator {{allocator}}",
            ),
            Query(
                f"max by (instance, cache) ({KV_BUDGET_USED})", "{{instance}}: KV cache {{cache}}"
            ),
        ],
        "percentunit",
        "Of each allocator with a budget what is committed, of each KV cache what open sequences "
        "need: published prefixes take the rest, and give way. At 100 % requests are refused.",
        width=6,
        limits=BUDGET_LIMITS,
        most=1,
    )
    yield linked(
        graph(
            "Huge pages",
            [
                Query(
                    ratio(
                        total("pagealloc_huge_bytes", "instance"),
                        total("pagealloc_held_bytes", "instance"),
                    ),
                    "{{instance}}",
                )
            ],
            "percentunit",
            "Share of held memory that huge pages map. Low though huge pages were asked for: "
            "`pagealloc doctor` says why, and which setting changes it. No data: the kernel cannot "
            "say, before Linux 6.7.",
            width=6,
            most=1,
        ),
        "Transparent huge pages, as the kernel has them",
        THP_PAGE,
    )
    yield graph(
        "Allocations and frees",
        [
            Query(rate("pagealloc_allocs_total"), "allocations"),
            Query(rate("pagealloc_frees_total"), "frees"),
        ],
        "ops",
        "Lines that part mean that something keeps what it allocates: compare with *Open buffers*.",
        width=12,
    )
    yield graph(
        "Open buffers",
        [
            Query(
                total("pagealloc_live_blocks", "instance, allocator"), "{{instance}}/{{allocator}}"
            )
        ],
        "short",
        "Buffers open now. A line that only rises is a leak: `pagealloc profile` shows which lines "
        "of the program hold them.",
        width=12,
    )


def faults_and_purges() -> Iterator[AnyPanel]:
    """Yield what the program asks of the kernel."""
    faults = "pagealloc_process_page_faults_total"
    yield graph(
        "Page faults",
        [Query(rate(faults, "kind"), "{{kind}}")],
        "ops",
        "Of the whole process. Minor faults back a page at its first touch: many of them in steady "
        "state mean that memory is given back and fetched again. Major faults read a disk: the "
        "machine swaps, or a model file is read for the first time.",
        width=8,
    )
    yield graph(
        "Page faults for each allocation",
        [Query(ratio(rate(faults), REQUESTS), "faults")],
        "short",
        "Near 0 when memory is reused. If it stays near 1 or above, allocations live on fresh "
        "pages: a longer `purge_after_s`, a `Pool` or huge pages help.",
        width=8,
    )
    yield graph(
        "Purged",
        [Query(rate("pagealloc_purged_bytes_total", "instance"), "{{instance}}")],
        "Bps",
        "Physical memory that goes back to the kernel, a second. Peaks after a burst are what is "
        "wanted; a constant stream along with page faults is not: lengthen `purge_after_s`.",
        width=8,
    )
    yield graph(
        "Collections",
        [Query(rate("pagealloc_collections_total", "instance"), "{{instance}}")],
        "ops",
        "How often allocators go through what is idle: twice in `purge_after_s` while there is "
        "something idle. None at all with idle bytes: purging is switched off.",
        width=8,
    )
    yield graph(
        "Idle",
        [Query(total("pagealloc_idle_bytes", "instance, allocator"), "{{instance}}/{{allocator}}")],
        "bytes",
        "Freed and kept at hand for the next allocation. It goes back by itself; if it is large "
        "all the time, the program's load comes in waves shorter than `purge_after_s`.",
        width=8,
        is_stacked=True,
    )
    yield graph(
        "Reserved address space",
        [Query(total("pagealloc_reserved_bytes", "instance"), "{{instance}}")],
        "bytes",
        "Taken from the kernel; costs nothing by itself. Of interest under `ulimit -v` alone.",
        width=8,
    )
