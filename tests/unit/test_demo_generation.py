"""Sampling, and how prompts are cut and answers end."""

import numpy as np
import pytest

from pagealloc.demo.generation import CHUNK_TOKENS, Sampler, generate, prefill

LOGITS = np.array([0.0, 3.0, 1.0, 2.0], np.float32)


class Counter:
    """A model whose next token is always one more than the last."""

    def __init__(self):
        self.passes = []

    def forward(self, ids, _kv):
        self.passes.append(len(ids))
        return np.eye(100, dtype=np.float32)[np.asarray(ids)]

    def logits(self, hidden):
        return np.roll(hidden, 1, axis=1)


def test_temperature_zero_takes_the_likeliest():
    assert {Sampler()(LOGITS) for _ in range(20)} == {1}


def test_one_seed_gives_one_answer():
    drawn = [[Sampler(1.0, seed)(LOGITS) for _ in range(1)] for seed in (5, 5)]
    assert drawn[0] == drawn[1]
    one, other = Sampler(2.0, [1, 0]), Sampler(2.0, [1, 1])
    assert [one(LOGITS) for _ in range(30)] != [other(LOGITS) for _ in range(30)]


def test_tokens_are_drawn_by_weight():
    sampler = Sampler(1.0, 0)
    counts = np.bincount([sampler(LOGITS) for _ in range(4000)], minlength=4)
    expected = 4000 * np.exp(LOGITS) / np.exp(LOGITS).sum()
    assert np.all(np.abs(counts - expected) < 5 * np.sqrt(expected))


def test_negative_temperature_is_refused():
    with pytest.raises(ValueError, match="-1"):
        Sampler(-1)


def test_prompts_are_cut_into_chunks():
    model, done = Counter(), []
    prefill(model, None, [7] * (2 * CHUNK_TOKENS + 3), done.append)
    assert model.passes == done == [CHUNK_TOKENS, CHUNK_TOKENS, 3]


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="at least one token"):
        prefill(Counter(), None, [])


def answer(**limits):
    model = Counter()
    hidden = prefill(model, None, [3, 4])
    return list(generate(model, None, hidden, Sampler(), **limits)), model.passes


def test_an_answer_ends_at_its_longest():
    tokens, passes = answer(max_new_tokens=3, stop_ids=())
    assert tokens == [5, 6, 7]
    assert passes == [2, 1, 1], "nothing is computed after the last token"


def test_an_answer_ends_with_the_stop_token():
    tokens, passes = answer(max_new_tokens=30, stop_ids={6})
    assert tokens == [5, 6]
    assert passes == [2, 1]
