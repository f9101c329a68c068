import argparse
import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pagealloc.cli import KV_CHOICES, plan, plan_costs
from pagealloc.cli.main import main
from pagealloc.cli.model_shape import LayerGroup, ModelShape, shape_from_metadata
from pagealloc.kv.quantisation import KV_KINDS

# SmolLM2-135M: 23,040 bytes of float16 rows a token.
SMOLLM2 = ModelShape((LayerGroup(30, 3, 64),), context_tokens=8192)
SMOLLM2_OPTIONS = ["--layers=30", "--kv-heads=3", "--head-dim=64"]


def question(shape: ModelShape = SMOLLM2, **changes: Any) -> plan_costs.Question:
    numbers = {
        "context_tokens": 8192,
        "used_tokens": 1100,
        "shared_tokens": 1000,
        "sequences": 8,
        "memory_bytes": 16 << 30,
        "page_bytes": 4096,
    }
    return plan_costs.Question(shape, **(numbers | changes))


def costs(asked: plan_costs.Question) -> dict[str, plan_costs.Cost]:
    return {cost.name: cost for cost in plan_costs.costs_of(asked)}


class TestCosts:
    def test_preallocated_is_the_window_of_every_sequence(self):
        cost = costs(question())["preallocated float16"]
        assert cost.token_bytes == 23040
        assert cost.sequence_bytes == 8192 * 23040
        # 768 bytes a token and layer: 6 MiB a layer, and a page of page table for each 2 MiB.
        assert cost.page_table_bytes == 30 * 3 * 4096
        each_bytes = 8192 * 23040 + 90 * 4096
        assert cost.total_bytes == 8 * each_bytes
        assert cost.fitting_sequences == (16 << 30) // each_bytes

    def test_paged_is_the_pages_of_the_tokens_and_the_prefix_once(self):
        cost = costs(question())["paged float16"]
        # 1,100 tokens take 207 pages a layer; of the prefix, 187 are whole.
        assert cost.shared_bytes == 30 * 187 * 4096
        assert cost.sequence_bytes == 30 * (207 - 187) * 4096
        assert cost.page_table_bytes == 30 * 4096
        each_bytes = 30 * 21 * 4096
        assert cost.total_bytes == cost.shared_bytes + 8 * each_bytes
        assert cost.fitting_sequences == ((16 << 30) - cost.shared_bytes) // each_bytes

    def test_paged_without_sharing_or_growth(self):
        alone = costs(question(shared_tokens=0))["paged float16"]
        assert alone.shared_bytes == 0
        assert alone.sequence_bytes == 30 * 207 * 4096
        same = costs(question(used_tokens=1000))["paged float16"]
        assert same.sequence_bytes == 0
        assert same.shared_bytes == 30 * 188 * 4096
        assert same.total_bytes == same.shared_bytes + 8 * 30 * 4096

    def test_quantised_rows_are_ggml_blocks(self):
        found = costs(question())
        values = 30 * 3 * 64  # of K, and as many of V
        assert found["paged q8_0"].token_bytes == 2 * values // 32 * 34
        assert found["paged recommended"].token_bytes == values // 32 * (34 + 18)
        assert found["paged q4_0"].token_bytes == 2 * values // 32 * 18

    def test_quantised_sequences_have_a_ring_of_rows_as_they_came(self):
        cost = costs(question())["paged recommended"]
        # (1,100 - 128) // 16 * 16 = 960 tokens of 312 bytes a layer are 74 pages, 864 of the prefix
        # are 65; and the ring of 144 tokens of 768 bytes is 27.
        assert cost.shared_bytes == 30 * 65 * 4096
        assert cost.sequence_bytes == 30 * (74 - 65 + 27) * 4096
        assert cost.page_table_bytes == 30 * 2 * 4096

    def test_rows_that_are_no_multiple_of_32_are_not_quantised(self):
        odd = question(ModelShape((LayerGroup(2, 3, 80),), None))
        assert list(costs(odd)) == ["preallocated float16", "paged float16"]
        assert "Not quantisable" in plan.as_text(odd, plan_costs.costs_of(odd))

    def test_groups_of_layers_add_up(self):
        mixed = question(ModelShape((LayerGroup(10, 3, 64), LayerGroup(20, 3, 64)), None))
        assert plan_costs.costs_of(mixed) == plan_costs.costs_of(question())

    def test_64_kib_pages(self):
        cost = costs(question(page_bytes=65536, shared_tokens=0))["paged float16"]
        assert cost.sequence_bytes == 30 * 13 * 65536
        assert cost.page_table_bytes == 30 * 65536

    def test_a_prefix_larger_than_memory_fits_nobody(self):
        assert costs(question(memory_bytes=1 << 20))["paged float16"].fitting_sequences == 0

    def test_mappings_are_warned_of_where_they_would_run_out(self):
        def text(**changes: int) -> str:
            asked = question(max_map_count=65530, **changes)
            return plan.as_text(asked, plan_costs.costs_of(asked))

        assert "allows 1,092 such sequences" in text()
        assert "mappings" not in text(shared_tokens=0)
        assert "mappings" not in text(memory_bytes=1 << 30)

    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("float16", {}),
            ("q8_0", {"k_type": "q8_0", "v_type": "q8_0"}),
            ("recommended", {"quantize": "recommended"}),
            ("q4_0", {"k_type": "q4_0", "v_type": "q4_0"}),
        ],
    )
    @pytest.mark.parametrize("n_tokens", [100, 250, 900])
    def test_a_window_holds_what_the_plan_says(self, name, options, n_tokens):
        from pagealloc import page_size_bytes
        from pagealloc.kv import KVCache, KVLayout

        token = np.ones((4, 2, 2, 32), np.float16)
        with KVCache(KVLayout(4, 2, 32, 1024), **options) as cache:
            sequence = cache.sequence()
            for _ in range(n_tokens):
                sequence.append_token(token)
            asked = question(
                ModelShape((LayerGroup(4, 2, 32),), None),
                context_tokens=1024,
                used_tokens=n_tokens,
                shared_tokens=0,
                page_bytes=page_size_bytes(),
            )
            planned = costs(asked)[f"paged {name}"].sequence_bytes
            assert cache.stats().file_bytes == planned

    def test_every_kind_can_be_asked_for(self):
        assert tuple(KV_KINDS) == KV_CHOICES

    def test_only_the_kind_that_was_asked_for(self):
        assert list(costs(question(kv="q8_0"))) == ["preallocated float16", "paged q8_0"]


class TestCommand:
    def test_table(self, capsys):
        arguments = [*SMOLLM2_OPTIONS, "--ctx=8192", "--tokens=1100", "--shared-prefix=1000"]
        assert main(["plan", *arguments, "--sequences=8", "--memory=16GiB"]) == 0
        out = capsys.readouterr().out
        assert "model     30 layers × 3 KV heads × 64\n" in out
        assert "sequence  1,100 of 8,192 tokens, 1,000 of them shared\n" in out
        table = out.split("\n\n")[1].splitlines()
        assert len({len(line) for line in table}) == 1
        assert " ".join(table[0].split()) == (
            "per token per sequence + page tables shared, once 8 sequences fit in 16.0 GiB"
        )
        assert " ".join(table[1].split()) == (
            "preallocated float16 22.5 KiB 180 MiB 360 KiB 0 B 1.41 GiB 90"
        )

    @pytest.mark.skipif(os.sysconf("SC_PAGE_SIZE") != 4096, reason="the page shows 4 KiB pages")
    def test_the_documented_example_is_the_output(self, capsys):
        page = (Path(__file__).parents[2] / "docs/cli.md").read_text()
        example = re.search(r"\$ pagealloc (plan .*)\n((?:.*\n)*?)```", page)
        assert example is not None
        assert main(shlex.split(example[1])) == 0
        assert capsys.readouterr().out == example[2]

    def test_json(self, capsys):
        assert main(["plan", *SMOLLM2_OPTIONS, "--ctx=8192", "--memory=1GiB", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["used_tokens"] == found["context_tokens"] == 8192
        assert found["memory_bytes"] == 1 << 30
        assert found["costs"][0]["sequence_bytes"] == 8192 * 23040

    def test_memory_is_this_process_s_by_default(self):
        args = parse(*SMOLLM2_OPTIONS, "--ctx=10")
        assert plan.question_of(args).memory_bytes > 0

    @pytest.mark.parametrize(
        ("arguments", "word"),
        [
            ([], "--layers, --kv-heads, --head-dim"),
            (["--layers=2"], "--kv-heads, --head-dim"),
            (SMOLLM2_OPTIONS, "--ctx"),
            (["--layers=0", "--kv-heads=3", "--head-dim=64", "--ctx=1"], "--layers"),
            ([*SMOLLM2_OPTIONS, "--ctx=0"], "--ctx"),
            ([*SMOLLM2_OPTIONS, "--ctx=8", "--tokens=9"], "--tokens 9"),
            ([*SMOLLM2_OPTIONS, "--ctx=8", "--shared-prefix=-1"], "--shared-prefix"),
            ([*SMOLLM2_OPTIONS, "--ctx=8", "--tokens=4", "--shared-prefix=5"], "--shared-prefix"),
            ([*SMOLLM2_OPTIONS, "--ctx=8", "--sequences=0"], "--sequences"),
            ([*SMOLLM2_OPTIONS, "--ctx=8", "--memory=lots"], "--memory"),
            (["--model=x.gguf", "--layers=2"], "leave out --layers"),
        ],
    )
    def test_impossible_values(self, capsys, arguments, word):
        assert main(["plan", *arguments]) == 2
        err = capsys.readouterr().err
        assert word in err
        assert err.count("\n") == 1


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    plan.add_arguments(parser)
    return parser.parse_args(arguments)


LLAMA = {
    "general.architecture": "llama",
    "llama.block_count": 30,
    "llama.embedding_length": 576,
    "llama.attention.head_count": 9,
    "llama.attention.head_count_kv": 3,
    "llama.context_length": 8192,
}


class TestMetadata:
    def test_head_dim_from_the_embedding(self):
        assert shape_from_metadata(LLAMA.get) == SMOLLM2

    def test_head_dim_said(self):
        lengths = {"llama.attention.key_length": 128, "llama.attention.value_length": 128}
        shape = shape_from_metadata((LLAMA | lengths).get)
        assert shape.groups == (LayerGroup(30, 3, 128),)

    def test_without_grouped_queries_every_head_is_a_kv_head(self):
        plain = {k: v for k, v in LLAMA.items() if not k.endswith("head_count_kv")}
        assert shape_from_metadata(plain.get).groups == (LayerGroup(30, 9, 64),)

    def test_head_counts_per_layer(self):
        mixed = LLAMA | {
            "llama.block_count": 5,
            "llama.attention.head_count_kv": [3, 0, 3, 1, 0],
        }
        assert shape_from_metadata(mixed.get).groups == (LayerGroup(2, 3, 64), LayerGroup(1, 1, 64))

    def test_sliding_window_is_noted(self):
        shape = shape_from_metadata((LLAMA | {"llama.attention.sliding_window": 512}).get)
        assert shape.sliding_window_tokens == 512
        asked = question(shape)
        assert "512 tokens are counted in full" in plan.as_text(asked, plan_costs.costs_of(asked))

    @pytest.mark.parametrize(
        ("changes", "word"),
        [
            ({"general.architecture": None}, "architecture"),
            ({"llama.block_count": None}, "llama.block_count"),
            ({"llama.attention.head_count_kv": [3, 3]}, "2 head counts"),
            ({"llama.embedding_length": None}, "head dimension"),
            (
                {"llama.attention.key_length": 192, "llama.attention.value_length": 128},
                "192 and V heads of 128",
            ),
        ],
    )
    def test_what_cannot_be_planned_for(self, changes, word):
        with pytest.raises(ValueError, match=word):
            shape_from_metadata((LLAMA | changes).get)


class TestModelFile:
    @pytest.fixture
    def model(self, tmp_path: Path) -> Path:
        gguf = pytest.importorskip("gguf")
        path = tmp_path / "model.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_block_count(30)
        writer.add_embedding_length(576)
        writer.add_head_count(9)
        writer.add_head_count_kv([3] * 20 + [1] * 10)
        writer.add_context_length(8192)
        writer.add_tensor("token_embd.weight", np.zeros((4, 576), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    def test_a_file_tells_shape_and_context(self, model, capsys):
        assert main(["plan", "--model", str(model), "--memory=1GiB", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["context_tokens"] == 8192
        assert found["shape"]["groups"] == [
            {"n_layers": 20, "n_kv_heads": 3, "head_dim": 64},
            {"n_layers": 10, "n_kv_heads": 1, "head_dim": 64},
        ]

    @pytest.mark.parametrize("length", [0, 3, 20, 100, 300])
    def test_a_broken_file_is_one_line(self, model, capsys, length):
        model.write_bytes(model.read_bytes()[:length])
        assert main(["plan", "--model", str(model)]) == 2
        assert "no readable GGUF file" in capsys.readouterr().err

    def test_no_such_file(self, tmp_path, capsys):
        assert main(["plan", "--model", str(tmp_path / "none.gguf")]) == 1
        assert "none.gguf" in capsys.readouterr().err

    def test_without_the_extra_the_error_names_it(self, model, capsys, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "gguf", None)
        assert main(["plan", "--model", str(model)]) == 1
        assert "pip install 'pagealloc[demo]'" in capsys.readouterr().err
