"""The model's own tokenizer, built out of the GGUF with the `tokenizers` package.

Two kinds of vocabulary occur in Llama files: byte-level BPE (``gpt2``), whose merges are listed,
and SentencePiece (``llama``), whose merges follow from the scores of the pieces.
"""

from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any

from pagealloc.demo.errors import UnsupportedModelError, require_extra

__all__ = ["Tokenizer"]

SPACE = "\u2581"
"""What SentencePiece writes for a space."""

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Llama 3 cuts a text into words, before the merges."""

STOP_TOKENS = ("<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|endoftext|>", "</s>")
"""Special tokens that end an answer, beside the ones the file names."""


class TokenKind(IntEnum):
    """Kinds of token that `tokenizer.ggml.token_type` tells apart."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Tokenizer:
    """Text to token ids and back.

    Parameters
    ----------
    reader : gguf.GGUFReader
        The open model file.
    """

    def __init__(self, reader: Any) -> None:
        tokens = _field(reader, "tokens")
        kinds = _field(reader, "token_type", [TokenKind.NORMAL] * len(tokens))
        family = _field(reader, "model")
        builders: dict[str, Callable[[Any, dict[str, int]], Any]] = {
            "gpt2": _build_byte_level,
            "llama": _build_sentencepiece,
        }
        if family not in builders:
            raise UnsupportedModelError(
                f"the demo cannot read the vocabulary {family!r}; it reads {sorted(builders)}"
            )
        vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
        self._tokenizer = builders[family](reader, vocabulary)
        self._special = {
            token: token_id
            for token_id, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
            if kind in (TokenKind.CONTROL, TokenKind.USER_DEFINED)
        }
        self._add_special_tokens(tokens, kinds)
        begins = bool(_field(reader, "add_bos_token", family == "llama"))
        self.begin_ids: tuple[int, ...] = (_field(reader, "bos_token_id"),) if begins else ()
        ends = {_field(reader, f"{name}_token_id", -1) for name in ("eos", "eot")} - {-1}
        ends |= {self._special[token] for token in STOP_TOKENS if token in self._special}
        self.stop_ids = frozenset(int(token_id) for token_id in ends)

    def has_special(self, token: str) -> bool:
        """Tell whether the vocabulary has this special token."""
        return token in self._special

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        """Return the token ids of a text, without a begin token.

        Parameters
        ----------
        text : str
        parse_special : bool
            Whether the spelling of a special token, such as ``<|im_end|>``, becomes that token.
            Only for text of our own: in a person's text it stays text.
        """
        self._tokenizer.encode_special_tokens = not parse_special
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of token ids, without special tokens."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def _add_special_tokens(self, tokens: Sequence[str], kinds: Sequence[int]) -> None:
        added_token = require_extra("tokenizers").AddedToken
        self._tokenizer.add_special_tokens(
            [
                added_token(token, normalized=False, special=True)
                for token, kind in zip(tokens, kinds, strict=True)
                if kind == TokenKind.CONTROL
            ]
        )
        self._tokenizer.add_tokens(
            [
                added_token(token, normalized=False)
                for token, kind in zip(tokens, kinds, strict=True)
                if kind == TokenKind.USER_DEFINED
            ]
        )


def _field(reader: Any, name: str, default: Any = None) -> Any:
    found = reader.fields.get(f"tokenizer.ggml.{name}")
    value = default if found is None else found.contents()
    if value is None:
        raise UnsupportedModelError(f"the model file has no field 'tokenizer.ggml.{name}'")
    return value


def _build_byte_level(reader: Any, vocabulary: dict[str, int]) -> Any:
    """Byte-level BPE: the file lists the merges; `pre` names how words are cut."""
    tokenizers = require_extra("tokenizers")
    pre = require_extra("tokenizers.pre_tokenizers")
    words = pre.ByteLevel(add_prefix_space=False, use_regex=True)
    single_digits = pre.Sequence([pre.Digits(individual_digits=True), words])
    llama3_words = pre.Sequence(
        [
            pre.Split(tokenizers.Regex(LLAMA3_SPLIT), behavior="isolated"),
            pre.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    cuts = {
        "default": words,
        "gpt-2": words,
        "smollm": single_digits,
        "starcoder": single_digits,
        "refact": single_digits,
        "llama-bpe": llama3_words,
        "llama3": llama3_words,
    }
    cut = _field(reader, "pre", "default")
    if cut not in cuts:
        raise UnsupportedModelError(
            f"the demo does not know how the pre-tokenizer {cut!r} cuts words; it knows {[*cuts]}"
        )
    merges = [tuple(merge.split(" ", 1)) for merge in _field(reader, "merges")]
    model = tokenizers.models.BPE(vocabulary, merges, ignore_merges=cuts[cut] is llama3_words)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = cuts[cut]
    tokenizer.decoder = require_extra("tokenizers.decoders").ByteLevel()
    return tokenizer


def _build_sentencepiece(reader: Any, vocabulary: dict[str, int]) -> Any:
    """SentencePiece: the pair whose union has the best score is merged first."""
    tokenizers = require_extra("tokenizers")
    decoders = require_extra("tokenizers.decoders")
    normalizers = require_extra("tokenizers.normalizers")
    scores = _field(reader, "scores")
    ranked = sorted(vocabulary.items(), key=lambda item: (-scores[item[1]], item[1]))
    merges = [
        (piece[:cut], piece[cut:])
        for piece, _ in ranked
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    unknown = next(t for t, i in vocabulary.items() if i == _field(reader, "unknown_token_id", 0))
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True
        )
    )
    leads_with_space = bool(_field(reader, "add_space_prefix", default=True))
    spaces = normalizers.Replace(" ", SPACE)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if leads_with_space:
        spaces = normalizers.Sequence([normalizers.Prepend(SPACE), spaces])
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = spaces
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer
