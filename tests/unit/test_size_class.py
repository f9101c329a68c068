"""Slot sizes, for every page size there is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagealloc.core.size_class import slot_size_bytes, slot_sizes_bytes

PAGE_BYTES = [4096, 16384, 65536]


@pytest.mark.parametrize("page_bytes", PAGE_BYTES)
def test_slots_are_rising_multiples_of_a_cache_line_with_all_powers_of_two(page_bytes):
    sizes = slot_sizes_bytes(page_bytes)
    assert sizes == sorted(set(sizes))
    assert all(size % 64 == 0 for size in sizes)
    assert sizes[-1] == page_bytes // 2
    power_bytes = 64
    while power_bytes <= page_bytes // 2:
        assert power_bytes in sizes
        power_bytes *= 2


def test_the_classes_of_4_kib_pages():
    assert slot_sizes_bytes(4096) == [
        64, 128, 192, 256, 320, 384, 448, 512, 576, 640, 768, 1024, 1344, 2048,
    ]  # fmt: skip


@given(
    page_bytes=st.sampled_from(PAGE_BYTES),
    nbytes=st.integers(1, 65536),
    align_log2=st.integers(6, 16),
)
def test_the_smallest_class_that_fits_and_is_aligned(page_bytes, nbytes, align_log2):
    align_bytes = 1 << align_log2
    fitting = [
        size for size in slot_sizes_bytes(page_bytes) if size >= nbytes and size % align_bytes == 0
    ]
    assert slot_size_bytes(nbytes, align_bytes, page_bytes) == (min(fitting) if fitting else None)
