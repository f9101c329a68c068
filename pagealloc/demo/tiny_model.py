"""A tiny Llama of random weights with a byte vocabulary: a real GGUF, written in a moment.

It says nothing that makes sense, but it goes through every line that a real model goes through.
"""

from pathlib import Path

import numpy as np

from pagealloc.demo.errors import require_extra
from pagealloc.demo.tokenizer import SPACE, TokenKind

__all__ = ["write_tiny_model"]

LAYERS, HEADS, KV_HEADS, HEAD_DIM, FFN_DIM, MAX_TOKENS = 4, 4, 2, 64, 512, 8192
HIDDEN_DIM = HEADS * HEAD_DIM


def write_tiny_model(path: Path, seed: int = 0) -> None:
    """Write the model to `path`."""
    tokens = ["<unk>", "<s>", "</s>", SPACE, *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [TokenKind.UNKNOWN, TokenKind.CONTROL, TokenKind.CONTROL, TokenKind.NORMAL]
    writer = require_extra("gguf").GGUFWriter(path, "llama")
    writer.add_name("tiny random Llama")
    writer.add_context_length(MAX_TOKENS)
    writer.add_embedding_length(HIDDEN_DIM)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FFN_DIM)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([*kinds, *[TokenKind.BYTE] * 256])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    random = np.random.default_rng(seed)

    def add(name: str, *shape: int) -> None:
        values = random.standard_normal(shape) / np.sqrt(shape[-1]) if len(shape) > 1 else 1.0
        writer.add_tensor(f"{name}.weight", np.full(shape, values, np.float32))

    add("token_embd", len(tokens), HIDDEN_DIM)
    output = random.standard_normal((len(tokens), HIDDEN_DIM)).astype(np.float32)
    readable = [chr(byte).isprintable() and byte < 128 for byte in range(256)]
    output[-256:][np.logical_not(readable)] *= 0.1  # unlikely to be chosen
    writer.add_tensor("output.weight", output)
    add("output_norm", HIDDEN_DIM)
    for layer in range(LAYERS):
        add(f"blk.{layer}.attn_norm", HIDDEN_DIM)
        add(f"blk.{layer}.attn_q", HEADS * HEAD_DIM, HIDDEN_DIM)
        add(f"blk.{layer}.attn_k", KV_HEADS * HEAD_DIM, HIDDEN_DIM)
        add(f"blk.{layer}.attn_v", KV_HEADS * HEAD_DIM, HIDDEN_DIM)
        add(f"blk.{layer}.attn_output", HIDDEN_DIM, HEADS * HEAD_DIM)
        add(f"blk.{layer}.ffn_norm", HIDDEN_DIM)
        add(f"blk.{layer}.ffn_gate", FFN_DIM, HIDDEN_DIM)
        add(f"blk.{layer}.ffn_up", FFN_DIM, HIDDEN_DIM)
        add(f"blk.{layer}.ffn_down", HIDDEN_DIM, FFN_DIM)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
