"""What fewer bits cost: perplexity and divergence, on the tiny model and on the real one."""

import math

import pytest

pytest.importorskip("gguf", reason="needs the extra 'demo'")
pytest.importorskip("tokenizers", reason="needs the extra 'demo'")

from pagealloc.demo.engine import Llama
from pagealloc.demo.english_texts import TEXT_TOKENS, TEXTS
from pagealloc.demo.errors import ModelNotFoundError
from pagealloc.demo.kv_stores import every_row
from pagealloc.demo.model_file import find_model_file
from pagealloc.demo.perplexity import Quality, compare_with_float16, perplexity, pool
from pagealloc.demo.tiny_model import write_tiny_model
from pagealloc.demo.tokenizer import Tokenizer
from pagealloc.demo.weights import open_gguf
from pagealloc.kv.quantisation import KV_KINDS


def measure(path):
    ids = Tokenizer(open_gguf(path)).encode(TEXTS["story"])[:TEXT_TOKENS]
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


def test_smollm2_quantised():
    """Of one text the divergence is the steady figure; `python -m bench quant` takes three."""
    try:
        path = find_model_file()
    except ModelNotFoundError as missing:
        pytest.skip(str(missing))
    ids = Tokenizer(open_gguf(path)).encode(TEXTS["story"])[:TEXT_TOKENS]
    kinds = {kind: every_row(kind) for kind in ("q8_0", "recommended", "q4_0")}
    found = compare_with_float16(Llama.load(path), ids, kinds)
    assert abs(found["q8_0"].change_percent) < 0.3
    assert 0 < found["q8_0"].mean_kl < 0.001
    assert found["q8_0"].mean_kl < found["recommended"].mean_kl < 0.008
    assert found["recommended"].mean_kl < found["q4_0"].mean_kl < 0.06
    assert found["q8_0"].same_top_percent > found["q4_0"].same_top_percent > 80


def test_float16_is_no_distance_from_itself(tmp_path):
    path = tmp_path / "tiny.gguf"
    write_tiny_model(path)
    ids = Tokenizer(open_gguf(path)).encode(TEXTS["story"])[:100]
    model = Llama.load(path)
    found = compare_with_float16(model, ids, {"f16": KV_KINDS["f16"], "q4_0": every_row("q4_0")})
    assert found["f16"].perplexity == found["f16"].float16_perplexity
    assert found["f16"].perplexity == pytest.approx(perplexity(model, ids))
    assert (found["f16"].mean_kl, found["f16"].same_top_percent) == (0, 100)
    assert found["q4_0"].mean_kl > 0


def test_texts_together():
    pooled = pool([Quality(10.0, 20.0, 0.1, 90.0), Quality(40.0, 20.0, 0.3, 100.0)])
    assert pooled.perplexity == pytest.approx(math.sqrt(10 * 40))
    assert pooled.change_percent == pytest.approx(0)
    assert (pooled.mean_kl, pooled.same_top_percent) == pytest.approx((0.2, 95))
