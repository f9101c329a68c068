"""docs/llama.md: its lines run as they stand there, on a small model."""

import re
from pathlib import Path

import pytest
from llama_models import token_ids

llama_cpp = pytest.importorskip("llama_cpp", reason="installed in the tox env `llama` alone")

MANUAL = Path(__file__).parents[2] / "docs/llama.md"


@pytest.fixture
def names(tiny_path, monkeypatch):
    """What the lines need, and what they leave behind."""
    made = []

    class Small(llama_cpp.Llama):
        def __init__(self, _path, **options):
            super().__init__(tiny_path, verbose=False, **options)
            made.append(self)

    monkeypatch.setattr(llama_cpp, "Llama", Small)
    names = {"SYSTEM": "You answer in a few words.", "prompt": token_ids(1000), "Llama": Small}
    yield names
    if "cache" in names:
        names["cache"].close()
    for llm in made:
        llm.close()


def run(names, section, tmp_path):
    """Run the Python lines of a section, and return how many blocks that were."""
    text = MANUAL.read_text().partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    for block in blocks:
        lines = block.replace("/run/user/1000/prompts", str(tmp_path / "prompts"))
        exec(compile(lines, f"{MANUAL} [{section}]", "exec"), names)
        if "cache" in names and "serve" in block:
            names["served"] = names["cache"]
    return len(blocks)


def test_prompts_that_begin_alike(names, tmp_path):
    assert run(names, "Prompts that begin alike", tmp_path) == 3
    names["served"].close()


def test_a_context_that_takes_what_its_tokens_take(names, tmp_path):
    assert run(names, "A context that takes what its tokens take", tmp_path) == 2
    assert names["other_kv"].stats().resident_bytes < names["kv"].stats().resident_bytes


def test_sequences(names, tmp_path):
    names["llm"] = names["Llama"]("model.gguf")
    names["llm"].eval(token_ids(300))
    assert run(names, "Sequences", tmp_path) == 1
    assert names["seq"].pos_max(0) == 199
