"""The shape of a model's KV cache, from its GGUF metadata or from numbers given by hand."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pagealloc.cli import CommandError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pagealloc.kv import model_shape as kv_model_shape

__all__ = ["LayerGroup", "ModelShape", "read_model_shape", "shape_from_metadata"]


@dataclass(frozen=True)
class LayerGroup:
    """Layers that are alike."""

    n_layers: int
    n_kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class ModelShape:
    """What determines the bytes of a model's KV cache."""

    groups: tuple[LayerGroup, ...]
    context_tokens: int | None
    sliding_window_tokens: int | None = None

    def __str__(self) -> str:
        return " + ".join(
            f"{group.n_layers} layers × {group.n_kv_heads} KV heads × {group.head_dim}"
            for group in self.groups
        )


def read_model_shape(path: Path) -> ModelShape:
    """Read the shape from a GGUF file; of the weights nothing is read.

    Raises
    ------
    CommandError
        The package that reads GGUF is not installed.
    ValueError
        The file is no GGUF, or holds no shape that can be planned for.
    """
    from pagealloc.kv.model_shape import read_gguf

    try:
        found = read_gguf(path)
    except ModuleNotFoundError as missing:
        raise CommandError(
            f"{missing}, or give --layers, --kv-heads, --head-dim and --ctx"
        ) from missing
    try:
        return _in_groups(found)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def shape_from_metadata(get: Callable[[str], Any]) -> ModelShape:
    """Return the shape that GGUF metadata tells; `get` returns a key's value, or None."""
    from pagealloc.kv.model_shape import shape_from_gguf_metadata

    return _in_groups(shape_from_gguf_metadata(get))


def _in_groups(found: kv_model_shape.ModelShape) -> ModelShape:
    k_dim, v_dim = found.k_head_dim, found.v_head_dim
    if k_dim != v_dim:
        raise ValueError(f"K heads of {k_dim} and V heads of {v_dim} values differ: unsupported")
    return ModelShape(
        groups=tuple(
            LayerGroup(count, heads, k_dim) for heads, count in Counter(found.n_kv_heads).items()
        ),
        context_tokens=found.context_tokens,
        sliding_window_tokens=found.sliding_window_tokens,
    )
