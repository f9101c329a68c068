"""kv_memory: llama.cpp's KV buffer in our memory."""

import gc
import multiprocessing
import os
import resource
from pathlib import Path

import numpy as np
import pytest
from llama_models import Context, adopt_and_evaluate, complete, logits, token_ids

from pagealloc import ClosedError, LlamaStateError, OutOfMemoryError, PageAllocator
from pagealloc.core import os_memory

llama_cpp = pytest.importorskip("llama_cpp", reason="installed in the tox env `llama` alone")

from pagealloc.llama import context_memory, kv_memory, sequence
from pagealloc.llama.kv_buffer import BufferHook

CONTEXTS = {
    "default": {},
    "flash": {"flash_attn": True},
    "q8_0": {"flash_attn": True, "type_k": 8, "type_v": 8},
    "f32": {"type_k": 0, "type_v": 0},
}


@pytest.fixture(params=CONTEXTS)
def context(request):
    return CONTEXTS[request.param]


@pytest.fixture
def make_ours(make):
    def make_llama(*arguments, lazy=True, allocator=None, **options):
        with kv_memory(allocator, lazy=lazy) as kv:
            llm = make(*arguments, **options)
        assert kv.is_ours
        return llm, kv

    return make_llama


class TestMemory:
    def test_logits_are_those_of_llama_cpp_alone(self, make, make_ours, context):
        (llm, _), plain = make_ours(**context), make(**context)
        for each in (llm, plain):
            each.eval(token_ids(100))
            each.eval([5])
        assert np.array_equal(logits(llm), logits(plain))

    def test_only_tokens_take_memory(self, make_ours):
        llm, kv = make_ours(n_ctx=8192, flash_attn=True)
        reserved_bytes = kv.stats().reserved_bytes
        assert reserved_bytes >= 8192 * 2048
        assert kv.stats().resident_bytes == 0
        llm.eval(token_ids(100))
        assert 100 * 2048 <= kv.stats().resident_bytes <= reserved_bytes / 16
        llm.close()
        assert kv.stats() == (0, 0, 0)
        assert not kv.is_live

    @pytest.mark.skipif(
        "[always]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text(),
        reason="one fault brings llama.cpp 2 MiB where transparent huge pages are 'always'",
    )
    def test_nothing_is_faulted_in_at_creation(self, make):
        model = make(n_ctx=64)._model

        def faults(make_one):
            params = llama_cpp.llama_context_default_params()
            params.n_ctx, params.n_batch = 1 << 16, 64
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            context = make_one(model.model, params)
            n_faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
            llama_cpp.llama_free(context)
            return n_faults

        init = llama_cpp.llama_cpp.llama_init_from_model
        plain = faults(init)
        with kv_memory() as kv:
            ours = faults(llama_cpp.llama_cpp.llama_init_from_model)
        assert kv.is_ours
        kv_pages = (1 << 16) * 2048 // os.sysconf("SC_PAGESIZE")
        assert plain >= kv_pages
        assert ours <= plain - 0.98 * kv_pages

    def test_all_at_once(self, make_ours):
        _, kv = make_ours(lazy=False)
        stats = kv.stats()
        assert stats.resident_bytes >= stats.reserved_bytes

    def test_it_counts_in_an_allocator(self, make_ours):
        with PageAllocator(backing="base") as allocator:
            llm, kv = make_ours(allocator=allocator)
            assert allocator.stats().active_bytes >= kv.stats().reserved_bytes
            with pytest.raises(BufferError):
                allocator.close()
            llm.close()
            assert allocator.stats().held_bytes < 1 << 20

    def test_a_budget_that_is_too_small(self, make):
        with (
            PageAllocator(budget_bytes="128KiB") as allocator,
            pytest.warns(RuntimeWarning, match="the allocator refused"),
            kv_memory(allocator) as kv,
        ):
            llm = make()
        assert not kv.is_ours
        assert complete(llm, "Hi") == complete(make(), "Hi")
        with pytest.raises(ValueError, match=r"llama\.cpp's own"):
            kv.k(0)

    def test_an_allocator_that_nobody_keeps(self, make):
        with kv_memory(PageAllocator()) as kv:
            llm = make()
        del kv
        gc.collect()
        assert complete(llm, "Hi") == complete(make(), "Hi")

    def test_only_one_context_of_a_block(self, make):
        with kv_memory() as kv:
            first, second = make(), make()
        assert kv.stats().n_buffers >= 1
        first.close()
        assert not kv.is_live
        assert complete(second, "Hi") == complete(make(), "Hi")

    def test_nothing_stays_replaced(self):
        init = llama_cpp.llama_cpp.llama_init_from_model
        with pytest.raises(ZeroDivisionError), kv_memory():
            raise ZeroDivisionError
        assert llama_cpp.llama_cpp.llama_init_from_model is init
        with kv_memory() as kv:
            pass
        assert not kv.is_ours

    def test_blocks_in_blocks(self, make):
        with kv_memory() as kv:
            with pytest.raises(RuntimeError, match="inside"), kv_memory():
                pass
            make()
        assert kv.is_ours

    def test_a_context_that_cannot_be_made(self, make):
        with kv_memory() as kv, pytest.raises(ValueError, match="context"):
            make(flash_attn=False, type_v=8)
        assert not kv.is_ours
        assert complete(make(), "Hi")

    def test_repr(self, make_ours):
        _, kv = make_ours(flash_attn=True)
        assert "0 B of 1" in repr(kv)


class TestSelfTest:
    def test_slots(self):
        hook = context_memory._hook()
        assert len(set(hook.slots)) == 3

    @pytest.mark.parametrize("function", ["ggml_backend_buffer_clear", "ggml_backend_buffer_free"])
    def test_another_ggml(self, make, monkeypatch, function):
        """Where its functions do not call what is expected, llama.cpp is left alone."""
        addresses = {name: context_memory._address(name) for name in NAMES}
        addresses[function] = context_memory._address("ggml_backend_buffer_get_size")

        def other_hook():
            return BufferHook(*addresses.values(), context_memory._is_writable)

        monkeypatch.setattr(context_memory, "_hook", other_hook)
        with pytest.warns(RuntimeWarning, match="ggml's tables are others"), kv_memory() as kv:
            llm = make()
        assert not kv.is_ours
        assert complete(llm, "Hi") == complete(make(), "Hi")

    def test_a_table_that_cannot_be_written(self, make, monkeypatch):
        monkeypatch.setattr(context_memory, "_is_writable", lambda _: False)
        monkeypatch.setattr(context_memory, "_hook", context_memory._hook.__wrapped__)
        with pytest.warns(RuntimeWarning, match="cannot be written"), kv_memory():
            make()


NAMES = (
    "ggml_backend_cpu_buffer_type",
    "ggml_backend_buft_alloc_buffer",
    "ggml_backend_cpu_buffer_from_ptr",
    "ggml_backend_buffer_clear",
    "ggml_backend_buffer_free",
)


class TestRows:
    def test_they_are_live_and_those_of_the_state(self, make_ours, context):
        llm, kv = make_ours(**context)
        with pytest.raises(ValueError, match="no tokens yet"):
            kv.k(0)
        llm.eval(token_ids(50))
        k, v = kv.k(1), kv.v(1)
        assert not k.flags.writeable
        assert len(k) == len(v) == llm.n_ctx()
        if "type_k" not in context or context["type_k"] == 0:
            assert k.shape[1:] == v.shape[1:] == (2, 64)
        before = k[:50].copy(), v[:50].copy()
        assert all(np.any(rows) for rows in before)
        llm.eval(token_ids(30, seed=2))
        assert np.array_equal(k[:50], before[0])
        assert np.array_equal(v[:50], before[1])
        assert np.any(k[50:80])
        assert not np.any(k[80:])

    def test_transposed_v_is_what_flash_attention_has(self, make_ours):
        rows = []
        for flash_attn in (False, True):
            llm, kv = make_ours(flash_attn=flash_attn)
            llm.eval([5])
            rows.append(kv.v(0)[:1].copy())
        assert np.array_equal(*rows)

    def test_a_sliding_window(self, make, make_ours, gemma3_path):
        """It has buffers of its own, which are ours; what lies where in them is not known."""
        (llm, kv), plain = make_ours(gemma3_path), make(gemma3_path)
        for each in (llm, plain):
            each.eval(token_ids(200))
        assert np.array_equal(logits(llm), logits(plain))
        assert 0 < kv.stats().resident_bytes < kv.stats().reserved_bytes
        for call in (lambda: kv.k(0), kv.trim, kv.prefix):
            with pytest.raises(LlamaStateError, match="sliding window"):
                call()

    def test_layers(self, make_ours):
        llm, kv = make_ours()
        llm.eval([5])
        for layer in (-1, 4):
            with pytest.raises(ValueError, match="of 4"):
                kv.k(layer)

    def test_an_array_keeps_the_memory(self, make_ours):
        llm, kv = make_ours(flash_attn=True)
        llm.eval(token_ids(50))
        k = kv.k(0)
        before = k.copy()
        llm.close()
        assert np.array_equal(k, before)
        with pytest.raises(ClosedError):
            kv._buffers[0].address  # noqa: B018
        with pytest.raises((ClosedError, ValueError)):
            kv._kv_buffer().purge_all()
        del k, kv
        gc.collect()


class TestTrim:
    def test_pages_of_removed_tokens_go(self, make, make_ours, context):
        (llm, kv), plain = make_ours(n_ctx=8192, **context), make(n_ctx=8192, **context)
        for each in (llm, plain):
            each.eval(token_ids(2500))
        grown = kv.stats().resident_bytes
        for each in (llm, plain):
            sequence(each).rm(0, 100, -1)
            each.n_tokens = 100
        assert kv.trim() > 0.3 * grown
        assert kv.trim() == 0
        for each in (llm, plain):
            each.eval(token_ids(200, seed=3))
        assert np.array_equal(logits(llm), logits(plain))

    def test_holes(self, make, make_ours):
        (llm, kv), plain = make_ours(n_ctx=2048, flash_attn=True), make(n_ctx=2048, flash_attn=True)
        for each in (llm, plain):
            each.eval(token_ids(1000))
            sequence(each).rm(0, 200, 800)
        assert kv.trim() > 400 * 2048
        for each in (llm, plain):
            each.eval([5])
        assert np.array_equal(logits(llm), logits(plain))

    @pytest.mark.parametrize("unified", [False, True])
    def test_several_sequences(self, tiny_path, unified):
        with kv_memory() as kv:
            ours = Context(tiny_path, unified=unified)
        plain = Context(tiny_path, unified=unified)
        for context in (ours, plain):
            for seq_id in (0, 2, 3):
                for start in range(0, 60, 30):
                    context.eval(seq_id, range(start, start + 30))
            sequence(context).rm(2, 10, -1)
            sequence(context).cp(0, 1)
        assert len(kv.k(0)) == 256 * (1 if unified else 4)
        assert kv.trim() > 0
        assert ours.state() == plain.state()
        for context in (ours, plain):
            context.eval(2, range(10, 40))
        assert ours.state() == plain.state()
        for context in (ours, plain):
            context.close()
        assert not kv.is_live

    def test_an_empty_context(self, make_ours):
        llm, kv = make_ours(flash_attn=True)
        llm.eval(token_ids(100))
        sequence(llm).rm()
        llm.n_tokens = 0
        assert kv.trim() > 0
        assert kv.stats().resident_bytes <= kv._buffers[0].nbytes
        assert complete(llm, "Hi")

    def test_clearing_gives_all_back(self, make_ours):
        llm, kv = make_ours(flash_attn=True)
        llm.eval(token_ids(100))
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(llm._ctx.ctx), True)
        assert kv._kv_buffer().resident_bytes() == 0

    def test_a_refusal(self, make_ours):
        llm, kv = make_ours(flash_attn=True)
        llm.eval(token_ids(100))
        sequence(llm).rm(0, 1, -1)
        llm.n_tokens = 1
        with os_memory.refusing("madvise"), pytest.raises((OSError, OutOfMemoryError)):
            kv.trim()
        llm.eval([5])


class TestSharing:
    def test_logits_and_pages(self, make, make_ours):
        tokens = token_ids(320)
        (llm, kv), plain = make_ours(n_ctx=1024, flash_attn=True), make(n_ctx=1024, flash_attn=True)
        others = [make_ours(n_ctx=1024, flash_attn=True) for _ in range(3)]
        for each in (llm, plain):
            each.eval(tokens)
        for other, other_kv in others:
            assert kv.share_prefix(other_kv) == 320 * 2048
            assert other.input_ids[:320].tolist() == tokens
        for i, each in enumerate((llm, plain, *(other for other, _ in others))):
            each.eval([5 + i // 4])
        expected = logits(plain)
        for each in (llm, others[0][0], others[1][0]):
            assert np.array_equal(logits(each), expected)
        assert not np.array_equal(logits(others[2][0]), expected)

    def test_a_part_of_it(self, make_ours):
        llm, kv = make_ours(flash_attn=True)
        other, other_kv = make_ours(flash_attn=True)
        llm.eval(token_ids(100))
        other.eval(token_ids(30, seed=2))
        kv.share_prefix(other_kv, 64)
        assert other.n_tokens == 64
        expected_tokens = token_ids(100)[:64]
        plain, _ = make_ours(flash_attn=True)
        plain.eval(expected_tokens)
        llm._ctx.kv_cache_seq_rm(-1, 64, -1)
        llm.n_tokens = 64
        for each in (llm, other):
            each.eval([5])
        assert np.array_equal(logits(llm), logits(other))

    def test_what_cannot_be_shared(self, make_ours):
        (llm, kv), (_, transposed) = make_ours(flash_attn=True), make_ours()
        (_, longer), (_, other) = make_ours(flash_attn=True, n_ctx=1024), make_ours(flash_attn=True)
        with pytest.raises(ValueError, match="has 0"):
            kv.share_prefix(other)
        llm.eval(token_ids(100))
        with pytest.raises(ValueError, match="has 100"):
            kv.share_prefix(other, 101)
        with pytest.raises(LlamaStateError, match="n_ctx"):
            kv.share_prefix(longer)
        with pytest.raises(LlamaStateError, match="refused the prefix"):
            kv.share_prefix(transposed)
        (t, t_kv) = make_ours()
        t.eval(token_ids(10))
        with pytest.raises(ValueError, match="flash_attn=True"):
            t_kv.share_prefix(other)

    def test_clearing_a_context_that_shares(self, make_ours):
        (llm, kv), (other, other_kv) = make_ours(flash_attn=True), make_ours(flash_attn=True)
        llm.eval(token_ids(100))
        kv.share_prefix(other_kv)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(other._ctx.ctx), True)
        other.n_tokens = 0
        assert other_kv._kv_buffer().resident_bytes() == 0
        other.eval(token_ids(20))
        llm.eval([5])
        other.close()
        llm.close()

    def test_another_process(self, tiny_path, make_ours):
        llm, kv = make_ours(flash_attn=True)
        llm.eval(token_ids(100))
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=adopt_and_evaluate, args=(theirs, tiny_path))
        process.start()
        ours.send(kv.prefix())
        assert ours.poll(60)
        n_tokens, found = ours.recv()
        process.join(30)
        assert process.exitcode == 0
        llm.eval([5])
        assert n_tokens == 100
        assert np.array_equal(found, logits(llm))
