"""What makes rows of one model wrong for another: the part of their key that is not tokens.

llama.cpp loads a state whose shape and types fit, whatever model it was computed with, so the key
names everything that K and V depend on: the weights, the adapter, and how positions are rotated.
"""

from __future__ import annotations

import os
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llama_cpp import Llama

__all__ = ["model_identity"]

SAMPLE_BYTES = 4096
MAX_SAMPLES = 2048

CONTEXT_SETTINGS = (
    "rope_scaling_type",
    "rope_freq_base",
    "rope_freq_scale",
    "yarn_ext_factor",
    "yarn_attn_factor",
    "yarn_beta_fast",
    "yarn_beta_slow",
    "yarn_orig_ctx",
    "attention_type",
)
"""Members of ``llama_context_params`` that change rows."""


def model_identity(llm: Llama) -> bytes:
    """Return 32 bytes that differ between models, adapters and RoPE settings.

    Of the files it reads `MAX_SAMPLES` pieces, evenly spread: several of each tensor of a language
    model, and no more of a large one than of a small one.  An adapter counts that `Llama` was made
    with (``lora_path=``); one that was set through the C calls later, or a control vector, does
    not: use a `salt`.
    """
    digest = blake2b(digest_size=32)
    for part in _parts(llm):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.digest()


def _parts(llm: Llama) -> Iterator[bytes]:
    yield b"pagealloc.llama 1"
    yield repr(sorted(llm.metadata.items())).encode()
    yield repr(sorted((llm.kv_overrides or {}).items())).encode()
    yield repr([getattr(llm.context_params, name) for name in CONTEXT_SETTINGS]).encode()
    yield repr(llm.lora_scale if llm.lora_path else None).encode()
    for path in (llm.model_path, llm.lora_path):
        if path:
            yield from _samples(path)


def _samples(path: str) -> Iterator[bytes]:
    """Yield a file's length, and pieces of it; of a small file all of it."""
    with Path(path).open("rb", buffering=0) as file:
        n_bytes = os.fstat(file.fileno()).st_size
        yield n_bytes.to_bytes(8, "little")
        n_pieces = -(-n_bytes // SAMPLE_BYTES)
        n_samples = min(n_pieces, MAX_SAMPLES)
        for i in range(n_samples):
            piece = i * n_pieces // n_samples
            yield os.pread(file.fileno(), SAMPLE_BYTES, piece * SAMPLE_BYTES)
