import copy
import dataclasses
import mmap
import pickle
import statistics
import time

import numpy as np
import pytest

from pagealloc.core.os_memory import page_size_bytes
from pagealloc.errors import ClosedError, OutOfMemoryError
from pagealloc.kv import KVCache, KVLayout, Sequence
from pagealloc.kv.lineage import Lineage, count_distinct_tokens

SMOLLM2 = {"n_layers": 30, "n_kv_heads": 3, "head_dim": 64}
PAGE = page_size_bytes()


def small_layout(order="block", **changes):
    shape = {"n_layers": 2, "n_kv_heads": 2, "head_dim": 8, "max_tokens": 200, "order": order}
    return KVLayout(**{**shape, **changes})


def fill(seq, n_tokens, value=1):
    layout = seq.cache.layout
    rows = np.full((n_tokens, layout.n_kv_heads, layout.head_dim), value, layout.storage_dtypes[0])
    for layer in range(layout.n_layers):
        seq.append(layer, rows, rows)


def test_an_empty_cache():
    with KVCache(small_layout(), salt="tenant") as cache:
        assert cache.salt == "tenant"
        stats = cache.stats()
        assert stats.file_bytes == stats.needed_bytes == stats.committed_bytes == 0
        assert stats.n_sequences == stats.n_tokens == stats.shared_bytes == 0
        assert stats.budget_bytes is None
        assert stats.waste_bytes == stats.held_bytes == stats.page_table_bytes
        cache.check()
    assert cache.closed


@pytest.mark.parametrize("order", ["interleaved", "split", "block"])
def test_stats_add_up(order):
    layout = KVLayout(**SMOLLM2, max_tokens=8192, order=order)
    with KVCache(layout, budget_bytes="1GiB") as cache:
        parent = cache.sequence()
        fill(parent, 100)
        children = [parent.fork() for _ in range(3)]
        for child in children:
            fill(child, 10)
        stats = cache.stats()
        assert stats.budget_bytes == 1 << 30
        assert stats.n_sequences == 4
        assert stats.n_tokens == 100 + 3 * 110
        assert stats.n_mappings == sum(seq._window.n_mappings for seq in cache.sequences)
        assert stats.n_mappings >= 4
        assert stats.needed_bytes == (100 + 3 * 10) * layout.token_bytes
        assert stats.committed_bytes == stats.file_bytes >= stats.needed_bytes
        assert stats.held_bytes == stats.file_bytes + stats.page_table_bytes
        assert stats.waste_bytes == stats.held_bytes - stats.needed_bytes
        unshared_bytes = sum(seq.committed_bytes for seq in cache.sequences)
        assert stats.shared_bytes == unshared_bytes - stats.committed_bytes
        with pytest.raises(dataclasses.FrozenInstanceError):
            stats.n_tokens = 0
        cache.check()


def test_page_tables_are_counted():
    """Layer-major windows touch a page table a layer, block order one in all."""
    growth_bytes = {}
    for order in ("block", "interleaved"):
        with KVCache(KVLayout(**SMOLLM2, max_tokens=8192, order=order)) as cache:
            seq = cache.sequence()
            fill(seq, 10)
            growth_bytes[order] = cache.stats().page_table_bytes
    assert growth_bytes["interleaved"] >= 30 * 4096 > growth_bytes["block"]


def test_stats_show_all_figures():
    with KVCache(small_layout()) as cache:
        text = repr(cache.stats())
    for name in ("held", "file", "page_table", "committed", "needed", "shared", "waste"):
        assert f"{name}_bytes=" in text


def test_a_window_the_kernel_has_no_room_for():
    layout = small_layout("interleaved", max_tokens=(1 << 47) // 128)
    with KVCache(layout) as cache:
        with pytest.raises(OutOfMemoryError, match="the kernel refused"):
            cache.sequence()
        assert cache.sequences == []
        cache.check()


def test_sequences_lists_the_open_ones():
    with KVCache(small_layout()) as cache:
        first, second = cache.sequence(), cache.sequence()
        third = first.fork()
        assert cache.sequences == [first, second, third]
        assert all(isinstance(seq, Sequence) and seq.cache is cache for seq in cache.sequences)
        second.close()
        assert cache.sequences == [first, third]


def test_close_closes_the_sequences():
    cache = KVCache(small_layout())
    seq = cache.sequence()
    fill(seq, 20)
    cache.close()
    cache.close()
    assert seq.closed
    assert cache.closed
    for call in (cache.sequence, cache.stats):
        with pytest.raises(ClosedError, match="cache is closed"):
            call()
    cache.check()
    assert repr(cache) == "<KVCache closed>"


def test_close_with_live_arrays_closes_nothing():
    cache = KVCache(small_layout())
    sequences = [cache.sequence() for _ in range(3)]
    for seq in sequences:
        fill(seq, 20)
    array = sequences[1].k_blocks(0)
    with pytest.raises(BufferError, match="still alive"):
        cache.close()
    assert not any(seq.closed for seq in sequences)
    assert array[0, 0, 0, 0] == 1
    del array
    cache.close()


def test_caches_share_nothing():
    with KVCache(small_layout(), salt="a") as one, KVCache(small_layout(), salt=b"b") as other:
        assert one._store.fd != other._store.fd
        fill(one.sequence(), 20)
        assert other.stats().file_bytes == 0


def test_page_sizes_beyond_the_machines():
    for page_bytes in (PAGE, 4 * PAGE, 16 * PAGE):
        layout = small_layout("interleaved", page_bytes=page_bytes)
        with KVCache(layout) as cache:
            seq = cache.sequence()
            fill(seq, 20)
            cache.check()
            assert seq.committed_bytes == 2 * page_bytes
            seq.fork().truncate(3)
            cache.check()


def test_pages_smaller_than_the_machines_are_refused():
    with pytest.raises(ValueError, match="no multiple of this machine's"):
        KVCache(small_layout(page_bytes=PAGE // 2))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"layout": {"n_layers": 2}}, TypeError, "must be a KVLayout, not dict"),
        ({"salt": 7}, TypeError, "salt must be str or bytes, not int"),
        ({"budget_bytes": -1}, ValueError, "budget_bytes"),
        ({"budget_bytes": "many"}, ValueError, "budget_bytes"),
        ({"budget_bytes": 1.5}, TypeError, "budget_bytes"),
        ({"budget_bytes": 1 << 80}, ValueError, "budget_bytes"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        KVCache(**{"layout": small_layout(), **arguments})


@pytest.mark.parametrize("do", [pickle.dumps, copy.copy, copy.deepcopy])
def test_it_cannot_be_pickled_or_copied(do):
    with KVCache(small_layout()) as cache, pytest.raises(TypeError, match="cannot be pickled"):
        do(cache)


def test_repr_shows_what_is_held():
    with KVCache(small_layout(), budget_bytes="1MiB") as cache:
        fill(cache.sequence(), 0)
        seq = cache.sequence()
        fill(seq, 20)
        assert "1 sequences" in repr(cache)
        assert "of 1.00 MiB committed" in repr(cache)
        assert "2 layers x 2 KV heads x 8 float16" in repr(cache)


# --- lineage --------------------------------------------------------------------------------------


def fork_of(lineage, n_tokens):
    lineage.settle(n_tokens)
    return Lineage(lineage.part(0, n_tokens))


def test_distinct_tokens_of_a_family():
    root = Lineage()
    child = fork_of(root, 100)
    grandchild = fork_of(child, 120)
    family = [*root.all_runs(150), *child.all_runs(120), *grandchild.all_runs(130)]
    assert count_distinct_tokens(family) == 100 + 50 + 20 + 10
    assert count_distinct_tokens(root.all_runs(150)) == 150
    assert count_distinct_tokens(grandchild.all_runs(130)) == 130
    assert count_distinct_tokens([]) == 0


def test_distinct_tokens_after_a_cut_into_shared_ones():
    root = Lineage()
    child = fork_of(root, 100)
    child.cut(40)
    assert count_distinct_tokens([*child.all_runs(60), *root.all_runs(110)]) == 100 + 20 + 10
    assert count_distinct_tokens(child.all_runs(60)) == 60
    root.cut(70)
    assert count_distinct_tokens([*child.all_runs(60), *root.all_runs(100)]) == 70 + 20 + 30


def test_distinct_tokens_after_a_removal_and_a_rewrite():
    root = Lineage()
    child = fork_of(root, 100)
    child.keep(100, [(0, 10), (90, 100)])
    assert child.n_settled == 20
    assert count_distinct_tokens([*child.all_runs(25), *root.all_runs(100)]) == 105
    child.renew(25, [(5, 15)])
    assert count_distinct_tokens([*child.all_runs(25), *root.all_runs(100)]) == 115
    assert sum(run.n_tokens for run in child.all_runs(25)) == 25


# --- the bar on fork ------------------------------------------------------------------------------


@pytest.mark.benchmark
def test_fork_is_far_faster_than_a_cold_copy():
    """1,000 tokens, first read of every page included; the full bench is ``python -m bench fork``.

    A cold copy goes to fresh memory on base pages.  The bench judges the bar of 10, by the clock;
    this is a guard against regressions: at least 5, in CPU time, for the machine may be busy.
    """
    layout = KVLayout(**SMOLLM2, max_tokens=1024, order="block")
    with KVCache(layout) as cache:
        parent = cache.sequence()
        fill(parent, 1000)
        rows_bytes = parent.committed_bytes
        held_before = cache.stats().file_bytes
        source = parent._window.view(0, rows_bytes)
        fork_ns, copy_ns = [], []
        for _ in range(9):
            start = time.thread_time_ns()
            child = parent.fork()
            np.frombuffer(child._window.view(0, rows_bytes), np.uint8)[::PAGE].sum()
            fork_ns.append(time.thread_time_ns() - start)
            assert cache.stats().file_bytes - held_before < 64 << 10
            child.close()
            start = time.thread_time_ns()
            with mmap.mmap(-1, rows_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as cold:
                cold.write(source)
            copy_ns.append(time.thread_time_ns() - start)
        del source
        assert statistics.median(copy_ns) > 5 * statistics.median(fork_ns)
