"""profile(): kinds, files by suffix, errors."""

import pytest

from pagealloc import PageAllocator
from pagealloc.observe import profile
from pagealloc.observe.pprof import from_pprof
from pagealloc.observe.profiling import KINDS


def test_kinds():
    assert KINDS == ("heap", "cpu", "contention")
    with pytest.raises(ValueError, match="kind='disk': heap, cpu, contention are possible"):
        profile("disk")


def test_files_by_suffix(tmp_path):
    allocator = PageAllocator()
    with profile("heap", period=1) as p:
        buffer = allocator.alloc(5000)
    for name in ("a.pb.gz", "a.html", "a.folded"):
        p.write(tmp_path / name)
    assert from_pprof((tmp_path / "a.pb.gz").read_bytes()).samples == p.profile.samples
    assert "test_files_by_suffix" in (tmp_path / "a.html").read_text()
    assert (tmp_path / "a.folded").read_text().endswith(" 5000\n")
    with pytest.raises(ValueError, match=r"a\.svg: names that end in \.pb\.gz, \.html or \.folded"):
        p.write(tmp_path / "a.svg")
    buffer.close()
    allocator.close()


def test_start_and_stop_without_with():
    with PageAllocator() as allocator:
        p = profile("heap", period=1).start()
        allocator.alloc(100).close()
        p.stop()
        allocator.alloc(100).close()
    assert p.profile.total(0) == 1
