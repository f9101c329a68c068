"""Float16 KV costs less than 1 % of perplexity, on the tiny model and on the real one."""

import pytest

pytest.importorskip("gguf", reason="needs the extra 'demo'")
pytest.importorskip("tokenizers", reason="needs the extra 'demo'")

from pagealloc.demo.engine import Llama
from pagealloc.demo.english_text import ENGLISH_TEXT
from pagealloc.demo.errors import ModelNotFoundError
from pagealloc.demo.model_file import find_model_file
from pagealloc.demo.perplexity import perplexity
from pagealloc.demo.tiny_model import write_tiny_model
from pagealloc.demo.tokenizer import Tokenizer
from pagealloc.demo.weights import open_gguf

TEXT_TOKENS = 512


def measure(path):
    ids = Tokenizer(open_gguf(path)).encode(ENGLISH_TEXT)[:TEXT_TOKENS]
    assert len(ids) == TEXT_TOKENS
    model = Llama.load(path)
    return {dtype: perplexity(model, ids, dtype) for dtype in ("float32", "float16")}


def test_tiny_model(tmp_path):
    path = tmp_path / "tiny.gguf"
    write_tiny_model(path)
    measured = measure(path)
    assert measured["float16"] == pytest.approx(measured["float32"], rel=0.01)
    assert measured["float16"] != measured["float32"]


def test_smollm2():
    try:
        path = find_model_file()
    except ModelNotFoundError as missing:
        pytest.skip(str(missing))
    measured = measure(path)
    assert measured["float16"] == pytest.approx(measured["float32"], rel=0.01)
    assert 15 < measured["float32"] < 25, "a model that reads English"


def test_one_token_has_no_perplexity():
    with pytest.raises(ValueError, match="two tokens"):
        perplexity(None, [1])
