"""Logits of cached prompts: there for who shows them, and for nobody else."""

import numpy as np
import pytest
from llama_models import PROMPT, complete

pytest.importorskip("llama_cpp", reason="installed in the tox env `llama` alone")

from pagealloc.llama import PageCache, attach

WAYS = {
    "set_cache": lambda llm, cache: llm.set_cache(cache),
    "attach": attach,
}


@pytest.fixture(params=WAYS)
def use(request):
    return WAYS[request.param]


def echoed(llm, prompt):
    """The log probabilities of a prompt's tokens, and of an answer's."""
    answer = llm.create_completion(
        prompt, max_tokens=4, temperature=0.0, seed=1, echo=True, logprobs=2
    )
    found = answer["choices"][0]["logprobs"]
    return found["tokens"], np.array(found["token_logprobs"][1:], np.float64)


def forget(llm):
    llm.reset()
    llm.scores[:] = 7.0  # as others would have left them


def test_log_probabilities_of_a_prompt_that_was_found(make, cache, use):
    prompts = [PROMPT + end for end in ("What?", "Why is that?", "What?")]
    expected = [echoed(make(logits_all=True), prompt) for prompt in prompts]
    llm = make(logits_all=True)
    use(llm, cache)
    for prompt, (tokens, logprobs) in zip(prompts, expected, strict=True):
        forget(llm)
        found_tokens, found = echoed(llm, prompt)
        assert found_tokens == tokens
        assert np.allclose(found, logprobs, atol=1e-3)
    assert cache.stats().n_hits == 2
    assert cache.stats().n_hit_tokens >= 2 * 16


def test_who_computed_a_prompt_without_them_is_not_asked(make, cache, use):
    expected = echoed(make(logits_all=True), PROMPT)[1]
    other, llm = make(), make(logits_all=True)
    for each in (other, llm):
        use(each, cache)
    complete(other, PROMPT)
    complete(llm, PROMPT)
    forget(llm)
    n_hits = cache.stats().n_hits
    assert np.allclose(echoed(llm, PROMPT)[1], expected, atol=1e-3)
    assert cache.stats().n_hits == n_hits
    forget(llm)
    assert np.allclose(echoed(llm, PROMPT)[1], expected, atol=1e-3)
    assert cache.stats().n_hits == n_hits + 1


def test_nobody_else_keeps_any(make, use):
    held = []
    for options in ({}, {"logits_all": True}):
        with PageCache("64MiB") as cache:
            llm = make(**options)
            use(llm, cache)
            complete(llm, PROMPT)
            llm.create_completion(PROMPT + "?", max_tokens=4, logprobs=1 if options else None)
            cache.trim()
            held.append(cache.stats()._replace(n_lookups=0))
    assert held[0] == held[1]


def test_they_are_in_the_budget(make, use):
    with PageCache("600KiB") as cache:
        llm = make(logits_all=True)
        use(llm, cache)
        for end in ("one", "two", "three"):
            forget(llm)
            echoed(llm, end + PROMPT)
            assert cache.stats().held_bytes <= 600 << 10
        assert cache.stats().n_evicted_blocks
        cache.check()


def test_one_that_is_longer_than_the_budget(make, use):
    with PageCache("64KiB") as cache:
        llm = make(logits_all=True)
        use(llm, cache)
        expected = echoed(make(logits_all=True), PROMPT)[1]
        for _ in range(2):
            forget(llm)
            assert np.allclose(echoed(llm, PROMPT)[1], expected, atol=1e-3)


def test_they_outlive_the_program(make, tmp_path):
    pytest.importorskip("xxhash")
    expected = echoed(make(logits_all=True), PROMPT)[1]
    for n_hits in (0, 1):
        with PageCache("64MiB", path=tmp_path) as cache:
            llm = make(logits_all=True)
            attach(llm, cache)
            assert np.allclose(echoed(llm, PROMPT)[1], expected, atol=1e-3)
            assert cache.stats().n_hits == n_hits
