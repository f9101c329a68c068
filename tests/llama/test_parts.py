"""States taken and given in part: what is known already stays where it is."""

import numpy as np
import pytest
from llama_models import PROMPT, complete, logits, token_ids

pytest.importorskip("llama_cpp", reason="installed in the tox env `llama` alone")

import llama_cpp

from pagealloc import LlamaStateError
from pagealloc.llama import PageCache, attach, contexts, sequence
from pagealloc.llama.state_blob import parse_state

CONTEXTS = {
    "default": {},
    "flash": {"flash_attn": True},
    "q8_0": {"flash_attn": True, "type_k": 8, "type_v": 8},
    "q8_0 K": {"type_k": 8},
    "f32": {"type_k": 0, "type_v": 0},
}
SHARED, OWN = 100, 37


@pytest.fixture
def moved(monkeypatch):
    """How many bytes each state had that llama.cpp gave or got, in turn."""
    sizes = []
    get, put = llama_cpp.llama_state_seq_get_data_ext, llama_cpp.llama_state_seq_set_data_ext

    def counted_get(context, target, n_bytes, *rest):
        sizes.append(n_bytes)
        return get(context, target, n_bytes, *rest)

    def counted_put(context, source, n_bytes, *rest):
        sizes.append(n_bytes)
        return put(context, source, n_bytes, *rest)

    monkeypatch.setattr(llama_cpp, "llama_state_seq_get_data_ext", counted_get)
    monkeypatch.setattr(llama_cpp, "llama_state_seq_set_data_ext", counted_put)
    return sizes


def rows(llm):
    """K and V of all layers, by token, as 16-bit words."""
    blob = raw_state(llm)
    state_format, (place,) = parse_state(blob)
    record, n_tokens = state_format.records[0], len(place.positions)
    found = []
    for types, offsets in ((record.k, place.k), (record.v, place.v)):
        layers = [
            np.frombuffer(blob, np.uint16, n_tokens * kind.row_bytes // 2, at)
            for kind, at in zip(types, offsets, strict=True)
        ]
        if types[0].value_bytes:
            found.append(np.stack([layer.reshape(-1, n_tokens).T for layer in layers]))
        else:
            found.append(np.stack([layer.reshape(n_tokens, -1) for layer in layers]))
    return found


def state_bytes(llm):
    return llama_cpp.llama_state_seq_get_size_ext(llm._ctx.ctx, 0, 0)


def raw_state(llm):
    return bytes(memoryview(contexts.Context(llm).take()))


def prompts(n):
    return [token_ids(SHARED) + token_ids(OWN, seed=2 + i) for i in range(n)]


def found(llm, tokens):
    """What a completion of a prompt finds."""
    cache = llm.cache
    return cache._prompts.find(cache.binding(llm), np.array(tokens, np.int32))


@pytest.mark.parametrize("options", CONTEXTS.values(), ids=CONTEXTS)
class TestContexts:
    def test_what_is_known_is_not_taken(self, make, cache, moved, options):
        llm = make(**options)
        attach(llm, cache)
        first, second = prompts(2)
        llm.eval(first)
        llm.save_state()
        token_bytes = state_bytes(llm) / len(first)
        llm.reset()
        llm.eval(second)
        moved.clear()
        llm.save_state()
        assert len(moved) == 1
        assert moved[0] < (OWN + 16 + 2) * token_bytes  # from the last whole block on
        moved.clear()
        llm.save_state()  # of which all is known, but for the tokens behind the last whole block
        assert moved[0] < (16 + 2) * token_bytes

    def test_what_is_there_is_not_given(self, make, cache, moved, options):
        llm = make(**options)
        attach(llm, cache)
        first, second = prompts(2)
        expected = []
        for prompt in (first, second):
            llm.n_tokens = SHARED if llm.n_tokens else 0  # as a completion begins
            llm.eval(prompt[llm.n_tokens :])
            llm.save_state()
            expected.append(raw_state(llm))
        token_bytes = state_bytes(llm) / len(first)
        moved.clear()
        llm.load_state(found(llm, first))
        assert len(moved) == 1
        assert moved[0] < (OWN + 2) * token_bytes
        assert llm.n_tokens == len(first)
        assert llm.input_ids[: len(first)].tolist() == first
        assert raw_state(llm) == expected[0]
        llm.load_state(found(llm, second))
        assert raw_state(llm) == expected[1]

    def test_logits_are_those_of_a_whole_restore(self, make, cache, options):
        first, second = prompts(2)
        llm, other = make(**options), make(**options)
        for each in (llm, other):
            attach(each, cache)
        llm.eval(first)
        llm.save_state()
        llm.n_tokens = SHARED
        llm.eval(second[SHARED:])
        llm.save_state()
        for prompt in (first, second, first):
            llm.load_state(found(llm, prompt))  # in part
            other.reset()
            other.load_state(found(other, prompt))  # all of it
            for each in (llm, other):
                each.eval([7])
            assert np.array_equal(logits(llm), logits(other))

    def test_nothing_is_left_in_the_spare_sequence(self, make, cache, options):
        llm = make(**options)
        attach(llm, cache)
        for prompt in prompts(3):
            llm.reset()
            llm.eval(prompt)
            llm.save_state()
        llm.load_state(found(llm, prompts(1)[0]))
        memory = llama_cpp.llama_get_memory(llm._ctx.ctx)
        assert llama_cpp.llama_memory_seq_pos_max(memory, contexts.SPARE_SEQUENCE) == -1
        assert llama_cpp.llama_memory_seq_pos_max(memory, 0) == SHARED + OWN - 1


@pytest.mark.parametrize("flash_attn", [False, True])
def test_quantised_rows_in_part_are_those_of_a_whole_restore(make, flash_attn):
    first, second = prompts(2)
    with PageCache("64MiB", quantize=True) as cache:
        llm, other = make(flash_attn=flash_attn), make(flash_attn=flash_attn)
        for each in (llm, other):
            attach(each, cache)
        for prompt in (second, first):
            llm.n_tokens = SHARED if llm.n_tokens else 0
            llm.eval(prompt[llm.n_tokens :])
            llm.save_state()
        before = rows(llm)
        llm.load_state(found(llm, second))
        other.load_state(found(other, second))
        in_part, whole = rows(llm), rows(other)
    for k_and_v in (0, 1):
        assert np.array_equal(in_part[k_and_v][:, SHARED:], whole[k_and_v][:, SHARED:])
        assert np.array_equal(in_part[k_and_v][:, :SHARED], before[k_and_v][:, :SHARED])
        assert not np.array_equal(whole[k_and_v][:, :SHARED], before[k_and_v][:, :SHARED])


class TestWhenAllIsMoved:
    def test_a_saved_state_comes_back_to_the_bit(self, make, cache):
        llm = make()
        attach(llm, cache)
        prompt = prompts(1)[0]
        llm.eval(prompt)
        saved, expected = llm.save_state(), raw_state(llm)
        llm.reset()
        for token in prompt:  # one by one: the same tokens, other rows
            llm.eval([token])
        assert raw_state(llm) != expected
        llm.load_state(saved)
        assert raw_state(llm) == expected

    def test_an_unknown_version(self, make, cache, moved, monkeypatch):
        monkeypatch.setattr(llama_cpp, "__version__", "99.0.0")
        llm = make()
        attach(llm, cache)
        assert not cache.binding(llm).takes_parts
        self.see_that_all_is_moved(llm, moved)

    @pytest.mark.parametrize("name", ["llama_memory_seq_cp", "llama_memory_seq_rm"])
    def test_calls_that_do_nothing(self, make, cache, moved, monkeypatch, name):
        llm = make()
        llm.eval(token_ids(5, seed=9))
        before = raw_state(llm)
        with monkeypatch.context() as patched:
            patched.setattr(llama_cpp, name, lambda *_: None)
            attach(llm, cache)
        assert not cache.binding(llm).takes_parts
        assert raw_state(llm) == before
        assert llm.n_tokens == 5
        llm.reset()
        self.see_that_all_is_moved(llm, moved)

    def see_that_all_is_moved(self, llm, moved):
        for prompt in prompts(2):
            llm.n_tokens = SHARED if llm.n_tokens else 0
            llm.eval(prompt[llm.n_tokens :])
            moved.clear()
            llm.save_state()
            assert moved == [state_bytes(llm)]
        moved.clear()
        llm.load_state(found(llm, prompts(1)[0]))
        assert moved == [state_bytes(llm)]

    @pytest.mark.parametrize(
        "behind_its_back",
        [
            lambda seq: seq.add(0, 0, -1, delta=3),
            lambda seq: seq.rm(0, 50, 60),
            lambda seq: seq.rm(0, 0, 5),
            lambda seq: seq.rm(0, 130, -1),
        ],
        ids=["moved", "a hole", "without a beginning", "without an end"],
    )
    def test_tokens_that_are_not_there_any_more(self, make, cache, moved, behind_its_back):
        llm = make()
        attach(llm, cache)
        first, second = prompts(2)
        llm.eval(first)
        llm.save_state()
        expected = raw_state(llm)
        llm.n_tokens = SHARED
        llm.eval(second[SHARED:])
        llm.save_state()
        behind_its_back(sequence(llm))
        moved.clear()
        llm.load_state(found(llm, first))
        assert moved == [state_bytes(llm)]
        assert raw_state(llm) == expected

    def test_tokens_that_were_removed_are_not_saved(self, make, cache):
        llm = make()
        attach(llm, cache)
        prompt = prompts(1)[0]
        llm.eval(prompt)
        sequence(llm).rm(0, 50, 60)
        with pytest.warns(RuntimeWarning, match="127 tokens, not 137"):
            llm.save_state()


class TestFailures:
    def test_a_part_that_cannot_be_taken_is_taken_as_a_whole(self, make, cache, monkeypatch):
        llm = make()
        attach(llm, cache)
        llm.eval(prompts(1)[0])

        def refuse(self, first):
            raise LlamaStateError("no")

        monkeypatch.setattr(contexts.Context, "take_from", refuse)
        saved, expected = llm.save_state(), raw_state(llm)
        llm.reset()
        llm.load_state(saved)
        assert raw_state(llm) == expected

    def test_a_part_that_is_refused_is_computed(self, make, cache, monkeypatch):
        llm = make()
        attach(llm, cache)
        expected = complete(make(), PROMPT + "What?")
        complete(llm, PROMPT + "What?")
        complete(llm, PROMPT + "Why?")
        monkeypatch.setattr(llama_cpp, "llama_state_seq_set_data_ext", lambda *_: 0)
        with pytest.warns(RuntimeWarning, match="computed anew"):
            assert complete(llm, PROMPT + "What?") == expected

    def test_with_a_budget_for_less(self, make):
        with PageCache("128KiB") as small:
            llm = make()
            attach(llm, small)
            llm.eval(token_ids(300))
            saved, expected = llm.save_state(), raw_state(llm)
            llm.reset()
            llm.load_state(saved)
            assert raw_state(llm) == expected
            small.check()
