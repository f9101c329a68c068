"""Published blocks in a file: what comes back, what must be refused, and what a kill leaves."""

import json
import os
import stat
import struct
import threading

import numpy as np
import pytest
from prefixes import (
    BLOCK,
    N_LAYERS,
    ORDERS,
    assert_rows,
    compute,
    layout_of,
    n_cached,
    publish,
)

from pagealloc import CacheFileError, ForkedError, OutOfMemoryError
from pagealloc.kv import KVCache, Rope, cache_file, cache_writer
from pagealloc.kv.cache_file import HEADER, CacheFile

PROMPTS = [[1] * 16, [1] * 8 + [2] * 8, [3] * 12]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "prompts.kv"


def save(path, order="block", **options):
    with KVCache(layout_of(order), **options) as cache:
        for prompt in PROMPTS:
            publish(cache, prompt)
        return cache.save(path)


def damage(path, offset, data=b"\xa5"):
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def block_offset(path, number):
    with CacheFile(path) as file:
        return file.header.blocks_offset + number * file.header.block_stride


class TestSaveAndLoad:
    @pytest.mark.parametrize("order", ORDERS)
    @pytest.mark.parametrize("other_order", ORDERS)
    def test_rows_come_back(self, path, order, other_order):
        assert save(path, order) == 9
        with KVCache.load(path, layout_of(other_order, max_tokens=40)) as cache:
            assert cache.stats().committed_bytes == 0
            assert cache.prefixes.stats().n_disk_blocks == 9
            for prompt in PROMPTS:
                with cache.sequence([*prompt, 7]) as seq:
                    assert seq.n_cached == len(prompt)
                    assert_rows(seq, prompt)
                    compute(seq, [*prompt, 7, 8, 9, 10, 11])
                    assert_rows(seq, [*prompt, 7, 8, 9, 10, 11])
                cache.check()
            stats = cache.prefixes.stats()
            assert (stats.n_blocks, stats.n_disk_blocks) == (9, 0)
            assert (stats.n_hit_tokens, stats.n_damaged_blocks) == (44, 0)

    def test_padded_rows(self, path):
        save(path)
        for order in ORDERS:
            with KVCache.load(path, layout_of(order, pad_rows=True)) as cache:
                with cache.sequence(PROMPTS[1]) as seq:
                    assert_rows(seq, PROMPTS[1])
                cache.save(path)

    def test_the_layout_is_in_the_file(self, path):
        rope = Rope(64, base=50.0)
        with KVCache(layout_of("split", rope=rope), purge_after_s=0) as cache:
            publish(cache, PROMPTS[0])
            cache.save(path)
        with KVCache.load(path) as cache:
            assert cache.layout == layout_of("split", rope=rope)
            assert n_cached(cache, PROMPTS[0]) == 16

    @pytest.mark.parametrize("order", ORDERS)
    def test_quantised_rows(self, path, order):
        tokens = [*range(40)]
        options = {"quantize": "recommended", "residual_tokens": 8}
        with KVCache(layout_of(order), **options) as cache:
            publish(cache, tokens)
            assert cache.save(path) == 8
            with cache.sequence(tokens) as seq:
                expected = [seq.k(layer, dtype=np.float32) for layer in range(N_LAYERS)]
        with KVCache.load(path) as cache:
            assert repr(cache.cold_layout.k_dtype) == "'q8_0'"
            with cache.sequence(tokens) as seq:
                assert seq.n_cached == seq.n_cold == len(seq) == 32
                for layer in range(N_LAYERS):
                    read = seq.k(layer, dtype=np.float32)
                    np.testing.assert_array_equal(read, expected[layer])
                cache.check()
                compute(seq, [*tokens, *range(8)])
                cache.check()

    def test_a_part_in_memory_a_part_in_the_file(self, path):
        save(path)
        with KVCache.load(path, purge_after_s=0) as cache:
            assert n_cached(cache, PROMPTS[0][:8]) == 8
            assert cache.prefixes.stats().n_blocks == 2
            with cache.sequence(PROMPTS[1]) as seq:
                assert_rows(seq, PROMPTS[1])
                assert cache.prefixes.stats().n_blocks == 4
            assert cache.prefixes.clear() == 4  # they are in the file: found again
            assert cache.stats().committed_bytes == 0
            assert n_cached(cache, PROMPTS[1]) == 16
            cache.check()

    def test_evicted_while_others_are_read(self, path):
        layout = layout_of()
        save(path)
        with KVCache.load(path, budget_bytes=5 * layout.block_bytes, purge_after_s=0) as cache:
            for prompt in PROMPTS * 3:
                with cache.sequence(prompt) as seq:
                    assert_rows(seq, prompt)
                cache.check()
            with cache.sequence(PROMPTS[0]) as seq, pytest.raises(OutOfMemoryError):
                cache.sequence(PROMPTS[2])
            assert_rows(cache.sequence(PROMPTS[2]), PROMPTS[2])
            assert seq.closed

    def test_publishing_what_is_in_the_file(self, path):
        """A sequence that computed the rows itself; and one that goes on behind the file's."""
        save(path)
        with KVCache.load(path) as cache:
            with cache.sequence() as seq:
                compute(seq, PROMPTS[0])
                assert seq.publish(PROMPTS[0]) == 16
            publish(cache, PROMPTS[0] + [4] * 8)
            assert cache.prefixes.stats().n_blocks == 6
            assert cache.save(path) == 11
        with KVCache.load(path) as cache, cache.sequence(PROMPTS[0] + [4] * 8) as seq:
            assert_rows(seq, PROMPTS[0] + [4] * 8)

    def test_saved_to_the_file_it_came_from(self, path):
        save(path)
        with KVCache.load(path) as cache:
            n_cached(cache, PROMPTS[1])
            told = []
            assert cache.save(path, progress=lambda done, most: told.append((done, most))) == 9
            assert told == [(done, 9) for done in range(1, 10)]
            assert n_cached(cache, PROMPTS[2]) == 12  # from the file that was replaced
        with KVCache.load(path) as cache:
            assert n_cached(cache, PROMPTS[2]) == 12

    def test_nothing_to_save(self, path):
        with KVCache(layout_of()) as cache:
            assert cache.save(path) == 0
        with KVCache.load(path) as cache:
            assert n_cached(cache, [1] * 8) == 0

    def test_threads_read_and_save(self, path):
        save(path)
        layout, failures = layout_of(), []
        budget_bytes = 12 * layout.block_bytes
        with KVCache.load(path, budget_bytes=budget_bytes, purge_after_s=0) as cache:

            def work(seed):
                rng = np.random.default_rng(seed)
                try:
                    for _ in range(30):
                        prompt = PROMPTS[rng.integers(len(PROMPTS))]
                        with cache.sequence(prompt) as seq:
                            assert_rows(seq, prompt)
                        if rng.integers(5) == 0:
                            cache.prefixes.clear()
                        if seed == 0:
                            cache.save(path)
                except BaseException as error:
                    failures.append(error)
                    raise

            threads = [threading.Thread(target=work, args=[seed]) for seed in range(3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert not failures
            cache.check()
        with KVCache.load(path) as cache:
            assert cache.prefixes.stats().n_disk_blocks == 9


class TestFileOnDisk:
    def test_nobody_else_may_read_it(self, path):
        save(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert [entry.name for entry in path.parent.iterdir()] == [path.name]

    @pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o777])
    def test_a_file_that_others_may_open(self, path, mode):
        save(path)
        path.chmod(mode)
        with pytest.raises(CacheFileError, match="chmod 600"):
            KVCache.load(path)

    def test_another_user_s(self, path, monkeypatch):
        save(path)
        monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
        with pytest.raises(CacheFileError, match="belongs to user"):
            KVCache.load(path)

    def test_a_symbolic_link(self, path):
        save(path)
        link = path.with_name("link")
        link.symlink_to(path)
        with pytest.raises(CacheFileError, match="symbolic link"):
            KVCache.load(link)

    def test_no_file_at_all(self, path):
        with pytest.raises(FileNotFoundError):
            KVCache.load(path)
        with pytest.raises(CacheFileError, match="regular"):
            path.mkdir(0o700) or KVCache.load(path)
        os.mkfifo(path / "pipe", 0o600)
        with pytest.raises(CacheFileError, match="regular"):
            KVCache.load(path / "pipe")

    def test_what_a_killed_saver_left_is_removed(self, path):
        left = path.with_name(f".{path.name}.01234567.tmp")
        left.write_bytes(b"half")
        other = path.with_name(f".{path.name}x.01234567.tmp")
        other.write_bytes(b"of another file")
        save(path)
        assert not left.exists()
        assert other.exists()

    def test_a_saver_at_work_is_left_alone(self, path):
        fd, temporary = cache_writer._new_file(path)
        save(path)
        assert temporary.exists()
        os.close(fd)
        save(path)
        assert not temporary.exists()

    def test_a_full_disk_leaves_the_old_file(self, path, monkeypatch):
        save(path)
        before = path.read_bytes()

        def refuse(*arguments):
            raise OSError(28, "No space left on device")

        for name in ("pwritev", "ftruncate", "fsync"):
            with monkeypatch.context() as patch:
                patch.setattr(os, name, refuse)
                with pytest.raises(OSError, match="No space"):
                    save(path)
            assert path.read_bytes() == before
            assert [entry.name for entry in path.parent.iterdir()] == [path.name]

    def test_short_writes(self, path, monkeypatch):
        save(path)
        before = path.read_bytes()
        with monkeypatch.context() as patch:
            pwritev, pwrite = os.pwritev, os.pwrite
            patch.setattr(os, "pwritev", lambda fd, some, at: pwrite(fd, some[0][:100], at))
            patch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:1000], at))
            save(path)
        assert path.read_bytes() == before
        assert pwritev is os.pwritev


class TestDamage:
    def test_a_damaged_block(self, path):
        save(path)
        damage(path, block_offset(path, 1) + 100)
        with KVCache.load(path) as cache:
            with pytest.raises(CacheFileError, match=r"block 1 of 9, .*KiB at byte .*damaged"):
                cache.sequence(PROMPTS[0])
            with pytest.raises(CacheFileError, match="block 1 of 9"):
                cache.sequence(PROMPTS[0])
            assert not cache.sequences
            assert n_cached(cache, PROMPTS[2]) == 12
            assert n_cached(cache, PROMPTS[0][:7]) == 4
            cache.check()

    def test_a_damaged_block_is_skipped(self, path):
        save(path)
        damage(path, block_offset(path, 1) + 100)
        with KVCache.load(path, on_error="skip") as cache:
            with pytest.warns(RuntimeWarning, match="block 1 of 9.*skipped, with 4 blocks behind"):
                seq = cache.sequence(PROMPTS[0])
            with seq:
                assert seq.n_cached == 4
                assert_rows(seq, PROMPTS[0][:4])
                compute(seq, PROMPTS[0])
                assert seq.publish() == 16
            assert n_cached(cache, PROMPTS[1]) == 8
            assert n_cached(cache, PROMPTS[2]) == 12
            assert cache.prefixes.stats().n_damaged_blocks == 5
            cache.check()

    def test_a_truncated_file(self, path):
        save(path)
        os.truncate(path, block_offset(path, 5) + 10)
        with pytest.raises(CacheFileError, match="from block 5 of 9 on nothing is left"):
            KVCache.load(path)
        with pytest.warns(RuntimeWarning, match="4 of 9 blocks are lost"):
            cache = KVCache.load(path, on_error="skip")
        found = [n_cached(cache, prompt) for prompt in PROMPTS]
        assert sum(found) == 4 * (5 + 2)  # two blocks are in two prompts
        cache.close()

    def test_truncated_while_it_is_open(self, path):
        save(path)
        with KVCache.load(path) as cache:
            os.truncate(path, block_offset(path, 1) + 10)
            with pytest.raises(CacheFileError, match="block 1 of 9 is truncated"):
                cache.sequence(PROMPTS[0])

    @pytest.mark.parametrize("nbytes", [0, 1, 7, 8, HEADER.size - 1, HEADER.size, 700])
    def test_truncated_to_next_to_nothing(self, path, nbytes):
        save(path)
        os.truncate(path, nbytes)
        for on_error in ("raise", "skip"):
            with pytest.raises(CacheFileError):
                KVCache.load(path, on_error=on_error)

    def test_a_bit_anywhere(self, path):
        """Each bit of header and index is noticed; in the rows, when they are asked for."""
        save(path)
        data = path.read_bytes()
        end = block_offset(path, 0)
        with CacheFile(path) as file:
            used = file.header.index_offset + file.records.nbytes
            gap = range(HEADER.size + len(file.header.description), file.header.index_offset)
        rng = np.random.default_rng(0)
        for at in [*range(HEADER.size), *rng.integers(HEADER.size, used, 300)]:
            if at in gap:
                continue
            damage(path, int(at), bytes([data[at] ^ 1 << int(rng.integers(8))]))
            with pytest.raises(CacheFileError):
                KVCache.load(path)
            damage(path, int(at), data[at : at + 1])
        assert used <= end
        KVCache.load(path).close()

    def test_a_newer_file(self, path):
        save(path)
        damage(path, 8, struct.pack("<I", 2))
        with pytest.raises(CacheFileError, match="newer"):
            KVCache.load(path)

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("block_tokens", 0), ("block_tokens", 1 << 30), ("n_blocks", 1 << 31),
            ("block_bytes", 0), ("block_bytes", 1 << 62), ("block_stride", 1 << 62),
            ("index_offset", 0), ("index_offset", 1 << 63), ("blocks_offset", 1 << 63),
            ("blocks_offset", 0), ("n_blocks", 1 << 16), ("description", b"[]"),
            ("description", b"{}"), ("description", b"\xff"), ("description", b"[" * 100000),
            ("description", b'{"layout": {"n_layers": -1}, "quantisation": null}'),
            ("description", b'{"layout": [1], "quantisation": {"a": 1}}'),
            ("quantisation", {"budget_bytes": 1}), ("quantisation", [1]),
            ("quantisation", {"k_type": "q9", "v_type": 0, "rotate": 0, "residual_tokens": 0}),
        ],
    )  # fmt: skip
    def test_impossible_numbers(self, path, field, value):
        """With a checksum that fits."""
        save(path)
        with CacheFile(path) as file:
            if field == "quantisation":
                described = file.description | {field: value}
                field, value = "description", json.dumps(described).encode()
            header = file.header._replace(**{field: value})
        damage(path, 0, header.pack())
        with pytest.raises(CacheFileError):
            KVCache.load(path)

    def test_rows_of_other_tokens(self, path):
        """The checksum of a block covers its tokens, even where the index's fits."""
        save(path)
        with CacheFile(path) as file:
            records = file.records.copy()
            records[1]["tokens"][0] = 9
            header = file.header._replace(index_checksum=cache_file.checksum([records.tobytes()]))
        damage(path, header.index_offset, records.tobytes())
        damage(path, 0, header.pack())
        with KVCache.load(path) as cache, pytest.raises(CacheFileError, match="rows and tokens"):
            cache.sequence([1, 1, 1, 1, 9, 1, 1, 1])

    def test_a_block_twice(self, path):
        """What follows the second one was computed behind other tokens."""
        save(path)
        with CacheFile(path) as file:
            records = file.records.copy()
            assert records[4]["tokens"].tolist() == [3] * 4
            records[4] = records[0]
            header = file.header._replace(index_checksum=cache_file.checksum([records.tobytes()]))
        damage(path, header.index_offset, records.tobytes())
        damage(path, 0, header.pack())
        with pytest.raises(CacheFileError, match="3 of 9 blocks are lost"):
            KVCache.load(path)
        with pytest.warns(RuntimeWarning, match="3 of 9"):
            cache = KVCache.load(path, on_error="skip")
        assert n_cached(cache, [1] * 4 + [3] * 8) == 4
        assert n_cached(cache, PROMPTS[0]) == 16
        cache.close()

    @pytest.mark.parametrize(("record", "parent"), [(0, 0), (3, 3), (3, 4), (3, 1 << 31)])
    def test_impossible_parents(self, path, record, parent):
        save(path)
        with CacheFile(path) as file:
            records = file.records.copy()
            records[record]["parent"] = parent
            header = file.header._replace(index_checksum=cache_file.checksum([records.tobytes()]))
        damage(path, header.index_offset, records.tobytes())
        damage(path, 0, header.pack())
        with pytest.raises(CacheFileError, match="index"):
            KVCache.load(path)


class TestOtherCaches:
    @pytest.mark.parametrize(
        "options",
        [{"salt": "b"}, {"salt": None}, {"salt": "a", "model": "other"}, {"salt": "A"}],
    )
    def test_another_owner_or_model(self, path, options):
        save(path, salt="a")
        with pytest.raises(CacheFileError, match="another model, salt or kind"):
            KVCache.load(path, **options)
        with KVCache.load(path, salt="a") as cache:
            assert n_cached(cache, PROMPTS[0]) == 16

    def test_another_kind_of_rows(self, path):
        save(path)
        layouts = [layout_of(dtype="float32"), layout_of(rope=Rope(64, base=50.0))]
        for layout in layouts:
            with pytest.raises(CacheFileError, match="kind of rows"):
                KVCache.load(path, layout)
        with pytest.raises(CacheFileError, match="kind of rows"):
            KVCache.load(path, quantize="recommended")

    def test_what_the_file_says_of_quantising(self, path):
        save(path, quantize="recommended", residual_tokens=0)
        for options in ({}, {"residual_tokens": 8}, {"quantize": "recommended"}):
            with KVCache.load(path, **options) as cache:
                assert n_cached(cache, PROMPTS[0]) == 16
        with pytest.raises(CacheFileError, match="kind of rows"):
            KVCache.load(path, k_type="q8_0", v_type="q8_0")

    def test_other_arguments(self, path):
        save(path)
        with pytest.raises(ValueError, match="on_error"):
            KVCache.load(path, on_error="ignore")
        with pytest.raises(TypeError, match="no_such"):
            KVCache.load(path, no_such=1)


def test_without_xxhash(path, monkeypatch):

    monkeypatch.setattr(cache_file, "xxhash", None)
    with pytest.raises(ImportError, match=r"pagealloc\[disk\]"):
        save(path)
    assert not list(path.parent.iterdir())


def test_in_a_child(path):
    with KVCache(layout_of()) as cache:
        publish(cache, [1] * BLOCK)
        child = os.fork()
        if child == 0:
            try:
                cache.save(path)
            except ForkedError:
                os._exit(7)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
