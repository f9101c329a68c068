"""The tokenizers that the demo builds out of GGUF fields."""

from types import SimpleNamespace

import pytest

pytest.importorskip("tokenizers", reason="needs the extra 'demo'")

from pagealloc.demo.errors import ModelNotFoundError, UnsupportedModelError
from pagealloc.demo.tokenizer import SPACE, Tokenizer, TokenKind

BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]


def reader_of(**fields):
    """A stand-in for an open GGUF file: what `fields[key].contents()` gives, by short name."""
    return SimpleNamespace(
        fields={
            f"tokenizer.ggml.{name}": SimpleNamespace(contents=lambda value=value: value)
            for name, value in fields.items()
        }
    )


def byte_level(pre="smollm", **fields):
    """Tokens for the letters a, b, digits and a space (byte-level BPE writes it as \\u0120)."""
    tokens = ["<|end|>", "a", "b", "ab", "\u0120", "\u0120ab", "1", "2", "12", "<", ">", "|"]
    tokens += ["e", "n", "d", "'"]
    return reader_of(
        **{
            "model": "gpt2",
            "pre": pre,
            "tokens": tokens,
            "token_type": [TokenKind.CONTROL, *[TokenKind.NORMAL] * (len(tokens) - 1)],
            "merges": ["a b", "\u0120 ab", "1 2"],
            "eos_token_id": 0,
            **fields,
        }
    )


def sentencepiece(**fields):
    pieces = {SPACE: -1.0, "a": -2.0, "b": -3.0, "ab": -0.5, SPACE + "ab": -0.1, "ba": -0.4}
    tokens = ["<unk>", "<s>", "</s>", *BYTE_TOKENS, *pieces]
    kinds = [TokenKind.UNKNOWN, TokenKind.CONTROL, TokenKind.CONTROL, *[TokenKind.BYTE] * 256]
    return reader_of(
        **{
            "model": "llama",
            "tokens": tokens,
            "token_type": [*kinds, *[TokenKind.NORMAL] * len(pieces)],
            "scores": [0.0] * 259 + list(pieces.values()),
            "unknown_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **fields,
        }
    )


def test_byte_level_merges():
    tokenizer = Tokenizer(byte_level())
    assert tokenizer.encode("ab ab") == [3, 5]
    assert tokenizer.decode([3, 5]) == "ab ab"


@pytest.mark.parametrize(("pre", "ids"), [("smollm", [6, 7]), ("gpt-2", [8]), ("llama-bpe", [8])])
def test_the_pre_tokenizer_says_whether_digits_stand_alone(pre, ids):
    assert Tokenizer(byte_level(pre)).encode("12") == ids


def test_unknown_pre_tokenizer_is_refused_by_name():
    with pytest.raises(UnsupportedModelError, match="'tekken'"):
        Tokenizer(byte_level("tekken"))


def test_unknown_vocabulary_is_refused_by_name():
    with pytest.raises(UnsupportedModelError, match="'bert'"):
        Tokenizer(byte_level(model="bert"))


def test_missing_field_is_named():
    reader = byte_level()
    del reader.fields["tokenizer.ggml.merges"]
    with pytest.raises(UnsupportedModelError, match=r"tokenizer\.ggml\.merges"):
        Tokenizer(reader)


def test_special_tokens_stay_text_in_a_persons_text():
    tokenizer = Tokenizer(byte_level())
    assert tokenizer.encode("ab<|end|>", parse_special=True) == [3, 0]
    assert 0 not in tokenizer.encode("ab<|end|>")
    assert tokenizer.decode(tokenizer.encode("ab<|end|>")) == "ab<|end|>"
    assert tokenizer.decode([3, 0]) == "ab"


def test_stop_and_begin_tokens():
    assert Tokenizer(byte_level()).stop_ids == {0}
    assert Tokenizer(byte_level()).begin_ids == ()
    assert Tokenizer(sentencepiece()).begin_ids == (1,)
    assert Tokenizer(sentencepiece(add_bos_token=False)).begin_ids == ()


def test_sentencepiece_merges_the_best_score_first():
    tokenizer = Tokenizer(sentencepiece())
    first = 3 + 256
    space, a, b, ab, space_ab, ba = range(first, first + 6)
    assert tokenizer.encode("ab") == [space_ab]
    assert tokenizer.encode("bab") == [space, ba, b]
    assert tokenizer.encode("ab a") == [space_ab, space, a]
    assert ab not in tokenizer.encode("ab ab")


@pytest.mark.parametrize("text", ["ab ba", "caf\u00e9 \u4e16\u754c", " two  spaces", "\U0001f600"])
@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_gives_the_text_back(text, prefix):
    tokenizer = Tokenizer(sentencepiece(add_space_prefix=prefix))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_smollm2s_own_vocabulary():
    pytest.importorskip("gguf", reason="needs the extra 'demo'")
    from pagealloc.demo.model_file import find_model_file
    from pagealloc.demo.weights import open_gguf

    try:
        path = find_model_file()
    except ModelNotFoundError as missing:
        pytest.skip(str(missing))
    tokenizer = Tokenizer(open_gguf(path))
    text = "Hello world! It's 1984, <|im_end|> na\u00efve\n\n  x"
    # "Hello", " world" and "!" as in the published tokenizer; every digit stands alone
    assert tokenizer.encode("Hello world! 1984") == [19556, 905, 17, 216, 33, 41, 40, 36]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("<|im_start|>user\n", parse_special=True) == [1, 4093, 198]
    assert tokenizer.stop_ids == {0, 2}
