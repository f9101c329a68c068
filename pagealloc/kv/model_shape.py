"""ModelShape: the shape of a model's KV cache, from a GGUF file or a Hugging Face config.

Sources
    GGUF's keys: the GGUF specification, "Standardized key-value pairs".  Which values of a head are
    a pair for the rotation: llama.cpp's table by architecture.  Hugging Face: the attributes of the
    configuration classes of transformers, and its functions that compute ``inv_freq``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pagealloc.kv.rope import Rope, RopePairs

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable

__all__ = ["ModelShape", "read_gguf", "read_hf_config", "shape_from_gguf_metadata"]

# Where llama.cpp rotates every layer alike, by which pairs; of others nothing is claimed.
_NEIGHBOURS = (
    "llama deci baichuan starcoder orion internlm2 minicpm xverse command-r olmo arctic deepseek "
    "chatglm granite granitemoe chameleon smollm3 arcee ernie4_5 mistral3"
)
_HALVES = (
    "falcon stablelm qwen qwen2 qwen2moe qwen3 qwen3moe olmo2 olmoe phi2 phi3 gemma gemma2 "
    "starcoder2 openelm gptneox codeshell nemotron exaone dbrx"
)

# Hugging Face's names of layers that keep K and V.
_ATTENTION_LAYERS = ("full_attention", "sliding_attention", "chunked_attention", "attention")


@dataclass(frozen=True)
class ModelShape:
    """What determines the rows of a model's KV cache.

    Layers without KV heads, as hybrid models have them, keep no rows and are left out.
    """

    n_kv_heads: tuple[int, ...]
    k_head_dim: int
    v_head_dim: int
    context_tokens: int | None = None
    sliding_window_tokens: int | None = None
    rope: Rope | None = None
    dtype: str | None = None


# --- GGUF -------------------------------------------------------------------------------------


def read_gguf(path: str | os.PathLike[str]) -> ModelShape:
    """Read the shape from a GGUF file; of the weights nothing is read.

    Raises
    ------
    ModuleNotFoundError
        The package that reads GGUF is not installed.
    FileNotFoundError, ValueError
        There is no such file; it is no GGUF, or tells no shape.
    """
    try:
        from gguf import GGUFReader
    except ModuleNotFoundError as missing:
        if missing.name != "gguf":
            raise
        raise ModuleNotFoundError(
            "reading a model file needs the package 'gguf', which is not installed: "
            "pip install 'pagealloc[demo]'",
            name="gguf",
        ) from missing
    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError, KeyError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no readable GGUF file: {error}") from error

    def get(key: str) -> Any:
        field = reader.get_field(key)
        return None if field is None else field.contents()

    factors = next((t.data for t in reader.tensors if t.name == "rope_freqs.weight"), None)
    try:
        return shape_from_gguf_metadata(get, factors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def shape_from_gguf_metadata(
    get: Callable[[str], Any], freq_factors: Iterable[float] | None = None
) -> ModelShape:
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
    return ModelShape(
        n_kv_heads=tuple(int(heads) for heads in per_layer if heads),
        k_head_dim=k_dim,
        v_head_dim=v_dim,
        context_tokens=number("context_length"),
        sliding_window_tokens=number("attention.sliding_window"),
        rope=_gguf_rope(architecture, get, k_dim, freq_factors),
    )


def _gguf_rope(
    architecture: str, get: Callable[[str], Any], k_dim: int, factors: Iterable[float] | None
) -> Rope | None:
    """Return how the model rotates K, None where that is not known for sure."""
    scaling = get(f"{architecture}.rope.scaling.type")
    pairs: RopePairs = "neighbours" if architecture in _NEIGHBOURS.split() else "halves"
    if pairs == "halves" and architecture not in _HALVES.split():
        return None
    if scaling not in (None, "none", "linear"):
        return None
    scale = 1.0
    if scaling == "linear":
        scale = 1 / (get(f"{architecture}.rope.scaling.factor") or 1.0)
    return Rope(
        n_dims=int(get(f"{architecture}.rope.dimension_count") or k_dim),
        base=float(get(f"{architecture}.rope.freq_base") or 10000.0),
        pairs=pairs,
        scale=scale,
        freq_factors=None if factors is None else tuple(float(factor) for factor in factors),
    )


# --- Hugging Face -----------------------------------------------------------------------------


def read_hf_config(config: Mapping[str, Any]) -> ModelShape:
    """Return the shape that the dict of a ``config.json`` tells.

    Raises
    ------
    TypeError
        `config` is no mapping.
    ValueError
        It lacks what determines the shape; the message names it.
    """
    if not isinstance(config, Mapping):
        raise TypeError(
            f"config must be the dict of a config.json, not {type(config).__name__}: "
            "json.load() it, or call to_dict() of a configuration object"
        )
    if isinstance(config.get("text_config"), Mapping):  # of a model that also sees or hears
        config = config["text_config"]

    def number(*names: str) -> int | None:
        for name in names:
            value = config.get(name)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
        return None

    n_layers = number("num_hidden_layers", "n_layer", "num_layers")
    n_heads = number("num_attention_heads", "n_head", "num_heads")
    hidden = number("hidden_size", "n_embd", "d_model")
    if not n_layers or not n_heads:
        raise ValueError(
            "the config lacks num_hidden_layers or num_attention_heads: has this model a KV cache?"
        )
    k_dim = number("head_dim") or (hidden // n_heads if hidden else None)
    v_dim = number("v_head_dim") or k_dim
    n_kv_heads = number("num_key_value_heads", "num_kv_heads")
    if config.get("multi_query") is True and not config.get("new_decoder_architecture"):
        n_kv_heads = 1
    if number("kv_lora_rank"):  # multi-head latent attention, as transformers caches it: expanded
        n_kv_heads = n_heads
        k_dim = (number("qk_nope_head_dim") or 0) + (number("qk_rope_head_dim") or 0)
    if not k_dim or not v_dim:
        raise ValueError("the config lacks head_dim, and hidden_size to tell it from")
    kinds = config.get("layer_types") or ["attention"] * n_layers
    if len(kinds) != n_layers:
        raise ValueError(f"layer_types names {len(kinds)} layers of {n_layers}")
    n_attention = sum(kind in _ATTENTION_LAYERS for kind in kinds)
    if not n_attention:
        raise ValueError(f"none of layer_types is one of {', '.join(_ATTENTION_LAYERS)}")
    dtype = config.get("dtype") or config.get("torch_dtype")
    return ModelShape(
        n_kv_heads=(n_kv_heads or n_heads,) * n_attention,
        k_head_dim=k_dim,
        v_head_dim=v_dim,
        context_tokens=number("max_position_embeddings", "n_positions", "max_seq_len"),
        sliding_window_tokens=number("sliding_window"),
        rope=_hf_rope(config, k_dim),
        dtype=dtype if isinstance(dtype, str) else None,
    )


def _hf_rope(config: Mapping[str, Any], k_dim: int) -> Rope | None:
    """Return how the model rotates K, None where that is not known for sure."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    base = scaling.get("rope_theta") or config.get("rope_theta")
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if not base or config.get("kv_lora_rank") or "rope_local_base_freq" in config:
        return None
    partial = config.get("partial_rotary_factor") or scaling.get("partial_rotary_factor") or 1.0
    n_dims = int(k_dim * partial)
    if kind == "default":
        return Rope(n_dims, base=float(base))
    if kind == "linear":
        return Rope(n_dims, base=float(base), scale=1 / scaling["factor"])
    if kind == "llama3":
        return Rope(
            n_dims, base=float(base), freq_factors=_llama3_factors(n_dims, float(base), scaling)
        )
    return None


def _llama3_factors(n_dims: int, base: float, scaling: Mapping[str, Any]) -> tuple[float, ...]:
    """Return by what Llama 3.1 divides each frequency: long waves by all of the factor."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelengths = 2 * math.pi / Rope(n_dims, base=base).frequencies()
    turns = scaling["original_max_position_embeddings"] / wavelengths
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return tuple(1 / ((1 - smooth) / scaling["factor"] + smooth))
