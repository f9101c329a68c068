"""The shape of a model's KV cache, from its GGUF metadata or from numbers given by hand."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pagealloc.cli import CommandError

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
    try:
        from gguf import GGUFReader
    except ModuleNotFoundError as missing:
        if missing.name != "gguf":
            raise
        raise CommandError(
            "reading a model file needs the package 'gguf', which is not installed: "
            "pip install 'pagealloc[demo]', or give --layers, --kv-heads, --head-dim and --ctx"
        ) from missing
    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError, KeyError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no readable GGUF file: {error}") from error

    def get(key: str) -> Any:
        field = reader.get_field(key)
        return None if field is None else field.contents()

    try:
        return shape_from_metadata(get)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def shape_from_metadata(get: Callable[[str], Any]) -> ModelShape:
    """Return the shape that GGUF metadata tells; `get` returns a key's value, or None."""
    architecture = get("general.architecture")
    if architecture is None:
        raise ValueError("the metadata names no architecture")

    def number(key: str) -> int | None:
        value = get(f"{architecture}.{key}")
        return None if value is None else int(value)

    n_layers = number("block_count")
    n_heads = get(f"{architecture}.attention.head_count")
    n_kv_heads = get(f"{architecture}.attention.head_count_kv") or n_heads
    if not n_layers or not n_kv_heads:
        raise ValueError(
            f"the metadata lacks {architecture}.block_count or "
            f"{architecture}.attention.head_count: has this model a KV cache?"
        )
    per_layer = n_kv_heads if isinstance(n_kv_heads, list) else [n_kv_heads] * n_layers
    if len(per_layer) != n_layers:
        raise ValueError(f"{len(per_layer)} head counts are given for {n_layers} layers")

    embedding_length = number("embedding_length")
    most_heads = max(n_heads) if isinstance(n_heads, list) else n_heads
    default_dim = embedding_length // most_heads if embedding_length and most_heads else None
    k_dim = number("attention.key_length") or default_dim
    v_dim = number("attention.value_length") or default_dim
    if not k_dim or not v_dim:
        raise ValueError("the metadata tells no head dimension")
    if k_dim != v_dim:
        raise ValueError(f"K heads of {k_dim} and V heads of {v_dim} values differ: unsupported")
    # A layer without KV heads, as hybrid models have them, keeps no rows.
    alike = Counter(int(heads) for heads in per_layer if heads)
    return ModelShape(
        groups=tuple(LayerGroup(count, heads, k_dim) for heads, count in alike.items()),
        context_tokens=number("context_length"),
        sliding_window_tokens=number("attention.sliding_window"),
    )
