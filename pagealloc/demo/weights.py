"""A Llama model out of a GGUF file: its shape, and its weights dequantised to float32.

GGUF stores a matrix row by row as (outputs, inputs), and the rows of Q and K so that RoPE turns
neighbouring pairs. Both are kept as they are: ``x @ matrix.T`` needs no copy, and a neighbouring
pair of floats is one complex number. Matrices that read the same input are stored as one.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pagealloc.demo.errors import UnsupportedModelError, require_extra

__all__ = ["LayerWeights", "LlamaShape", "LlamaWeights", "load_llama", "open_gguf", "read_shape"]

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class LlamaShape:
    """The numbers that fix a Llama's arithmetic."""

    name: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_dim: int
    ffn_dim: int
    vocab_tokens: int
    max_tokens: int
    norm_epsilon: float
    rope_base: float
    rope_dim: int
    rope_scale: float
    weights_bytes: int  # once they are float32

    @property
    def kv_row_values(self) -> int:
        """Values of one token's K (or V) in one layer."""
        return self.n_kv_heads * self.head_dim

    @property
    def kv_token_bytes(self) -> int:
        """Float16 K and V of one token in all layers."""
        return self.n_layers * 2 * self.kv_row_values * 2


@dataclass(frozen=True)
class LayerWeights:
    """One transformer block. C = hidden_dim, F = ffn_dim, D = head_dim."""

    attention_norm: Floats  # (C,)
    qkv: Floats  # ((n_heads + 2 n_kv_heads) D, C)
    attention_out: Floats  # (C, n_heads D)
    ffn_norm: Floats  # (C,)
    gate_up: Floats  # (2 F, C)
    ffn_down: Floats  # (C, F)


@dataclass(frozen=True)
class LlamaWeights:
    """Every weight of the model, float32."""

    embedding: Floats  # (vocab, C)
    layers: tuple[LayerWeights, ...]
    out_norm: Floats  # (C,)
    output: Floats  # (vocab, C); the embedding itself where the model ties the two
    rope_factors: Floats | None  # (rope_dim / 2,); divides the frequencies (Llama 3.1)


def open_gguf(path: Path) -> Any:
    """Open a GGUF file for reading; the tensors stay in the file until they are dequantised."""
    gguf = require_extra("gguf")
    try:
        return gguf.GGUFReader(path)
    except ValueError as broken:
        raise UnsupportedModelError(f"{path.name} is not a GGUF file: {broken}") from broken


def read_shape(reader: Any) -> LlamaShape:
    """Read the shape, and refuse what the engine does not compute."""

    def field(key: str, default: Any = None) -> Any:
        found = reader.fields.get(key)
        value = default if found is None else found.contents()
        if value is None:
            raise UnsupportedModelError(f"the model file has no field {key!r}")
        return value

    architecture = field("general.architecture")
    if architecture != "llama":
        raise UnsupportedModelError(
            f"the demo's engine runs the architecture 'llama'; this model is {architecture!r}"
        )
    if field("llama.expert_count", 0):
        raise UnsupportedModelError("the demo's engine does not run mixtures of experts")
    scaling = field("llama.rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        raise UnsupportedModelError(f"the demo's engine does not know RoPE scaling {scaling!r}")

    hidden_dim = int(field("llama.embedding_length"))
    n_heads = int(field("llama.attention.head_count"))
    head_dim = int(field("llama.attention.key_length", hidden_dim // n_heads))
    if field("llama.attention.value_length", head_dim) != head_dim:
        raise UnsupportedModelError("the demo's engine needs K and V heads of one length")
    embedding = next((t for t in reader.tensors if t.name == "token_embd.weight"), None)
    if embedding is None:
        raise UnsupportedModelError("the model file has no tensor 'token_embd.weight'")
    return LlamaShape(
        name=str(field("general.name", "unnamed")),
        n_layers=int(field("llama.block_count")),
        n_heads=n_heads,
        n_kv_heads=int(field("llama.attention.head_count_kv", n_heads)),
        head_dim=head_dim,
        hidden_dim=hidden_dim,
        ffn_dim=int(field("llama.feed_forward_length")),
        vocab_tokens=int(embedding.shape[1]),
        max_tokens=int(field("llama.context_length")),
        norm_epsilon=float(field("llama.attention.layer_norm_rms_epsilon")),
        rope_base=float(field("llama.rope.freq_base", 10_000.0)),
        rope_dim=int(field("llama.rope.dimension_count", head_dim)),
        rope_scale=float(field("llama.rope.scaling.factor", 1.0)) if scaling == "linear" else 1.0,
        weights_bytes=4 * sum(int(tensor.n_elements) for tensor in reader.tensors),
    )


def load_llama(path: Path) -> tuple[LlamaShape, LlamaWeights]:
    """Read a GGUF file and dequantise all of it to float32."""
    reader = open_gguf(path)
    shape = read_shape(reader)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    biases = [name for name in tensors if name.endswith(".bias")]
    if biases:
        raise UnsupportedModelError(f"the demo's engine has no bias terms; found {biases[0]!r}")

    def load(*names: str) -> Floats:
        missing = [name for name in names if name not in tensors]
        if missing:
            raise UnsupportedModelError(f"the model file has no tensor {missing[0]!r}")
        return _dequantise([tensors[name] for name in names])

    def load_layer(layer: int) -> LayerWeights:
        block = f"blk.{layer}."
        return LayerWeights(
            attention_norm=load(block + "attn_norm.weight"),
            qkv=load(*(f"{block}attn_{part}.weight" for part in "qkv")),
            attention_out=load(block + "attn_output.weight"),
            ffn_norm=load(block + "ffn_norm.weight"),
            gate_up=load(block + "ffn_gate.weight", block + "ffn_up.weight"),
            ffn_down=load(block + "ffn_down.weight"),
        )

    embedding = load("token_embd.weight")
    weights = LlamaWeights(
        embedding=embedding,
        layers=tuple(load_layer(layer) for layer in range(shape.n_layers)),
        out_norm=load("output_norm.weight"),
        output=load("output.weight") if "output.weight" in tensors else embedding,
        rope_factors=load("rope_freqs.weight") if "rope_freqs.weight" in tensors else None,
    )
    return shape, weights


def _dequantise(tensors: list[Any]) -> Floats:
    """Dequantise tensors of one input width, one under the other."""
    quants = require_extra("gguf.quants")
    n_rows = sum(int(np.prod(tensor.shape[1:])) for tensor in tensors)
    width = int(tensors[0].shape[0])  # GGUF lists the innermost axis first
    if len(tensors[0].shape) == 1:
        return np.array(quants.dequantize(tensors[0].data, tensors[0].tensor_type), np.float32)
    matrix = np.empty((n_rows, width), np.float32)
    row = 0
    for tensor in tensors:
        rows = int(tensor.shape[1])
        matrix[row : row + rows] = quants.dequantize(tensor.data, tensor.tensor_type)
        row += rows
    return matrix
