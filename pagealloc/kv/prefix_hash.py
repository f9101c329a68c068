"""Chained hashes of KV blocks: the name of a prefix.

Structure
    ::

        key    = BLAKE2b-256(what the rows depend on, salt)      one a cache
        hash 0 = BLAKE2b-128(key, "")                            the empty prefix
        hash i = BLAKE2b-128(key, hash i-1 | token ids of block i as little-endian int32)

    So a hash names all tokens up to the end of its block, of one owner and one model.  The key is
    what keeps owners apart: the same tokens under another salt have another name.
Source
    RFC 7693 (BLAKE2), section 2.9 for the keyed hash.
"""

from __future__ import annotations

import json
import struct
from contextlib import suppress
from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from pagealloc.kv.layout import KVLayout

__all__ = [
    "HASH_BYTES",
    "TOKEN_BYTES",
    "block_hash",
    "describe_rows",
    "hash_key",
    "owner_key",
    "token_bytes",
]

TOKEN_BYTES = 4
HASH_BYTES = 16
MAX_TOKEN_ID = 2**31 - 1


def token_bytes(token_ids: Iterable[int]) -> bytes:
    """Return token ids as little-endian int32, one behind the other.

    Raises
    ------
    TypeError, ValueError
        They are no integers in one dimension, or one is negative or takes more than 31 bits.
    """
    if isinstance(token_ids, int):
        raise TypeError(f"token_ids={token_ids}: a list or array of token ids is wanted")
    if isinstance(token_ids, list | tuple):  # twice as fast as by way of an array
        with suppress(struct.error):  # else NumPy says what is wrong
            data = struct.pack(f"<{len(token_ids)}i", *token_ids)
            if not data or min(token_ids) >= 0:
                return data
    array = np.asarray(token_ids if hasattr(token_ids, "__len__") else list(token_ids))
    if array.size == 0:
        return b""
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise TypeError(
            f"token_ids: an array of {array.dtype} and shape {array.shape}; integers in one "
            "dimension are wanted"
        )
    if array.min() < 0 or array.max() > MAX_TOKEN_ID:
        wrong = int(np.flatnonzero((array < 0) | (array > MAX_TOKEN_ID))[0])
        raise ValueError(f"token_ids[{wrong}]={array[wrong]}: from 0 to {MAX_TOKEN_ID} is possible")
    return array.astype("<i4").tobytes()


def describe_rows(layout: KVLayout, cold_layout: KVLayout, rotate: str) -> str:
    """Return, as JSON, what makes the rows of two caches interchangeable.

    How they lie in memory is not a part of it: caches of different order may exchange rows.
    """
    rope = layout.rope
    return json.dumps(
        {
            "block_tokens": layout.block_tokens,
            "given": [str(layout.k_dtype), str(layout.v_dtype)],
            "heads": [
                [layout.head_shape(layer, kv) for kv in (0, 1)] for layer in range(layout.n_layers)
            ],
            "rope": None if rope is None else repr(rope),
            "rotate": rotate,
            "stored": [str(cold_layout.k_dtype), str(cold_layout.v_dtype)],
        },
        sort_keys=True,
    )


def hash_key(rows: str, model: str | bytes | None, salt: str | bytes | None) -> bytes:
    """Return the key of a cache's hashes, 32 bytes.

    Raises
    ------
    TypeError
        The model or the salt is neither str nor bytes.
    """
    digest = blake2b(digest_size=32, person=b"pagealloc prefix")
    for name, part in (("rows", rows), ("model", model), ("salt", salt)):
        if part is not None and not isinstance(part, str | bytes):
            raise TypeError(f"{name} must be str or bytes, not {type(part).__name__}")
        data = part.encode() if isinstance(part, str) else part
        digest.update(b"\0" if data is None else b"\1" + len(data).to_bytes(8, "little") + data)
    return digest.digest()


def owner_key(model: str | bytes | None, salt: str | bytes | None) -> bytes:
    """Return the name of an owner and a model, whatever the rows: what processes tell each other.

    Raises
    ------
    TypeError
        As `hash_key` does.
    """
    return hash_key("", model, salt)


def block_hash(key: bytes) -> Callable[[bytes], bytes]:
    """Return the function that hashes the parent's hash and a block's tokens, in one piece."""
    start = blake2b(digest_size=HASH_BYTES, key=key)

    def digest(data: bytes) -> bytes:
        state = start.copy()  # the key is in it already
        state.update(data)
        return state.digest()

    return digest
