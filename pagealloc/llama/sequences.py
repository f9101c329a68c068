"""sequence: llama.cpp's calls on the sequences of a context, with arguments checked first.

llama.cpp asserts: a sequence id that is out of range, or a partial copy between streams, ends the
process.  Here both raise, and nothing has changed then.

Locking
    None: a context is one thread's at a time.
Source
    ``llama_memory_seq_*`` of llama.h; what aborts was read in src/llama-kv-cache.cpp.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING

import llama_cpp

if TYPE_CHECKING:
    from typing import SupportsIndex

    from llama_cpp import Llama

__all__ = ["LlamaSequences", "sequence"]

MAX_POSITION = 2**31 - 1

ROPE_TYPES_OF_SEVERAL_POSITIONS = {8, 24, 40}
"""LLAMA_ROPE_TYPE_MROPE, _VISION, _IMROPE: a token has a position in each of several dimensions."""


def sequence(llm: Llama) -> LlamaSequences:
    """Return llama.cpp's sequence calls for a `Llama`; see `LlamaSequences`."""
    return LlamaSequences(llm)


class LlamaSequences:
    """The sequences of a `Llama`'s context.

    Positions are of tokens in their sequence; ranges are half open, ``[p0, p1)``, and -1 stands for
    the beginning or the end.  `Llama` itself evaluates everything as sequence 0, and removes what
    lies behind its own tokens of *every* sequence whenever it evaluates: use other sequences
    between its calls, and tell it (``llm.n_tokens``) if you shorten sequence 0.

    Parameters
    ----------
    llm : Llama
        Which must be open.

    Notes
    -----
    Not thread-safe.
    """

    def __init__(self, llm: Llama) -> None:
        self._llm = llm

    @property
    def n_seq_max(self) -> int:
        """How many sequences the context has: their ids are 0 to ``n_seq_max - 1``."""
        return int(llama_cpp.llama_n_seq_max(self._context))

    def rm(
        self, seq_id: SupportsIndex = -1, p0: SupportsIndex = -1, p1: SupportsIndex = -1
    ) -> bool:
        """Remove the tokens at positions [p0, p1) of a sequence, or, with -1, of all of them.

        Returns
        -------
        bool
            False if the model's memory cannot be cut there (a recurrent state has no positions):
            then nothing was removed.

        Raises
        ------
        ValueError
            There is no such sequence, or it is no range.
        """
        return bool(
            llama_cpp.llama_memory_seq_rm(
                self._memory, self._id("seq_id", seq_id, least=-1), *_range(p0, p1)
            )
        )

    def cp(
        self,
        source: SupportsIndex,
        target: SupportsIndex,
        p0: SupportsIndex = -1,
        p1: SupportsIndex = -1,
    ) -> None:
        """Let the tokens at positions [p0, p1) of one sequence belong to another as well.

        In a unified cache no row is copied: both sequences have the same cells.

        Raises
        ------
        ValueError
            There is no such sequence, or it is no range; or the cache has a stream a sequence, and
            not all tokens are to be copied.
        """
        start, end = _range(p0, p1)
        source_id, target_id = self._id("source", source), self._id("target", target)
        is_partial = start > 0 or 0 <= end <= self.pos_max(source_id)
        if is_partial and source_id != target_id and not self._is_unified:
            raise ValueError(
                f"cp({source_id}, {target_id}, {start}, {end}): this context keeps a stream for "
                "each sequence (kv_unified=False), and between streams only all tokens can be "
                "copied: leave p0 and p1 out, and rm() the rest"
            )
        if source_id != target_id and not self._is_unified:
            start = end = -1
        llama_cpp.llama_memory_seq_cp(self._memory, source_id, target_id, start, end)

    def keep(self, seq_id: SupportsIndex) -> None:
        """Remove all tokens that do not belong to this sequence.

        Raises
        ------
        ValueError
            There is no such sequence.
        """
        llama_cpp.llama_memory_seq_keep(self._memory, self._id("seq_id", seq_id))

    def add(
        self, seq_id: SupportsIndex, p0: SupportsIndex, p1: SupportsIndex, delta: SupportsIndex
    ) -> None:
        """Move the tokens at positions [p0, p1) by `delta` positions; K is rotated along.

        A token that other sequences share moves in these as well.  One that comes to lie before
        position 0 is removed.

        Raises
        ------
        ValueError
            There is no such sequence, or it is no range; a position would not fit into 32 bits; or
            positions of this model cannot be moved.
        """
        start, end = _range(p0, p1)
        which, by = self._movable("add", seq_id), operator.index(delta)
        if not -MAX_POSITION <= by <= MAX_POSITION - max(0, self.pos_max(which)):
            raise ValueError(f"delta={by}: positions would leave the {MAX_POSITION} there are")
        llama_cpp.llama_memory_seq_add(self._memory, which, start, end, by)

    def div(
        self, seq_id: SupportsIndex, p0: SupportsIndex, p1: SupportsIndex, d: SupportsIndex
    ) -> None:
        """Divide the positions in [p0, p1) by `d`, rounding down; K is rotated along.

        Raises
        ------
        ValueError
            As of `add`; or `d` is not positive.
        """
        start, end = _range(p0, p1)
        which, by = self._movable("div", seq_id), operator.index(d)
        if not 0 < by <= MAX_POSITION:
            raise ValueError(f"d={by}: positions are divided by 1 or more")
        llama_cpp.llama_memory_seq_div(self._memory, which, start, end, by)

    def pos_min(self, seq_id: SupportsIndex) -> int:
        """Return the smallest position of a sequence; -1 if it has no tokens."""
        which = self._id("seq_id", seq_id)
        return int(llama_cpp.llama_memory_seq_pos_min(self._memory, which))

    def pos_max(self, seq_id: SupportsIndex) -> int:
        """Return the largest position of a sequence; -1 if it has no tokens."""
        which = self._id("seq_id", seq_id)
        return int(llama_cpp.llama_memory_seq_pos_max(self._memory, which))

    # --- what is checked ----------------------------------------------------------------------

    @property
    def _context(self) -> int:
        context = self._llm._ctx.ctx
        if context is None:
            raise ValueError("the Llama is closed")
        return context  # type: ignore[no-any-return]

    @property
    def _memory(self) -> int:
        memory = llama_cpp.llama_get_memory(self._context)
        if memory is None:
            raise ValueError("this model keeps no tokens: there are no sequences")
        return memory  # type: ignore[no-any-return]

    @property
    def _is_unified(self) -> bool:
        return self.n_seq_max == 1 or bool(self._llm.context_params.kv_unified)

    def _id(self, name: str, seq_id: SupportsIndex, *, least: int = 0) -> int:
        number = operator.index(seq_id)
        if not least <= number < self.n_seq_max:
            or_all = ", or -1 for all of them" if least < 0 else ""
            raise ValueError(
                f"{name}={number}: this context has sequences 0 to {self.n_seq_max - 1}{or_all}"
            )
        return number

    def _movable(self, what: str, seq_id: SupportsIndex) -> int:
        number = self._id("seq_id", seq_id)
        rope_type = llama_cpp.llama_model_rope_type(self._llm._model.model)
        if rope_type in ROPE_TYPES_OF_SEVERAL_POSITIONS:
            raise ValueError(
                f"{what}(): tokens of this model have a position in several dimensions"
            )
        if not llama_cpp.llama_memory_can_shift(self._memory):
            raise ValueError(f"{what}(): this model's positions cannot be moved")
        return number


def _range(p0: SupportsIndex, p1: SupportsIndex) -> tuple[int, int]:
    start, end = operator.index(p0), operator.index(p1)
    if not -1 <= start <= MAX_POSITION or not -1 <= end <= MAX_POSITION:
        raise ValueError(
            f"positions [{start}, {end}): from 0 to {MAX_POSITION}, or -1 for the beginning or end"
        )
    if 0 <= end < start:
        raise ValueError(f"positions [{start}, {end}): they end before they begin")
    return start, end
