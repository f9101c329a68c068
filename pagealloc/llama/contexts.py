"""Context: the state of one `Llama`, taken and given back through llama.cpp's C calls.

Purpose
    Take states into memory of ours without a Python copy; say what they look like, and prove it.
Structure
    llama.cpp takes and gives all tokens of a sequence.  What another knows already is left out by
    way of a spare sequence, into which only the rest is put: cells are marked, no row is copied.
Locking
    None: a llama.cpp context is one thread's at a time.  The calls release the GIL.
Units
    Bytes and tokens.
"""

from __future__ import annotations

import ctypes
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import llama_cpp
import numpy as np

from pagealloc import Buffer, LlamaStateError, default_allocator
from pagealloc.llama.state_blob import StateFormat, parse_state, write_state

if TYPE_CHECKING:
    from llama_cpp import Llama

__all__ = ["SEQUENCE_HEADER", "Context", "Proof", "proven_format"]

SEQUENCE = 0
"""What `Llama` evaluates everything as."""

SEQUENCE_HEADER = (0xAF143CD8).to_bytes(4, "little") + SEQUENCE.to_bytes(4, "little")
"""What the blob of a sequence begins with."""

SPARE_SEQUENCE = 255
"""The last number there is, which nobody uses."""

SPARE_VERSIONS = ((0, 3, 30), (0, 3, 36))
"""The oldest and the newest llama-cpp-python in which a KV cache of one stream was seen to know all
numbers, however many sequences it was made for.  Another might end the process at one: there all
tokens are taken and given."""

N_PROOF_TOKENS = 3


class Proof(NamedTuple):
    """What the states of a context look like, and whether some of its tokens can be taken alone."""

    state_format: StateFormat
    takes_parts: bool


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
        self._state_format: StateFormat | None = None

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
        return self._take(SEQUENCE)

    def take_from(self, first: int) -> Buffer:
        """Return a blob of the tokens from one on, whose cells may be of no sequence.

        Only where it `Proof.takes_parts`.

        Raises
        ------
        LlamaStateError, OutOfMemoryError
            As `take`.
        """
        memory = self._memory
        llama_cpp.llama_memory_seq_cp(memory, SEQUENCE, SPARE_SEQUENCE, first, -1)
        try:
            return self._take(SPARE_SEQUENCE)
        finally:
            llama_cpp.llama_memory_seq_rm(memory, SPARE_SEQUENCE, -1, -1)

    def _take(self, sequence: int) -> Buffer:
        n_bytes = self._n_bytes(sequence)
        buffer = default_allocator().alloc(max(1, n_bytes), prefault=True)
        n_taken = llama_cpp.llama_state_seq_get_data_ext(
            self.llm._ctx.ctx, _bytes_of(buffer), n_bytes, sequence, 0
        )
        if n_taken != n_bytes or not n_bytes:
            raise LlamaStateError(f"llama.cpp gave {n_taken} bytes of a state of {n_bytes}")
        return buffer

    def _n_bytes(self, sequence: int) -> int:
        return int(llama_cpp.llama_state_seq_get_size_ext(self.llm._ctx.ctx, sequence, 0))

    def has(self, n_tokens: int) -> bool:
        """Return whether it holds the tokens at positions 0 to `n_tokens`, all and no others.

        Only once its format was proven.
        """
        memory, state_format = self._memory, self._state_format
        assert state_format is not None
        return (
            llama_cpp.llama_memory_seq_pos_min(memory, SEQUENCE) == 0
            and llama_cpp.llama_memory_seq_pos_max(memory, SEQUENCE) == n_tokens - 1
            and self._n_bytes(SEQUENCE) == state_format.nbytes([n_tokens])
        )

    def give(self, blob: Buffer | memoryview) -> None:
        """Put a state in the place of the present one.

        Raises
        ------
        LlamaStateError
            llama.cpp refused it: the context holds no tokens then.
        """
        self._give(blob, SEQUENCE)

    def give_from(self, first: int, blob: Buffer | memoryview) -> None:
        """Put tokens from one on in the place of the present ones from there.

        Only where it `Proof.takes_parts`, and the context holds those before.

        Raises
        ------
        LlamaStateError
            llama.cpp refused them: the context holds no tokens then.
        """
        memory = self._memory
        llama_cpp.llama_memory_seq_rm(memory, SEQUENCE, first, -1)
        self._give(blob, SPARE_SEQUENCE)
        llama_cpp.llama_memory_seq_cp(memory, SPARE_SEQUENCE, SEQUENCE, -1, -1)
        llama_cpp.llama_memory_seq_rm(memory, SPARE_SEQUENCE, -1, -1)

    def _give(self, blob: Buffer | memoryview, sequence: int) -> None:
        array = _bytes_of(blob)
        n_read = llama_cpp.llama_state_seq_set_data_ext(
            self.llm._ctx.ctx, array, len(array), sequence, 0
        )
        if n_read != len(array):
            self.clear()
            raise LlamaStateError(
                f"llama.cpp refused a state of {len(array)} bytes: it holds more tokens than the "
                f"context's n_ctx of {self.n_ctx}, or is of another model"
            )

    def clear(self) -> None:
        """Let go of all tokens."""
        llama_cpp.llama_memory_clear(self._memory, False)
        self.llm.n_tokens = 0

    @property
    def _memory(self) -> Any:
        return llama_cpp.llama_get_memory(self.llm._ctx.ctx)

    def prove_format(self) -> Proof:
        """Return what states look like, having taken one apart and written the same bytes again.

        Of the present state; if there is none, of a few tokens that are computed for it.

        Raises
        ------
        LlamaStateError
            States cannot be taken apart, or the bytes differ.
        """
        llm = self.llm
        if llm.n_tokens:
            return self._proof()
        before = llm.input_ids[:N_PROOF_TOKENS].copy()
        llm.eval([max(0, llm.token_bos())] * min(N_PROOF_TOKENS, self.n_ctx))
        try:
            return self._proof()
        finally:
            self.clear()
            llm.input_ids[:N_PROOF_TOKENS] = before
            if llm._logits_all:
                llm.scores[:N_PROOF_TOKENS] = 0.0

    def _proof(self) -> Proof:
        blob = memoryview(self.take())
        state_format = self._state_format = proven_format(blob)
        return Proof(state_format, _may_take_parts(state_format) and self._takes_parts(blob))

    def _takes_parts(self, blob: memoryview) -> bool:
        """Return whether the state is what it was once its last token was taken and given."""
        last = self.llm.n_tokens - 1
        if not self.has(last + 1):
            return False
        n_tokens = self.llm.n_tokens
        with suppress(LlamaStateError):
            self.give_from(last, _written_again(memoryview(self.take_from(last)), SEQUENCE_HEADER))
            if memoryview(self.take()) == blob:
                return True
        self.give(blob)
        self.llm.n_tokens = n_tokens
        return False


def _may_take_parts(state_format: StateFormat) -> bool:
    """Return whether it can be tried."""
    version = tuple(int(part) for part in llama_cpp.__version__.split(".")[:3] if part.isdigit())
    records = state_format.records
    return (
        SPARE_VERSIONS[0] <= version <= SPARE_VERSIONS[1]
        and len(records) == records[0].n_streams == 1
        and llama_cpp.llama_max_parallel_sequences() > SPARE_SEQUENCE
    )


def proven_format(blob: memoryview) -> StateFormat:
    """Return what a blob looks like, having written the same bytes again.

    Raises
    ------
    LlamaStateError
        It cannot be taken apart, or the bytes differ.
    """
    state_format, places = parse_state(blob)
    if state_format.nbytes([len(place.positions) for place in places]) != len(blob):
        raise LlamaStateError(f"a state of {len(blob)} bytes would be written with others")
    again = _written_again(blob, state_format.header)
    if blob != again:
        at = int((np.frombuffer(blob, np.uint8) != np.frombuffer(again, np.uint8)).argmax())
        raise LlamaStateError(f"a state written again differs from byte {at} on")
    return state_format


def _written_again(blob: memoryview, header: bytes) -> memoryview:
    """Return a blob of the same rows, whose cells are of one sequence."""
    state_format, places = parse_state(blob, any_sequences=True)
    state_format = StateFormat(header, state_format.records)
    positions = [place.positions for place in places]
    again = bytearray(state_format.nbytes([len(each) for each in positions]))
    rebuilt = write_state(state_format, again, positions)
    for record, old, new in zip(state_format.records, places, rebuilt, strict=True):
        types = (*record.k, *record.v)
        for kind, at, to in zip(types, (*old.k, *old.v), (*new.k, *new.v), strict=True):
            n_bytes = kind.row_bytes * len(old.positions)
            again[to : to + n_bytes] = blob[at : at + n_bytes]
    return memoryview(again)
