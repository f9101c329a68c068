"""States that are not what they should be: refused with a reason, and the context goes on."""

import time
import warnings

import numpy as np
import pytest
from llama_models import PROMPT, complete, logits, token_ids

from pagealloc import LlamaStateError, default_allocator
from pagealloc.core import os_memory

llama_cpp = pytest.importorskip("llama_cpp", reason="installed in the tox env `llama` alone")

from llama_cpp.llama import LlamaState

from pagealloc.llama import PageCache, attach

N_TOKENS = 40


@pytest.fixture
def state(make):
    llm = make()
    llm.eval(token_ids(N_TOKENS))
    return llm.save_state()


def changed(state, blob):
    return LlamaState(
        state.input_ids, state.scores, state.n_tokens, bytes(blob), len(blob), state.seed
    )


def mutations(blob, duration_s, seed):
    """Yield blobs with bits flipped, cut, repeated or put into words, for a time."""
    rng = np.random.default_rng(seed)
    end_s = time.monotonic() + duration_s
    n_header_bytes = 9 + 8 + 12 * N_TOKENS + 8 + 12
    while time.monotonic() < end_s:
        mutated = bytearray(blob)
        for _ in range(rng.integers(1, 4)):
            end = min(len(mutated), n_header_bytes if rng.random() < 0.7 else len(mutated))
            at = int(rng.integers(0, max(1, end)))
            match rng.integers(0, 4):
                case 0:
                    mutated[at : at + 1] = rng.integers(0, 256, 1, np.uint8).tobytes()
                case 1:
                    del mutated[at:]
                case 2:
                    mutated[at : at + 4] = int(rng.integers(0, 1 << 32)).to_bytes(4, "little")
                case 3:
                    mutated[at:at] = mutated[at : at + int(rng.integers(1, 64))]
        yield mutated


def test_states_of_anybody(make, state, duration_s, tiny_path):
    """What a cache takes can be restored; whatever it is, the model goes on."""
    llm = make()
    n_refused = n_taken = 0
    expected = complete(make(), PROMPT)
    for seed, blob in enumerate(mutations(state.llama_state, duration_s, seed=1)):
        with PageCache("8MiB") as cache:
            try:
                cache[token_ids(N_TOKENS)] = changed(state, blob)
            except LlamaStateError:
                n_refused += 1
                continue
            n_taken += 1
            found = cache[token_ids(N_TOKENS)]
            try:
                llm.load_state(found)
            except RuntimeError:  # of another shape: llama.cpp refuses it, and is empty then
                llm.reset()
            if seed % 50 == 0:
                llm.n_tokens = 0
                assert complete(llm, PROMPT) == expected
            cache.check()
    assert n_refused
    llm.n_tokens = 0
    assert complete(llm, PROMPT) == expected
    assert n_taken


def test_a_state_of_fewer_tokens_than_it_says(make, state):
    input_ids = state.input_ids.copy()
    input_ids[N_TOKENS:] = -600156808  # llama-cpp-python leaves there what it found
    longer = LlamaState(
        input_ids, state.scores, N_TOKENS + 1, state.llama_state, state.llama_state_size, 0
    )
    with PageCache("8MiB") as cache, pytest.raises(LlamaStateError, match="40 tokens, not 41"):
        cache[token_ids(N_TOKENS)] = longer


def test_a_state_of_another_shape(make, state):
    llm = make(flash_attn=True)
    llm.eval(token_ids(N_TOKENS))
    other = llm.save_state()
    with PageCache("8MiB") as cache:
        cache[token_ids(N_TOKENS)] = state
        with pytest.raises(LlamaStateError, match="not of the form"):
            cache[token_ids(N_TOKENS)] = other
        assert cache[token_ids(N_TOKENS)].n_tokens == N_TOKENS


def test_a_restore_that_llama_cpp_refuses(make, monkeypatch):
    """A completion computes the prompt then; whoever loads by hand is told."""
    with PageCache("8MiB") as cache:
        llm, other = make(), make()
        for each in (llm, other):
            attach(each, cache)
        expected = complete(llm, PROMPT)
        monkeypatch.setattr(llama_cpp, "llama_state_seq_set_data_ext", lambda *_: 0)
        with pytest.warns(RuntimeWarning, match="computed anew"):
            assert complete(other, PROMPT) == expected
        state = other.save_state()
        with pytest.raises(LlamaStateError, match="refused"):
            other.load_state(state)
        assert other.n_tokens == 0
        monkeypatch.undo()
        other.load_state(state)
        other.eval([5])
        llm.eval([5])
        assert np.array_equal(logits(llm), logits(other))


def test_a_state_that_llama_cpp_does_not_give(make, monkeypatch):
    with PageCache("8MiB") as cache:
        llm = make()
        attach(llm, cache)
        llm.eval(token_ids(N_TOKENS))
        monkeypatch.setattr(llama_cpp, "llama_state_seq_get_data_ext", lambda *_: 0)
        with pytest.raises(LlamaStateError, match="gave 0 bytes"):
            llm.save_state()
        llm.eval([5])


@pytest.mark.parametrize("call", ["mmap", "memfd_create"])
def test_a_kernel_that_refuses_memory(make, call):
    """A completion gives its answer; a state that was not saved says so when it is loaded."""
    with PageCache("8MiB") as cache:
        llm, plain = make(), make()
        attach(llm, cache)
        default_allocator().trim()
        with os_memory.refusing(call), warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            assert complete(llm, PROMPT) == complete(plain, PROMPT)
            state = llm.save_state()
        if any("not cached" in str(each.message) for each in told):
            with pytest.raises(LlamaStateError, match="was not saved"):
                llm.load_state(state)
        else:
            llm.load_state(state)
        assert complete(llm, PROMPT) == complete(make(), PROMPT)
        cache.check()


def test_a_format_that_is_not_as_known(make, monkeypatch):
    """The parser proves itself on the model: where it cannot, states are kept whole."""
    from pagealloc.llama import contexts

    written = contexts.write_state

    def wrong(*arguments):
        places = written(*arguments)
        arguments[1][20] ^= 1
        return places

    monkeypatch.setattr(contexts, "write_state", wrong)
    with PageCache("8MiB") as cache:
        llm, other = make(), make()
        for each in (llm, other):
            with pytest.warns(RuntimeWarning, match="differs from byte 20 on"):
                attach(each, cache)
        expected = complete(llm, PROMPT)
        assert complete(other, PROMPT) == expected
        assert complete(llm, PROMPT) == expected
        stats = cache.stats()
        assert (stats.n_whole_states, stats.n_blocks) == (1, 0)
