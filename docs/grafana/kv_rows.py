"""The row of the KV caches: what they hold, need and share."""

from collections.abc import Iterator

from expressions import HIT_TOKENS, rate, ratio, total
from panels import AnyPanel, Limits, Query, graph


def kv_cache() -> Iterator[AnyPanel]:
    """Yield what KV caches hold, need and share."""
    yield graph(
        "Physical against needed",
        [
            Query(total("pagealloc_kv_held_bytes"), "held: physical", "blue"),
            Query(total("pagealloc_kv_needed_bytes"), "needed: distinct rows", "green"),
            Query(
                f"{total('pagealloc_kv_needed_bytes')} + {total('pagealloc_kv_shared_bytes')}",
                "needed without sharing",
                "orange",
                is_dashed=True,
            ),
            Query(total("pagealloc_kv_warm_bytes"), "warm: of closed sequences", "text"),
        ],
        "bytes",
        "Held should lie just above needed. The gap up to *needed without sharing* is what shared "
        "prefixes save.",
        width=12,
    )
    yield graph(
        "Waste",
        [
            Query(
                ratio(total("pagealloc_kv_waste_bytes"), total("pagealloc_kv_held_bytes")),
                "of held bytes",
            )
        ],
        "percentunit",
        "Share of held bytes that are no rows: rounding to pages and blocks, copied tails, page "
        "tables, warm windows. High with many short sequences: use smaller pages or "
        '`order="block"`, or a shorter `purge_after_s`.',
        width=6,
        limits=Limits(0.3, 0.6),
    )
    yield graph(
        "Saved by sharing",
        [Query(total("pagealloc_kv_shared_bytes", "instance, cache"), "{{instance}}/{{cache}}")],
        "bytes",
        "Of each page, all references beyond the first. Falls to 0 when sequences share nothing "
        "any more, or wrote into what they shared.",
        width=6,
        is_stacked=True,
    )
    yield graph(
        "Tokens",
        [Query(total("pagealloc_kv_tokens", "instance, cache"), "{{instance}}/{{cache}}")],
        "short",
        "Tokens of all open sequences; shared ones count in each.",
        width=6,
        is_stacked=True,
    )
    yield graph(
        "Sequences",
        [Query(total("pagealloc_kv_sequences", "instance, cache"), "{{instance}}/{{cache}}")],
        "short",
        "Open sequences. A line that only rises: sequences are not closed.",
        width=6,
        is_stacked=True,
    )
    yield graph(
        "Prefix hit rates",
        [
            Query(HIT_TOKENS, "of tokens"),
            Query(
                ratio(rate("pagealloc_prefix_hits_total"), rate("pagealloc_prefix_lookups_total")),
                "of lookups",
            ),
        ],
        "percentunit",
        "Share of tokens, and of lookups, that a stored prefix served. Many lookups and few "
        "tokens: prompts part early, put what varies at their end.",
        width=12,
        most=1,
    )
    yield graph(
        "Prefix blocks",
        [
            Query(total("pagealloc_prefix_blocks"), "stored"),
            Query(total("pagealloc_prefix_pinned_blocks"), "pinned"),
        ],
        "short",
        "Blocks in the prefix index. If all are pinned, nothing can be evicted for new ones.",
        width=8,
    )
    yield graph(
        "Prefix blocks stored and evicted",
        [
            Query(rate("pagealloc_prefix_stored_blocks_total"), "stored"),
            Query(rate("pagealloc_prefix_evicted_blocks_total"), "evicted"),
        ],
        "ops",
        "As many evicted as stored with a falling hit rate: the cache's budget is too small for "
        "the prompts that come.",
        width=8,
    )
    yield graph(
        "Kernel mappings",
        [Query(total("pagealloc_kv_mappings", "instance"), "{{instance}}")],
        "short",
        "Mappings that windows cost, of `vm.max_map_count` (65,530 unless raised). Near it, "
        'prefixes are copied instead of shared: use `order="block"`, or raise the limit.',
        width=8,
        limits=Limits(40_000, 60_000),
    )
