"""What a file of KV blocks says of the cache it came from: enough to make one like it."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pagealloc.errors import CacheFileError
from pagealloc.kv.layout import KVLayout
from pagealloc.kv.quantisation import quantisation_of
from pagealloc.kv.rope import Rope

if TYPE_CHECKING:
    from pagealloc.kv.quantisation import Quantisation

__all__ = ["describe_cache", "options_of"]

LAYOUT_FIELDS = (
    "n_layers", "n_kv_heads", "head_dim", "v_head_dim", "max_tokens", "order", "block_tokens",
    "pad_rows",
)  # fmt: skip
"""Of the layout; its pages are those of the machine that loads it."""
QUANTISATION_FIELDS = ("k_type", "v_type", "rotate", "residual_tokens")


def describe_cache(layout: KVLayout, quantisation: Quantisation | None) -> bytes:
    """Return the description, JSON."""
    fields = {name: getattr(layout, name) for name in LAYOUT_FIELDS}
    fields |= {"k_dtype": str(layout.k_dtype), "v_dtype": str(layout.v_dtype)}
    fields["rope"] = None if layout.rope is None else asdict(layout.rope)
    described: dict[str, Any] = {"layout": fields, "quantisation": None}
    if quantisation is not None:
        stored = quantisation.cold_layout
        described["quantisation"] = {
            "k_type": str(stored.k_dtype),
            "v_type": str(stored.v_dtype),
            "rotate": quantisation.rotate,
            "residual_tokens": quantisation.residual_tokens,
        }
    return json.dumps(described, sort_keys=True).encode()


def options_of(
    data: bytes, whose: str, page_bytes: int | None = None
) -> tuple[KVLayout, dict[str, Any]]:
    """Return the layout that a description says, and the arguments of `KVCache` that quantise.

    Raises
    ------
    CacheFileError
        It does not say, or what is impossible.
    """
    try:
        described = json.loads(data)
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in described["layout"].items()
        }
        if page_bytes is not None:
            fields["page_bytes"] = page_bytes
        rope = fields.pop("rope")
        layout = KVLayout(**fields, rope=None if rope is None else Rope(**rope))
        quantisation = described["quantisation"] or {}
        if quantisation:
            quantisation = {name: quantisation[name] for name in QUANTISATION_FIELDS}
            types = quantisation["k_type"], quantisation["v_type"]
            quantisation_of(
                layout, None, types, quantisation["rotate"], quantisation["residual_tokens"]
            )
    except (
        ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError,
    ) as error:  # fmt: skip
        raise CacheFileError(f"{whose}: it does not describe a cache: {error}") from error
    return layout, quantisation
