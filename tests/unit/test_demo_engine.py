"""The NumPy Llama against a plain second reckoning, and its weights against the file."""

import numpy as np
import pytest

from pagealloc.demo.engine import Llama
from pagealloc.demo.errors import UnsupportedModelError
from pagealloc.demo.generation import Sampler, generate, prefill
from pagealloc.demo.kv_stores import PagedKV, PreallocatedKV, paged_layout
from pagealloc.demo.tiny_model import write_tiny_model
from pagealloc.demo.weights import load_llama, open_gguf, read_shape
from pagealloc.kv import KVCache

gguf = pytest.importorskip("gguf", reason="needs the extra 'demo'")

MAX_TOKENS = 512


@pytest.fixture(scope="module")
def tiny_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    write_tiny_model(path)
    return path


@pytest.fixture(scope="module")
def model(tiny_path):
    return Llama.load(tiny_path)


@pytest.fixture
def cache(model):
    cache = KVCache(paged_layout(model.shape, MAX_TOKENS))
    yield cache
    cache.close()


def token_ids(n_tokens, seed=1):
    return np.random.default_rng(seed).integers(4, 260, n_tokens).tolist()


def reckon(path, ids):
    """Logits of all positions, in float64, one head and one position at a time, no cache."""
    tensors = {t.name: np.float64(t.data) for t in open_gguf(path).tensors}
    shape = read_shape(open_gguf(path))
    group = shape.n_heads // shape.n_kv_heads

    def norm(x, name):
        return x / np.sqrt(np.mean(x**2) + shape.norm_epsilon) * tensors[name]

    def turn(head, position):
        turned = np.empty_like(head)
        for pair in range(shape.rope_dim // 2):
            angle = position * shape.rope_base ** (-2 * pair / shape.rope_dim)
            a, b = head[2 * pair], head[2 * pair + 1]
            turned[2 * pair] = a * np.cos(angle) - b * np.sin(angle)
            turned[2 * pair + 1] = a * np.sin(angle) + b * np.cos(angle)
        return turned

    xs = [tensors["token_embd.weight"][i] for i in ids]
    for layer in range(shape.n_layers):
        w = {n.split(".")[2]: t for n, t in tensors.items() if n.startswith(f"blk.{layer}.")}
        normed = [norm(x, f"blk.{layer}.attn_norm.weight") for x in xs]
        q, k, v = (
            [(w[f"attn_{part}"] @ x).reshape(-1, shape.head_dim) for x in normed] for part in "qkv"
        )
        k = [np.float16([turn(h, t) for h in heads]).astype(float) for t, heads in enumerate(k)]
        v = [np.float16(heads).astype(float) for heads in v]
        for t in range(len(xs)):
            mixed = []
            for head in range(shape.n_heads):
                kv_head = head // group
                query = turn(q[t][head], t)
                scores = np.array([query @ k[s][kv_head] for s in range(t + 1)])
                weights = np.exp(scores / np.sqrt(shape.head_dim))
                weights /= weights.sum()
                mixed.append(sum(weights[s] * v[s][kv_head] for s in range(t + 1)))
            xs[t] = xs[t] + w["attn_output"] @ np.concatenate(mixed)
            x = norm(xs[t], f"blk.{layer}.ffn_norm.weight")
            gate = w["ffn_gate"] @ x
            xs[t] = xs[t] + w["ffn_down"] @ (gate / (1 + np.exp(-gate)) * (w["ffn_up"] @ x))
    return np.array([tensors["output.weight"] @ norm(x, "output_norm.weight") for x in xs])


def test_logits_agree_with_a_plain_second_reckoning(model, tiny_path):
    ids = token_ids(9)
    logits = model.logits(model.forward(ids, PreallocatedKV(model.shape, MAX_TOKENS)))
    expected = reckon(tiny_path, ids)
    np.testing.assert_allclose(logits, expected, rtol=2e-3, atol=2e-3 * np.abs(expected).max())


def test_chunks_and_single_tokens_give_the_same_logits_as_one_pass(model):
    ids = token_ids(40)
    whole = model.forward(ids, PreallocatedKV(model.shape, MAX_TOKENS))
    kv = PreallocatedKV(model.shape, MAX_TOKENS)
    parts = [model.forward(ids[a:b], kv) for a, b in ((0, 17), (17, 38), (38, 39), (39, 40))]
    np.testing.assert_allclose(np.concatenate(parts), whole, rtol=1e-3, atol=1e-3)
    assert len(kv) == 40


def test_both_kv_stores_agree_to_the_last_bit(model, cache):
    ids = token_ids(300)
    stores = [PreallocatedKV(model.shape, MAX_TOKENS), PagedKV(cache.sequence())]
    results = []
    for kv in stores:
        prompt = prefill(model, kv, ids)
        answer = list(generate(model, kv, prompt, Sampler(), max_new_tokens=20, stop_ids=()))
        results.append((prompt, answer))
    np.testing.assert_array_equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    stores[1].close()


def test_forks_answer_as_if_each_had_computed_the_shared_prompt(model, cache):
    shared_ids, questions = token_ids(100), [token_ids(7, seed) for seed in (2, 3, 4)]
    root = PagedKV(cache.sequence())
    prefill(model, root, shared_ids)
    forks = [root.fork() for _ in questions]
    for fork, question in zip(forks, questions, strict=True):
        alone = PreallocatedKV(model.shape, MAX_TOKENS)
        prefill(model, alone, shared_ids)
        np.testing.assert_array_equal(
            prefill(model, fork, question), prefill(model, alone, question)
        )
    assert len(root) == 100
    for kv in (*forks, root):
        kv.close()


def test_weights_are_dequantised_and_stacked(tmp_path, tiny_path):
    path = tmp_path / "quantised.gguf"
    requantise(tiny_path, path, gguf.GGMLQuantizationType.Q8_0)
    (shape, exact), (_, rounded) = load_llama(tiny_path), load_llama(path)
    assert exact.layers[0].qkv.shape == ((4 + 2 * 2) * 64, 256)
    assert exact.layers[0].gate_up.shape == (2 * 512, 256)
    assert shape.kv_token_bytes == 4 * 2 * 2 * 64 * 2
    for a, b in zip(exact.layers, rounded.layers, strict=True):
        assert b.qkv.dtype == np.float32
        np.testing.assert_allclose(a.qkv, b.qkv, atol=np.abs(a.qkv).max() / 127)
        assert not np.array_equal(a.qkv, b.qkv)


def requantise(source, target, kind):
    """Copy a model with its attention matrices quantised."""
    copy_model(
        source,
        target,
        tensor=lambda name, data: (
            (gguf.quants.quantize(data, kind), kind)
            if ".attn_" in name and data.ndim == 2
            else (data, None)
        ),
    )


def copy_model(source, target, *, tensor=lambda _name, data: (data, None), **changed):
    """Copy the shape and the tensors of a tiny model; `changed` replaces or adds fields."""
    reader = open_gguf(source)
    writer = gguf.GGUFWriter(target, changed.pop("architecture", "llama"))
    for name, field in reader.fields.items():
        if name.startswith("llama.") and name not in changed:
            value = field.contents()
            (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(name, value)
    for name, value in changed.items():
        (writer.add_uint32 if isinstance(value, int) else writer.add_string)(name, value)
    for t in reader.tensors:
        data, kind = tensor(t.name, np.array(t.data))
        if data is not None:
            writer.add_tensor(t.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"architecture": "mamba"}, "'mamba'"),
        ({"llama.expert_count": 8}, "experts"),
        ({"llama.rope.scaling.type": "yarn"}, "'yarn'"),
        ({"llama.attention.key_length": 32, "llama.attention.value_length": 64}, "one length"),
    ],
)
def test_what_the_engine_does_not_compute_is_refused(tmp_path, tiny_path, changed, message):
    path = tmp_path / "changed.gguf"
    copy_model(tiny_path, path, **changed)
    with pytest.raises(UnsupportedModelError, match=message):
        load_llama(path)


def test_a_missing_tensor_is_named(tmp_path, tiny_path):
    path = tmp_path / "cut.gguf"
    copy_model(
        tiny_path,
        path,
        tensor=lambda name, data: (None if name == "blk.2.ffn_up.weight" else data, None),
    )
    with pytest.raises(UnsupportedModelError, match=r"blk\.2\.ffn_up\.weight"):
        load_llama(path)


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    path = tmp_path / "text.gguf"
    path.write_text("once upon a time " * 100)
    with pytest.raises(UnsupportedModelError, match=r"text\.gguf"):
        load_llama(path)
