"""What stands behind a KV cache: base pages, collapsed huge ones, 64 KiB folios, a hugetlb pool."""

import errno

import numpy as np
import pytest
from hugetlb import NR_HUGEPAGES, pool

from pagealloc import BackingUnavailableError, OutOfMemoryError, huge_page_size_bytes
from pagealloc.core.folios import FOLIO_BYTES, why_no_folios
from pagealloc.core.os_memory import page_size_bytes, refusing
from pagealloc.kv import KVCache, KVLayout

HUGE_BYTES = huge_page_size_bytes()
ORDERS = ("interleaved", "split", "block")
N_LAYERS, N_HEADS, HEAD_DIM = 2, 8, 128  # a token's K and V of a layer are 4 KiB
TOKENS_PER_HUGE = HUGE_BYTES // 8192

small_huge_pages = pytest.mark.skipif(
    HUGE_BYTES > 8 << 20, reason=f"a huge page has {HUGE_BYTES} bytes here: too large to play with"
)


def make_layout(order="block", **options):
    return KVLayout(N_LAYERS, N_HEADS, HEAD_DIM, 4 * TOKENS_PER_HUGE, order=order, **options)


def make_rows(n_tokens, seed=0):
    shape = (n_tokens, N_LAYERS, 2, N_HEADS, HEAD_DIM)
    return np.random.default_rng(seed).integers(0, 1 << 14, shape, np.uint16).view(np.float16)


def fill(seq, rows):
    for layer in range(N_LAYERS):
        seq.append(layer, rows[:, layer, 0], rows[:, layer, 1])


def assert_rows(seq, rows):
    for layer in range(N_LAYERS):
        for read, kv in ((seq.k, 0), (seq.v, 1)):
            np.testing.assert_array_equal(read(layer, on_cross="copy"), rows[:, layer, kv])


def huge_bytes(cache):
    try:
        return cache.huge_bytes()
    except OSError as error:
        pytest.skip(str(error))


@small_huge_pages
def test_whole_huge_pages_are_collapsed_and_cost_no_byte_more():
    layout = make_layout(block_tokens=TOKENS_PER_HUGE)
    assert layout.block_bytes == HUGE_BYTES
    held = {}
    for backing in ("auto", "base"):
        with KVCache(layout, backing=backing) as cache:
            seq, rows = cache.sequence(), make_rows(TOKENS_PER_HUGE + 3)
            fill(seq, rows)
            assert_rows(seq, rows)
            held[backing] = cache.stats().file_bytes
            if backing == "base":
                assert huge_bytes(cache) == 0
            elif huge_bytes(cache) == 0:
                pytest.skip("this kernel did not collapse the pages of a memfd into huge pages")
            else:
                assert huge_bytes(cache) == 2 * HUGE_BYTES
    assert held["auto"] == held["base"] == 2 * HUGE_BYTES


def test_unknown_backings():
    with pytest.raises(ValueError, match=r"backing='thp': 'auto', 'base', 'folios' and 'hugetlb'"):
        KVCache(make_layout(), backing="thp")


def test_a_kernel_without_files_of_huge_pages():
    layout = make_layout(page_bytes=HUGE_BYTES)
    with (
        refusing("memfd_create", errno.EINVAL),
        pytest.raises(BackingUnavailableError, match="no file of huge pages"),
    ):
        KVCache(layout, backing="hugetlb")


@small_huge_pages
class TestHugetlb:
    @pytest.fixture(autouse=True)
    def filled_pool(self):
        with pool(NR_HUGEPAGES, 40):
            yield

    def layout(self, order):
        return make_layout(order, page_bytes=HUGE_BYTES)

    @pytest.mark.parametrize("order", ORDERS)
    def test_rows_forks_and_removals(self, order):
        with KVCache(self.layout(order), backing="hugetlb", purge_after_s=0) as cache:
            seq, rows = cache.sequence(), make_rows(2 * TOKENS_PER_HUGE)
            fill(seq, rows[:TOKENS_PER_HUGE])
            assert cache.stats().file_bytes == cache.stats().committed_bytes
            assert cache.stats().file_bytes % HUGE_BYTES == 0
            child = seq.fork()
            assert cache.stats().shared_bytes == seq.committed_bytes
            fill(child, rows[TOKENS_PER_HUGE:])
            assert_rows(seq, rows[:TOKENS_PER_HUGE])
            assert_rows(child, rows)
            assert huge_bytes(cache) > 0
            child.rm(3, 3 + TOKENS_PER_HUGE)
            kept = [*range(3), *range(3 + TOKENS_PER_HUGE, 2 * TOKENS_PER_HUGE)]
            assert_rows(child, rows[kept])
            child.truncate(5)
            assert_rows(child, rows[kept[:5]])
            assert_rows(seq, rows[:TOKENS_PER_HUGE])
            cache.check()
            seq.close()
            child.close()
            assert cache.stats().file_bytes == 0

    def test_an_empty_pool_is_an_error_and_no_signal(self):
        n_free = 40
        with KVCache(self.layout("block"), backing="hugetlb") as cache:
            sequences, rows = [], make_rows(4 * TOKENS_PER_HUGE)

            def take_all():
                for _ in range(n_free):
                    sequences.append(cache.sequence())
                    fill(sequences[-1], rows)

            with pytest.raises(OutOfMemoryError, match="pool of huge pages"):
                take_all()
            for seq in sequences[:-1]:
                assert_rows(seq, rows)
            sequences[-1].rollback()
            cache.check()

    def test_rows_in_smaller_pages_are_refused(self):
        with pytest.raises(ValueError, match=rf"the pool's {HUGE_BYTES}.*page_bytes={HUGE_BYTES}"):
            KVCache(make_layout(), backing="hugetlb")


class TestFolios:
    def machine(self, tmp_path, own, common="never"):
        folder = tmp_path / "sys/kernel/mm/transparent_hugepage"
        (folder / "hugepages-64kB").mkdir(parents=True)
        words = "always inherit within_size advise never deny force"
        (folder / "hugepages-64kB/shmem_enabled").write_text(words.replace(own, f"[{own}]"))
        (folder / "shmem_enabled").write_text(words.replace(common, f"[{common}]"))
        return tmp_path

    @pytest.mark.parametrize("own", ["always", "within_size", "advise"])
    def test_offered(self, tmp_path, own):
        assert why_no_folios(self.machine(tmp_path, own)) is None

    def test_inherited(self, tmp_path):
        assert why_no_folios(self.machine(tmp_path, "inherit", "advise")) is None

    def test_not_inherited(self, tmp_path):
        reason = why_no_folios(self.machine(tmp_path, "inherit"))
        assert "transparent_hugepage/shmem_enabled is 'never'" in reason

    def test_refused(self, tmp_path):
        reason = why_no_folios(self.machine(tmp_path, "never"))
        assert "hugepages-64kB/shmem_enabled is 'never'; root may write 'advise'" in reason

    def test_a_kernel_without_the_switch(self, tmp_path):
        assert "Linux 6.8" in why_no_folios(tmp_path)

    def test_asked_for_where_there_are_none(self):
        reason = why_no_folios()
        if reason is None:
            pytest.skip("this kernel offers them")
        with pytest.raises(BackingUnavailableError) as refusal:
            KVCache(make_layout(page_bytes=FOLIO_BYTES), backing="folios")
        assert reason in str(refusal.value)

    @pytest.mark.parametrize("order", ORDERS)
    def test_used_where_the_kernel_offers_them(self, order):
        reason = why_no_folios()
        if reason is not None:
            pytest.skip(f"no 64 KiB folios: {reason}")
        if page_size_bytes() > FOLIO_BYTES:
            pytest.skip("pages are larger than 64 KiB")
        layout = make_layout(order, page_bytes=FOLIO_BYTES)
        with KVCache(layout, purge_after_s=0) as cache:
            assert cache._store.page_bytes == FOLIO_BYTES
            seq, rows = cache.sequence(), make_rows(300)
            for token in rows:
                seq.append_token(token)
            assert cache.stats().file_bytes == cache.stats().committed_bytes
            child = seq.fork()
            child.append_token(rows[0])
            child.rm(3, 3 + layout.remap_tokens)
            assert_rows(seq, rows)
            cache.check()
            seq.close()
            child.close()
            assert cache.stats().file_bytes == 0
