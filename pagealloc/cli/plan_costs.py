"""What ``pagealloc plan`` computes: the bytes of each way to keep a KV cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pagealloc.kv import KVLayout
from pagealloc.kv.quantisation import KV_KINDS, quantisation_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pagealloc.cli.model_shape import ModelShape

__all__ = ["BLOCK_VALUES", "Cost", "Question", "costs_of", "is_quantisable"]

BLOCK_VALUES = 32  # values that share a scale
PAGE_TABLE_ENTRY_BYTES = 8
NAMES = {"f16": "float16"}


@dataclass(frozen=True)
class Question:
    """What is planned for."""

    shape: ModelShape
    context_tokens: int
    used_tokens: int
    """Tokens a sequence really has, the shared prefix among them."""
    shared_tokens: int
    sequences: int
    memory_bytes: int
    page_bytes: int
    max_map_count: int | None = None
    kv: str | None = None
    """Only this one of `KV_KINDS`; all by default."""


@dataclass(frozen=True)
class Cost:
    """One way to keep the cache, and its bytes."""

    name: str
    token_bytes: int
    """The rows of one token, K and V of all layers."""
    sequence_bytes: int
    """What each sequence holds of its own."""
    page_table_bytes: int
    """The page tables of each sequence, over shared pages too."""
    shared_bytes: int
    """What all sequences hold together, once."""
    total_bytes: int
    fitting_sequences: int


def costs_of(question: Question) -> list[Cost]:
    """Return the cost of each way to keep the cache that suits the model."""
    layouts = [
        KVLayout(
            group.n_layers,
            group.n_kv_heads,
            group.head_dim,
            question.context_tokens,
            page_bytes=question.page_bytes,
        )
        for group in question.shape.groups
    ]
    preallocated = _cost(
        question,
        "preallocated float16",
        token_bytes=sum(layout.token_bytes for layout in layouts),
        sequence_bytes=sum(layout.window_bytes for layout in layouts),
        page_table_bytes=_page_table_bytes(
            question, [(layout, question.context_tokens) for layout in layouts]
        ),
        shared_bytes=0,
    )
    kinds = [kind for kind in KV_KINDS if kind == (question.kv or kind)]
    if not is_quantisable(question.shape):
        kinds = [kind for kind in kinds if not KV_KINDS[kind]]
    return [preallocated, *(_paged_cost(question, kind, layouts) for kind in kinds)]


def is_quantisable(shape: ModelShape) -> bool:
    """Return whether the rows of all layers are whole blocks of values that share a scale."""
    return all(group.n_kv_heads * group.head_dim % BLOCK_VALUES == 0 for group in shape.groups)


def _paged_cost(question: Question, kind: str, layouts: Iterable[KVLayout]) -> Cost:
    """Return the cost of windows that hold the pages of the tokens in use.

    The rows of a layer start on a page.  Of the prefix, whole pages are shared; the page where a
    sequence goes on after it is copied by each, and so is the ring of rows that are not quantised
    yet.
    """
    goes_on = question.used_tokens > question.shared_tokens
    shared_bytes = sequence_bytes = token_bytes = 0
    windows, arguments = [], KV_KINDS[kind]
    for layout in layouts:
        types = arguments.get("k_type"), arguments.get("v_type")
        how = quantisation_of(layout, arguments.get("quantize"), types, None, None)
        used, shared, ring = question.used_tokens, question.shared_tokens, 0
        stored = layout
        if how is not None:
            stored = how.cold_layout
            ring = _pages(how.ring_layout, min(used, how.ring_layout.max_tokens))
            windows.append((how.ring_layout, min(used, how.ring_layout.max_tokens)))
            used, shared = how.n_cold(used), how.n_cold(shared)
        windows.append((stored, used))
        used_pages = _pages(stored, used)
        prefix_pages = shared * _row_bytes(stored) // question.page_bytes
        if not goes_on:
            prefix_pages, used_pages, ring = used_pages + ring, used_pages + ring, 0
        token_bytes += stored.token_bytes
        shared_bytes += layout.n_layers * prefix_pages * question.page_bytes
        sequence_bytes += layout.n_layers * (used_pages - prefix_pages + ring) * question.page_bytes
    return _cost(
        question,
        f"paged {NAMES.get(kind, kind)}",
        token_bytes=token_bytes,
        sequence_bytes=sequence_bytes,
        page_table_bytes=_page_table_bytes(question, windows),
        shared_bytes=shared_bytes,
    )


def _row_bytes(layout: KVLayout) -> int:
    """Return the bytes of K and V of a token in one of the layers, which are alike."""
    return layout.token_bytes // layout.n_layers


def _pages(layout: KVLayout, n_tokens: int) -> int:
    """Return the pages of a layer's rows."""
    return -(-n_tokens * _row_bytes(layout) // layout.page_bytes)


def _page_table_bytes(question: Question, windows: Iterable[tuple[KVLayout, int]]) -> int:
    """Return the lowest level of page tables; a page of it maps 2 MiB where pages have 4 KiB."""
    mapped_bytes = question.page_bytes**2 // PAGE_TABLE_ENTRY_BYTES
    return question.page_bytes * sum(
        layout.n_layers * -(-n_tokens * _row_bytes(layout) // mapped_bytes)
        for layout, n_tokens in windows
    )


def _cost(
    question: Question,
    name: str,
    *,
    token_bytes: int,
    sequence_bytes: int,
    page_table_bytes: int,
    shared_bytes: int,
) -> Cost:
    one_more_bytes = sequence_bytes + page_table_bytes
    return Cost(
        name=name,
        token_bytes=token_bytes,
        sequence_bytes=sequence_bytes,
        page_table_bytes=page_table_bytes,
        shared_bytes=shared_bytes,
        total_bytes=shared_bytes + question.sequences * one_more_bytes,
        fitting_sequences=max(question.memory_bytes - shared_bytes, 0) // one_more_bytes,
    )
