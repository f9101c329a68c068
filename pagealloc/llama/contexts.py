"""Context: the state of one `Llama`, taken and given back through llama.cpp's C calls.

Purpose
    Take states into memory of ours without a Python copy; say what they look like, and prove it.
Locking
    None: a llama.cpp context is one thread's at a time.  The calls release the GIL.
Units
    Bytes and tokens.
"""

from __future__ import annotations

import ctypes
import weakref
from typing import TYPE_CHECKING

import llama_cpp
import numpy as np

from pagealloc import Buffer, LlamaStateError, default_allocator
from pagealloc.llama.state_blob import StateFormat, parse_state, write_state

if TYPE_CHECKING:
    from llama_cpp import Llama

__all__ = ["SEQUENCE_HEADER", "Context", "proven_format"]

SEQUENCE = 0
"""What `Llama` evaluates everything as."""

SEQUENCE_HEADER = (0xAF143CD8).to_bytes(4, "little") + SEQUENCE.to_bytes(4, "little")
"""What the blob of a sequence begins with."""

N_PROOF_TOKENS = 3


def _bytes_of(buffer: Buffer | memoryview) -> ctypes.Array[ctypes.c_uint8]:
    """Return a buffer as ctypes wants it."""
    return (ctypes.c_uint8 * len(memoryview(buffer))).from_buffer(buffer)


class Context:
    """The state of one `Llama`, which it does not keep alive.

    Raises
    ------
    ValueError
        The context makes embeddings: there is no state to keep.
    """

    def __init__(self, llm: Llama) -> None:
        if llm.context_params.embeddings:
            raise ValueError(
                "this Llama was made with embedding=True: it computes each text from its beginning "
                "and keeps no state, so there is nothing to cache"
            )
        self._llm = weakref.ref(llm)

    @property
    def llm(self) -> Llama:
        """The `Llama`, which is alive: it is its caller."""
        llm = self._llm()
        if llm is None:
            raise ReferenceError("the Llama is gone")
        return llm

    @property
    def n_ctx(self) -> int:
        """How many tokens it holds."""
        return int(self.llm.n_ctx())

    @property
    def head_dim(self) -> int:
        """Values of a K head."""
        metadata = self.llm.metadata
        name = metadata.get("general.architecture", "")
        stated = metadata.get(f"{name}.attention.key_length")
        if stated is not None:
            return int(stated)
        model = self.llm._model.model
        return int(llama_cpp.llama_model_n_embd(model) // llama_cpp.llama_model_n_head(model))

    @property
    def context_header(self) -> bytes:
        """What the blob of a whole context begins with."""
        name = str(self.llm.metadata.get("general.architecture", "")).encode()
        return len(name).to_bytes(4, "little") + name

    def take(self) -> Buffer:
        """Return a blob of the state, in memory that was used before if there is some.

        Raises
        ------
        LlamaStateError
            llama.cpp gave none.
        OutOfMemoryError
            There is no memory for it.
        """
        context = self.llm._ctx.ctx
        n_bytes = llama_cpp.llama_state_seq_get_size_ext(context, SEQUENCE, 0)
        buffer = default_allocator().alloc(max(1, n_bytes), prefault=True)
        n_taken = llama_cpp.llama_state_seq_get_data_ext(
            context, _bytes_of(buffer), n_bytes, SEQUENCE, 0
        )
        if n_taken != n_bytes or not n_bytes:
            raise LlamaStateError(f"llama.cpp gave {n_taken} bytes of a state of {n_bytes}")
        return buffer

    def give(self, blob: Buffer | memoryview) -> None:
        """Put a state in the place of the present one.

        Raises
        ------
        LlamaStateError
            llama.cpp refused it: the context holds no tokens then.
        """
        array = _bytes_of(blob)
        n_read = llama_cpp.llama_state_seq_set_data_ext(
            self.llm._ctx.ctx, array, len(array), SEQUENCE, 0
        )
        if n_read != len(array):
            self.clear()
            raise LlamaStateError(
                f"llama.cpp refused a state of {len(array)} bytes: it holds more tokens than the "
                f"context's n_ctx of {self.n_ctx}, or is of another model"
            )

    def clear(self) -> None:
        """Let go of all tokens."""
        llm = self.llm
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(llm._ctx.ctx), False)
        llm.n_tokens = 0

    def prove_format(self) -> StateFormat:
        """Return what states look like, having taken one apart and written the same bytes again.

        Of the present state; if there is none, of a few tokens that are computed for it.

        Raises
        ------
        LlamaStateError
            States cannot be taken apart, or the bytes differ.
        """
        llm = self.llm
        if llm.n_tokens:
            return self._proven()
        before = llm.input_ids[:N_PROOF_TOKENS].copy()
        llm.eval([max(0, llm.token_bos())] * min(N_PROOF_TOKENS, self.n_ctx))
        try:
            return self._proven()
        finally:
            self.clear()
            llm.input_ids[:N_PROOF_TOKENS] = before
            if llm._logits_all:
                llm.scores[:N_PROOF_TOKENS] = 0.0

    def _proven(self) -> StateFormat:
        return proven_format(memoryview(self.take()))


def proven_format(blob: memoryview) -> StateFormat:
    """Return what a blob looks like, having written the same bytes again.

    Raises
    ------
    LlamaStateError
        It cannot be taken apart, or the bytes differ.
    """
    state_format, places = parse_state(blob)
    again = bytearray(len(blob))
    positions = [place.positions for place in places]
    if state_format.nbytes([len(each) for each in positions]) != len(blob):
        raise LlamaStateError(f"a state of {len(blob)} bytes would be written with others")
    rebuilt = write_state(state_format, again, positions)
    for record, old, new in zip(state_format.records, places, rebuilt, strict=True):
        types = (*record.k, *record.v)
        for kind, at, to in zip(types, (*old.k, *old.v), (*new.k, *new.v), strict=True):
            n_bytes = kind.row_bytes * len(old.positions)
            again[to : to + n_bytes] = blob[at : at + n_bytes]
    if blob != again:
        at = int((np.frombuffer(blob, np.uint8) != np.frombuffer(again, np.uint8)).argmax())
        raise LlamaStateError(f"a state written again differs from byte {at} on")
    return state_format
