"""PageCache on a small random model: what is restored is what was computed."""

import numpy as np
import pytest
from llama_models import PROMPT, complete, logits, token_ids

from pagealloc import ClosedError, LlamaStateError

pytest.importorskip("llama_cpp", reason="installed in the tox env `llama` alone")

from pagealloc.llama import PageCache, PageState, attach, detach, sequence

Q8_0, Q4_0, BF16, F32 = 8, 2, 30, 0

WAYS = {
    "set_cache": lambda llm, cache: llm.set_cache(cache),
    "attach": attach,
}

CONTEXTS = {
    "default": {},
    "flash": {"flash_attn": True},
    "q8_0": {"flash_attn": True, "type_k": Q8_0, "type_v": Q8_0},
    "q8_0 K": {"type_k": Q8_0},
    "q4_0": {"flash_attn": True, "type_k": Q4_0, "type_v": Q4_0},
    "bf16": {"type_k": BF16, "type_v": BF16},
    "f32": {"type_k": F32, "type_v": F32},
    "f32 flash": {"flash_attn": True, "type_k": F32, "type_v": F32},
}


@pytest.fixture(params=WAYS)
def use(request):
    return WAYS[request.param]


@pytest.fixture(params=CONTEXTS)
def context(request):
    return CONTEXTS[request.param]


class TestCompletions:
    def test_text_is_that_of_a_run_without_a_cache(self, make, cache, use, context):
        prompts = [PROMPT + end for end in ("What?", "Why is that?", "What?", "")]
        fresh = [complete(make(**context), prompt) for prompt in prompts]
        llm = make(**context)
        use(llm, cache)
        assert [complete(llm, prompt) for prompt in prompts] == fresh
        assert complete(make(**context), PROMPT + "W") == complete(llm, PROMPT + "W")
        assert cache.stats().n_hits >= 4
        assert cache.stats().n_models == 1

    def test_a_prompt_of_another_context_is_restored(self, make, cache, use):
        first, second = make(), make()
        for llm in (first, second):
            use(llm, cache)
        expected = complete(first, PROMPT)
        cache.binding(second)  # evaluates a few tokens, once
        evaluated = count_evaluated(second)
        assert complete(second, PROMPT) == expected
        assert evaluated[0] <= 1  # the last token, for its logits
        assert second.n_tokens == first.n_tokens

    def test_whoever_computed_with_the_other_kind_of_attention(self, make, cache):
        """Rows are the same; only how V lies in the blob differs, which is the context's."""
        first, second = make(flash_attn=True), make()
        attach(first, cache)
        attach(second, cache)
        complete(first, PROMPT)
        complete(second, PROMPT)
        assert cache.stats().n_models == 2

    def test_a_prompt_shorter_than_a_block(self, make, cache, use):
        first, second = make(), make()
        use(first, cache)
        expected = complete(first, "Hi", max_tokens=1)
        use(second, cache)
        loads = count_loads(second)
        assert complete(second, "Hi", max_tokens=1) == expected
        assert loads == [1]

    def test_chat(self, make, cache, use):
        llm = make()
        use(llm, cache)
        messages = [{"role": "system", "content": PROMPT}, {"role": "user", "content": "Hello"}]
        first = llm.create_chat_completion(messages, max_tokens=8, temperature=0.0)
        llm.reset()
        again = llm.create_chat_completion(messages, max_tokens=8, temperature=0.0)
        assert first["choices"] == again["choices"]
        assert cache.stats().n_hits == 1

    def test_streams(self, make, cache, use):
        llm = make()
        use(llm, cache)
        pieces = llm.create_completion(PROMPT, max_tokens=8, temperature=0.0, stream=True)
        text = "".join(piece["choices"][0]["text"] for piece in pieces)
        assert text == complete(make(), PROMPT, 8)
        assert cache.stats().n_blocks

    def test_a_model_of_the_same_shape_has_its_own(self, make, cache, use, other_path):
        """llama.cpp would take the rows: only the key keeps them apart."""
        llm, other = make(), make(other_path)
        use(llm, cache)
        use(other, cache)
        complete(llm, PROMPT)
        assert complete(other, PROMPT) == complete(make(other_path), PROMPT)
        assert (cache.stats().n_models, cache.stats().n_hits) == (2, 0)

    @pytest.mark.parametrize("settings", [{"rope_freq_base": 5e5}, {"rope_freq_scale": 0.5}])
    def test_rope_settings_have_their_own(self, make, cache, use, settings):
        llm, other = make(), make(**settings)
        use(llm, cache)
        use(other, cache)
        complete(llm, PROMPT)
        assert complete(other, PROMPT) == complete(make(**settings), PROMPT)
        assert cache.stats().n_hits == 0

    def test_salts_share_nothing(self, make):
        with PageCache("8MiB", salt="a") as one, PageCache("8MiB", salt="b") as other:
            llm = make()
            attach(llm, one)
            complete(llm, PROMPT)
            llm = make()
            attach(llm, other)
            complete(llm, PROMPT)
            assert other.stats().n_hits == 0

    def test_embeddings_are_refused(self, make, cache):
        llm = make(embedding=True)
        with pytest.raises(ValueError, match="embedding=True"):
            attach(llm, cache)
        assert llm.cache is None
        llm.set_cache(cache)
        with pytest.raises(ValueError, match="nothing to cache"):
            complete(llm, PROMPT)


class TestStates:
    @pytest.mark.parametrize("n_tokens", [1, 15, 16, 17, 100])
    def test_logits_after_a_restore(self, make, cache, context, n_tokens):
        llm = make(**context)
        attach(llm, cache)
        tokens = token_ids(n_tokens)
        llm.eval(tokens)
        state = llm.save_state()
        llm.eval([5, 6, 7])
        expected = logits(llm)
        llm.eval(token_ids(50, seed=2))
        llm.load_state(state)
        assert (llm.n_tokens, llm.input_ids[:n_tokens].tolist()) == (n_tokens, tokens)
        llm.eval([5, 6, 7])
        assert np.array_equal(logits(llm), expected)

    def test_a_state_without_tokens(self, make, cache):
        llm = make()
        attach(llm, cache)
        state = llm.save_state()
        llm.eval(token_ids(10))
        llm.load_state(state)
        assert llm.n_tokens == 0
        assert sequence(llm).pos_max(0) == -1

    def test_a_state_of_llama_cpp_python(self, make, cache):
        llm = make()
        llm.eval(token_ids(20))
        state = llm.save_state()
        assert not isinstance(state, PageState)
        attach(llm, cache)
        llm.eval([5])
        expected = logits(llm)
        llm.load_state(state)
        llm.eval([5])
        assert np.array_equal(logits(llm), expected)

    def test_a_page_state_in_a_llama_that_is_not_attached(self, make, cache):
        llm, plain = make(), make()
        attach(llm, cache)
        llm.eval(token_ids(37))
        state = llm.save_state()
        plain.load_state(state)
        for each in (llm, plain):
            each.eval([5])
        assert np.array_equal(logits(llm), logits(plain))
        assert len(state.llama_state) == state.llama_state_size

    def test_logits_all_keeps_scores(self, make, cache):
        llm = make(logits_all=True)
        attach(llm, cache)
        llm.eval(token_ids(20))
        state, scores = llm.save_state(), llm.scores[:20].copy()
        llm.scores[:20] = 0
        llm.load_state(state)
        assert np.array_equal(llm.scores[:20], scores)
        assert np.array_equal(state.scores, scores)

    def test_a_state_of_another_model_is_refused(self, make, cache, other_path):
        llm, other = make(), make(other_path)
        attach(llm, cache)
        attach(other, cache)
        llm.eval(token_ids(20))
        state = llm.save_state()
        other.eval(token_ids(5))
        with pytest.raises(LlamaStateError, match="another model"):
            other.load_state(state)
        assert other.n_tokens == 5
        other.eval([5])

    def test_a_state_longer_than_the_context_is_refused(self, make, cache):
        llm, short = make(), make(n_ctx=256)
        attach(llm, cache)
        attach(short, cache)
        llm.eval(token_ids(300))
        state = llm.save_state()
        with pytest.raises(LlamaStateError, match="n_ctx"):
            short.load_state(state)
        assert short.n_tokens == 0
        assert complete(short, "Hi") == complete(make(), "Hi")

    def test_tokens_that_were_moved_are_not_cached(self, make, cache):
        llm = make()
        attach(llm, cache)
        llm.eval(token_ids(40))
        sequence(llm).rm(0, 10, 20)
        with pytest.warns(RuntimeWarning, match="not cached"):
            state = llm.save_state()
        assert cache.stats().n_blocks == 0
        llm.eval([5])
        expected = logits(llm)
        llm.load_state(state)
        llm.eval([5])
        # In other cells, which are summed up in another order.
        assert np.allclose(logits(llm), expected, rtol=0.01, atol=0.05)

    def test_a_detached_llama_has_its_own_methods(self, make, cache):
        llm = make()
        attach(llm, cache)
        detach(llm)
        llm.eval(token_ids(20))
        assert not isinstance(llm.save_state(), PageState)
        assert llm.cache is None

    def test_attaching_keeps_what_is_there(self, make, cache):
        llm, plain = make(), make()
        for each in (llm, plain):
            each.eval(token_ids(20))
        attach(llm, cache)
        for each in (llm, plain):
            each.eval([5])
        assert llm.n_tokens == 21
        assert np.array_equal(logits(llm), logits(plain))

    def test_a_llama_is_not_kept_alive(self, tiny_path, cache):
        import gc
        import weakref

        import llama_cpp

        llm = llama_cpp.Llama(tiny_path, n_ctx=64, verbose=False)
        attach(llm, cache)
        complete(llm, "Hi")
        gone = weakref.ref(llm)
        del llm
        gc.collect()
        assert gone() is None


class TestQuantised:
    @pytest.mark.parametrize("flash_attn", [False, True])
    def test_rows_come_back_near_what_they_were(self, make, flash_attn):
        with PageCache("64MiB", quantize=True) as cache:
            llm = make(flash_attn=flash_attn)
            attach(llm, cache)
            llm.eval(token_ids(200))
            llm.eval([5])
            expected = logits(llm)
            llm.n_tokens = 200
            llm._ctx.kv_cache_seq_rm(-1, 200, -1)
            state = llm.save_state()
            llm.load_state(state)
            llm.eval([5])
            error = np.abs(logits(llm) - expected).max()
            assert 0 < error < 0.2 * np.abs(expected).max()

    def test_it_takes_fewer_bytes(self, make):
        held = {}
        for quantize in (False, True):
            with PageCache("64MiB", quantize=quantize) as cache:
                llm = make()
                attach(llm, cache)
                llm.eval(token_ids(400))
                llm.save_state()
                cache.trim()
                held[quantize] = cache.cache_size
        assert held[True] <= 0.5 * held[False]  # in whole pages; 0.41 in bytes

    def test_packed_rows_stay_as_they_are(self, make):
        with PageCache("64MiB", quantize=True) as cache:
            llm = make(flash_attn=True, type_k=Q8_0, type_v=Q8_0)
            attach(llm, cache)
            llm.eval(token_ids(50))
            llm.eval([5])
            expected = logits(llm)
            llm.n_tokens = 50
            llm._ctx.kv_cache_seq_rm(-1, 50, -1)
            llm.load_state(llm.save_state())
            llm.eval([5])
            assert np.array_equal(logits(llm), expected)

    @pytest.mark.parametrize(
        "options",
        [
            {"k_type": "f8"},
            {"rotate": "q"},
            {"quantize": True, "k_type": "q8_0"},
            {"budget": 0},
        ],
    )
    def test_what_cannot_be(self, options):
        with pytest.raises(ValueError, match=r"possible|leave|at least|budget"):
            PageCache(**options)


class TestBudget:
    def test_it_is_never_exceeded(self, make):
        with PageCache("600KiB") as cache:
            llm = make()
            attach(llm, cache)
            for seed in range(6):
                llm.reset()
                llm.eval(token_ids(100, seed))
                llm.save_state()
                assert cache.cache_size <= cache.capacity_bytes
            stats = cache.stats()
            assert stats.n_evicted_blocks
            assert stats.held_bytes <= stats.budget_bytes
            cache.check()

    def test_what_was_used_last_stays(self, make):
        with PageCache("520KiB") as cache:
            llm = make()
            attach(llm, cache)
            for seed in (1, 2, 1, 3):
                llm.reset()
                llm.eval(token_ids(100, seed))
                llm.save_state()
            found = [
                cache._prompts.find(cache.binding(llm), np.array(token_ids(100, n)))
                for n in (1, 2, 3)
            ]
            assert found[0].n_tokens >= 96  # a tail goes with each block
            assert found[2].n_tokens == 100
            assert found[1] is None or found[1].n_tokens < 96

    def test_pinned_prompts_stay(self, make, cache):
        llm = make()
        attach(llm, cache)
        tokens = token_ids(64)
        assert cache.pin(tokens) == 0
        llm.eval(tokens)
        llm.save_state()
        assert cache.pin(tokens) == 64
        cache.clear()
        assert cache.stats().n_blocks == cache.stats().n_pinned_blocks == 4
        assert cache.unpin(tokens) == 1
        cache.clear()
        assert cache.stats().n_blocks == 0

    def test_a_prompt_larger_than_the_budget_is_saved_for_its_owner_only(self, make):
        with PageCache("100KiB") as cache:
            llm = make()
            attach(llm, cache)
            llm.eval(token_ids(300))
            state = llm.save_state()
            assert cache.cache_size <= cache.capacity_bytes
            llm.eval([5])
            expected = logits(llm)
            llm.load_state(state)
            llm.eval([5])
            assert np.array_equal(logits(llm), expected)
            cache.check()

    def test_models_share_it(self, make, other_path):
        with PageCache("400KiB") as cache:
            llm, other = make(), make(other_path)
            for each in (llm, other):
                attach(each, cache)
                each.eval(token_ids(150))
                each.save_state()
                assert cache.cache_size <= cache.capacity_bytes
            assert cache.stats().n_models == 2
            assert cache.stats().n_evicted_blocks


class TestWhole:
    """A recurrent model's states have no rows by token."""

    @pytest.fixture
    def mamba(self, make, mamba_path):
        def make_mamba():
            return make(mamba_path)

        return make_mamba

    def test_exact_prompts_are_restored(self, mamba, cache, use):
        first, second = mamba(), mamba()
        fresh = complete(mamba(), PROMPT, max_tokens=4)
        for llm in (first, second):
            with pytest.warns(RuntimeWarning, match="kept whole"):
                cache.binding(llm)
        use(first, cache)
        assert complete(first, PROMPT, max_tokens=1) == fresh[:1]
        use(second, cache)
        loads = count_loads(second)
        assert complete(second, PROMPT, max_tokens=4) == fresh
        assert loads == [1]
        assert cache.stats().n_whole_states

    def test_others_are_computed(self, mamba, cache):
        llm = mamba()
        with pytest.warns(RuntimeWarning, match="kept whole"):
            attach(llm, cache)
        complete(llm, PROMPT)
        assert complete(llm, PROMPT[:20]) == complete(mamba(), PROMPT[:20])

    def test_the_budget_holds(self, mamba):
        with PageCache("40KiB") as cache:
            llm = mamba()
            with pytest.warns(RuntimeWarning, match="kept whole"):
                attach(llm, cache)
            for seed in range(5):
                llm.reset()
                llm.eval(token_ids(20, seed))
                llm.save_state()
                assert cache.cache_size <= cache.capacity_bytes


class TestSlidingWindow:
    """Gemma 3's states have a second record: of the layers that see the last 64 tokens here."""

    @pytest.fixture(params=[False, True])
    def gemma(self, request, make, gemma3_path):
        return lambda **options: make(gemma3_path, swa_full=request.param, **options)

    @pytest.mark.parametrize("flash_attn", [False, True])
    def test_a_prompt_within_the_window_is_shared(self, gemma, cache, flash_attn):
        first, second, plain = (gemma(flash_attn=flash_attn) for _ in range(3))
        for llm in (first, second):
            attach(llm, cache)
        first.eval(token_ids(60))
        first.save_state()
        assert (cache.stats().n_whole_states, cache.stats().n_blocks) == (0, 3)
        found = cache._prompts.find(cache.binding(second), np.array([*token_ids(60)[:50], 7]))
        assert found.n_tokens == 50
        second.load_state(found)
        plain.eval(token_ids(60)[:50])
        for llm in (second, plain):
            llm.eval([5])
        assert np.allclose(logits(second), logits(plain), atol=0.01)

    def test_a_longer_one_is_kept_whole(self, gemma, cache):
        first, second = gemma(), gemma()
        for llm in (first, second):
            attach(llm, cache)
        tokens = token_ids(300)
        first.eval(tokens)
        state = first.save_state()
        assert cache.stats().n_whole_states == 1
        assert cache._prompts.find(cache.binding(second), np.array([*tokens, 7])).n_tokens == 300
        assert cache._prompts.find(cache.binding(second), np.array(tokens[:200])) is None
        first.eval([5])
        second.load_state(state)
        second.eval([5])
        assert np.allclose(logits(first), logits(second), atol=0.01)


class TestByHand:
    """As a mapping, without a `Llama` asking."""

    def test_states_that_nobody_stands_behind(self, make):
        with PageCache("8MiB") as cache:
            llm = make()
            llm.eval(token_ids(40))
            assert token_ids(40) not in cache
            cache[token_ids(40)] = llm.save_state()
            assert token_ids(40) in cache
            assert [4] * 40 not in cache
            with pytest.raises(KeyError, match="these 40 tokens"):
                cache[[4] * 40]
            found = cache[(*token_ids(40), 5, 6)]
            assert found.n_tokens == 40
            llm.eval([5])
            expected = logits(llm)
            llm.load_state(found)
            llm.eval([5])
            assert np.array_equal(logits(llm), expected)

    def test_an_empty_one_is_true(self, cache):
        assert cache

    def test_a_closed_one_says_so(self, make):
        cache = PageCache("8MiB")
        llm = make()
        attach(llm, cache)
        complete(llm, PROMPT)
        state = llm.save_state()
        assert cache.cache_size
        cache.close()
        cache.close()
        with pytest.raises(ClosedError):
            complete(llm, "another")
        with pytest.raises(ClosedError):
            llm.load_state(state)

    def test_repr(self, cache):
        assert repr(cache) == "<PageCache of 0 blocks of 0 models, 0 B of 64.0 MiB>"


def count_evaluated(llm):
    """Count the tokens that prompts evaluate from now on; those of answers are single."""
    counts, evaluate = [0], llm.eval

    def counting(tokens):
        if len(tokens) > 1 or not counts[0]:
            counts[0] += len(tokens)
        evaluate(tokens)

    llm.eval = counting
    return counts


def count_loads(llm):
    counts, load_state = [0], llm.load_state

    def counting(state):
        counts[0] += 1
        load_state(state)

    llm.load_state = counting
    return counts
