"""``pagealloc cache``: what it says of files that are whole, damaged, or something else."""

import json
import os

import pytest
from prefixes import layout_of, publish

from pagealloc.cli import main
from pagealloc.kv import KVCache
from pagealloc.kv.cache_file import CacheFile


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "prompts.kv"
    with KVCache(layout_of()) as cache:
        publish(cache, [1] * 16)
        publish(cache, [1] * 8 + [2] * 8)
        publish(cache, [3] * 4)
        cache.save(path)
    return path


def damage(path, block):
    with CacheFile(path) as file:
        offset = file.header.blocks_offset + block * file.header.block_stride
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"damage")


def test_ls(path, capsys):
    (path.parent / "notes.txt").write_text("something else")
    broken = path.parent / "broken.kv"
    broken.write_bytes(path.read_bytes()[:80])
    broken.chmod(0o600)
    assert main.main(["cache", "ls", str(path.parent)]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("broken.kv   it is no file of KV blocks")
    assert second.startswith("prompts.kv ")
    assert "7 blocks, 3 prompts, the longest of 16 tokens" in second
    assert main.main(["cache", "ls", "--json", str(path.parent)]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == ["broken.kv", "prompts.kv"]
    assert rows[1]["n_beginnings"] == 2


def test_ls_of_nothing(tmp_path, capsys):
    assert main.main(["cache", "ls", str(tmp_path)]) == 0
    assert "no file of KV blocks" in capsys.readouterr().out
    assert main.main(["cache", "ls", str(tmp_path / "none")]) == 1


def test_info(path, capsys):
    assert main.main(["cache", "info", str(path)]) == 0
    out = capsys.readouterr().out
    assert "7 of 4 tokens: 28" in out
    assert "2 layers x 2 KV heads x 64, float16 and float16" in out
    assert main.main(["cache", "info", "--json", str(path)]) == 0
    assert json.loads(capsys.readouterr().out)["n_blocks"] == 7


def test_verify(path, capsys):
    assert main.main(["cache", "verify", str(path)]) == 0
    assert "all 7 blocks" in capsys.readouterr().out
    damage(path, 3)
    assert main.main(["cache", "verify", str(path)]) == 1
    out = capsys.readouterr().out
    assert "block 3 of 7" in out
    assert "1 of 7 blocks are damaged" in out


def test_what_cannot_be_opened(path, capsys):
    path.chmod(0o644)
    assert main.main(["cache", "info", str(path)]) == 1
    assert "chmod 600" in capsys.readouterr().err
    assert main.main(["cache", "verify", str(path.parent / "none")]) == 1
    assert "No such file" in capsys.readouterr().err


def test_rm(path, capsys):
    other = path.parent / "notes.txt"
    other.write_text("something else")
    assert main.main(["cache", "rm", str(other)]) == 1
    assert other.exists()
    assert "it stays" in capsys.readouterr().err
    os.truncate(path, 100)
    assert main.main(["cache", "rm", str(path)]) == 0
    assert not path.exists()
