"""Layouts from model files and configs, and how K is rotated."""

import json

import numpy as np
import pytest

from pagealloc.kv import KVLayout, Rope
from pagealloc.kv.model_shape import shape_from_gguf_metadata

SMOLLM2 = {
    "general.architecture": "llama",
    "llama.block_count": 30,
    "llama.attention.head_count": 9,
    "llama.attention.head_count_kv": 3,
    "llama.embedding_length": 576,
    "llama.context_length": 8192,
    "llama.rope.freq_base": 100000.0,
    "llama.rope.dimension_count": 64,
}

# What the model cards of these say, shortened to what determines the cache.
LLAMA_3_1 = json.loads("""{
    "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
    "rope_theta": 500000.0, "torch_dtype": "bfloat16",
    "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3"}}""")
QWEN3 = json.loads("""{
    "hidden_size": 1024, "head_dim": 128, "num_attention_heads": 16, "num_hidden_layers": 28,
    "num_key_value_heads": 8, "max_position_embeddings": 40960, "rope_theta": 1000000,
    "rope_scaling": null, "sliding_window": null, "torch_dtype": "bfloat16"}""")
FALCON_7B = {"n_layer": 32, "n_head": 71, "hidden_size": 4544, "multi_query": True}
GPT2 = {"n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024}
PHI = {
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "hidden_size": 2048,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
}
DEEPSEEK = {
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "hidden_size": 7168,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "rope_theta": 10000,
    "max_position_embeddings": 4096,
}
HYBRID = {
    "text_config": {
        "num_hidden_layers": 4,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "layer_types": [
            "linear_attention",
            "linear_attention",
            "linear_attention",
            "full_attention",
        ],
    }
}


class TestHuggingFace:
    @pytest.mark.parametrize(
        ("config", "n_layers", "heads", "k_dim", "v_dim"),
        [
            (LLAMA_3_1, 32, 8, 128, None),
            (QWEN3, 28, 8, 128, None),
            (FALCON_7B, 32, 1, 64, None),
            (GPT2, 12, 12, 64, None),
            (PHI, 24, 32, 64, None),
            (DEEPSEEK, 61, 128, 192, 128),
            (HYBRID, 1, 2, 256, None),
        ],
    )
    def test_shapes(self, config, n_layers, heads, k_dim, v_dim):
        layout = KVLayout.from_hf_config(config, max_tokens=512)
        assert (layout.n_layers, layout.n_kv_heads) == (n_layers, heads)
        assert (layout.head_dim, layout.v_head_dim) == (k_dim, v_dim)

    def test_defaults_and_options(self):
        layout = KVLayout.from_hf_config(LLAMA_3_1)
        assert (layout.max_tokens, layout.dtype, layout.order) == (
            131072,
            "bfloat16",
            "interleaved",
        )
        assert layout.token_bytes == 128 << 10
        layout = KVLayout.from_hf_config(LLAMA_3_1, 4096, dtype="float16", order="block", rope=None)
        assert (layout.max_tokens, layout.dtype, layout.order) == (4096, "float16", "block")
        assert layout.rope is None
        assert KVLayout.from_hf_config(QWEN3 | {"torch_dtype": "int8"}).dtype == "float16"

    def test_rope(self):
        assert KVLayout.from_hf_config(QWEN3).rope == Rope(128, base=1e6)
        assert KVLayout.from_hf_config(PHI).rope == Rope(32)
        assert KVLayout.from_hf_config(GPT2).rope is None
        assert KVLayout.from_hf_config(DEEPSEEK).rope is None
        linear = QWEN3 | {"rope_scaling": {"type": "linear", "factor": 4.0}}
        assert KVLayout.from_hf_config(linear).rope == Rope(128, base=1e6, scale=0.25)
        yarn = QWEN3 | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}
        assert KVLayout.from_hf_config(yarn).rope is None
        newer = {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}
        older = {k: v for k, v in QWEN3.items() if not k.startswith("rope")}
        assert KVLayout.from_hf_config(older | newer).rope == Rope(128, base=1e6)

    def test_llama_3_1_stretches_long_waves_only(self):
        rope = KVLayout.from_hf_config(LLAMA_3_1).rope
        plain = Rope(128, base=500000.0).frequencies()
        ratio = plain / rope.frequencies()
        wavelengths = 2 * np.pi / plain
        np.testing.assert_allclose(ratio[wavelengths < 8192 / 4], 1)
        np.testing.assert_allclose(ratio[wavelengths > 8192], 8)
        between = (wavelengths > 8192 / 4) & (wavelengths < 8192)
        assert between.any()
        assert (ratio[between] > 1).all()
        assert (ratio[between] < 8).all()

    @pytest.mark.parametrize(
        ("config", "error", "message"),
        [
            ([], TypeError, r"dict of a config.json, not list"),
            ({}, ValueError, "num_hidden_layers"),
            ({"num_hidden_layers": 2}, ValueError, "num_attention_heads"),
            ({"num_hidden_layers": 2, "num_attention_heads": 2}, ValueError, "head_dim"),
            (GPT2 | {"n_positions": None}, ValueError, "give max_tokens"),
            (GPT2 | {"layer_types": ["attention"]}, ValueError, "names 1 layers of 12"),
            (GPT2 | {"layer_types": ["mamba"] * 12}, ValueError, "none of layer_types"),
        ],
    )
    def test_what_tells_no_shape(self, config, error, message):
        with pytest.raises(error, match=message):
            KVLayout.from_hf_config(config)


class TestGGUF:
    def test_metadata(self):
        shape = shape_from_gguf_metadata(SMOLLM2.get)
        assert shape.n_kv_heads == (3,) * 30
        assert (shape.k_head_dim, shape.v_head_dim, shape.context_tokens) == (64, 64, 8192)
        assert shape.rope == Rope(64, base=100000.0, pairs="neighbours")

    def test_a_linear_scaling_and_factors(self):
        scaling = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
        shape = shape_from_gguf_metadata((SMOLLM2 | scaling).get, np.full(32, 3.0, np.float32))
        assert shape.rope == Rope(64, 100000.0, "neighbours", 0.5, (3.0,) * 32)

    @pytest.mark.parametrize("changes", [{"llama.rope.scaling.type": "yarn"}])
    def test_an_unknown_rotation_is_not_claimed(self, changes):
        assert shape_from_gguf_metadata((SMOLLM2 | changes).get).rope is None

    def test_an_unknown_architecture_has_a_shape_all_the_same(self):
        renamed = {key.replace("llama.", "newmodel."): value for key, value in SMOLLM2.items()}
        shape = shape_from_gguf_metadata((renamed | {"general.architecture": "newmodel"}).get)
        assert shape.n_kv_heads == (3,) * 30
        assert shape.rope is None

    def test_a_file(self, tmp_path):
        gguf = pytest.importorskip("gguf", reason="needs the extra 'demo'")
        path = tmp_path / "model.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_block_count(6)
        writer.add_embedding_length(576)
        writer.add_head_count(9)
        writer.add_head_count_kv([3, 0, 3, 1, 0, 3])
        writer.add_key_length(64)
        writer.add_value_length(32)
        writer.add_context_length(8192)
        writer.add_tensor("rope_freqs.weight", np.full(32, 2, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        layout = KVLayout.from_gguf(path, order="block")
        assert layout.n_layers == 4
        assert layout.n_kv_heads == (3, 3, 1, 3)
        assert (layout.head_dim, layout.v_head_dim, layout.max_tokens) == (64, 32, 8192)
        assert layout.rope == Rope(64, pairs="neighbours", freq_factors=(2.0,) * 32)
        assert KVLayout.from_gguf(path, 100).max_tokens == 100
        path.write_bytes(path.read_bytes()[:100])
        with pytest.raises(ValueError, match="no readable GGUF file"):
            KVLayout.from_gguf(path)
        with pytest.raises(FileNotFoundError):
            KVLayout.from_gguf(tmp_path / "none.gguf")

    def test_without_the_package_the_error_names_it(self, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "gguf", None)
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'pagealloc\[demo\]'"):
            KVLayout.from_gguf("model.gguf")


class TestRope:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"n_dims": 7}, "even"),
            ({"n_dims": 0}, "even"),
            ({"n_dims": 8, "pairs": "thirds"}, "'halves' and 'neighbours'"),
            ({"n_dims": 8, "base": 0}, "base=0"),
            ({"n_dims": 8, "scale": float("nan")}, "scale=nan"),
            ({"n_dims": 8, "freq_factors": (1.0,)}, "1 for 4 pairs"),
            ({"n_dims": 4, "freq_factors": (1.0, -1.0)}, "above 0"),
        ],
    )
    def test_bad_numbers(self, options, message):
        with pytest.raises(ValueError, match=message):
            Rope(**options)

    @pytest.mark.parametrize("pairs", ["halves", "neighbours"])
    def test_pair_by_pair(self, pairs):
        """Against complex numbers: pair i turns by position * base ** (-2i / n_dims)."""
        rope = Rope(6, base=100.0, pairs=pairs)
        k = np.random.default_rng(0).normal(size=(4, 2, 8)).astype(np.float32)
        rotated = rope.rotate(k, np.array([0, 1, 5, -3]))
        for i in range(3):
            first, second = (i, i + 3) if pairs == "halves" else (2 * i, 2 * i + 1)
            turned = (k[..., first] + 1j * k[..., second]) * np.exp(
                1j * np.array([0, 1, 5, -3])[:, None] * 100.0 ** (-2 * i / 6)
            )
            np.testing.assert_allclose(rotated[..., first], turned.real, atol=1e-5)
            np.testing.assert_allclose(rotated[..., second], turned.imag, atol=1e-5)
        np.testing.assert_array_equal(rotated[..., 6:], k[..., 6:])

    def test_rotations_add_up(self):
        rope, k = Rope(8), np.random.default_rng(0).normal(size=(3, 1, 8)).astype(np.float32)
        once = rope.rotate(k, np.array([12, 12, 12]))
        twice = rope.rotate(rope.rotate(k, np.array([5, 20, -8])), np.array([7, -8, 20]))
        np.testing.assert_allclose(twice, once, atol=1e-5)
