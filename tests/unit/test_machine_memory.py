"""What a process may still use: the machine's figure, and those of its cgroups."""

from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagealloc.core.machine_memory import available_bytes, cgroup_limits

MIB = 1 << 20
V2 = ("memory.max", "memory.current", "inactive_file")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


class Tree:
    """A procfs and mounted cgroups in a folder."""

    def __init__(self, folder: Path) -> None:
        self.proc = folder / "proc"
        self.folder = folder
        (self.proc / "self").mkdir(parents=True)
        self.write("cgroup", "")
        self.write("mountinfo", "")

    def write(self, name: str, text: str) -> None:
        (self.proc / "self" / name).write_text(text, errors="surrogateescape")

    def mount(self, kind: str, name: str, root: str = "/", options: str = "rw") -> Path:
        mounted = self.folder / name
        mounted.mkdir()
        escaped = str(mounted).replace(" ", "\\040")
        line = f"30 25 0:26 {root} {escaped} rw,nosuid shared:4 - {kind} cgroup {options}\n"
        with (self.proc / "self/mountinfo").open("a") as file:
            file.write("22 1 8:1 / / rw - ext4 /dev/vda rw\n" + line)
        return mounted

    def limit(self, folder: Path, names: tuple[str, str, str], values: tuple[object, int, int]):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / names[0]).write_text(f"{values[0]}\n")
        (folder / names[1]).write_text(f"{values[1]}\n")
        (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {values[2]}\n")

    def available(self) -> list[int]:
        return [limit.available_bytes for limit in cgroup_limits(str(self.proc))]


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path)


def test_a_parents_limit_of_version_2_counts(tree):
    mounted = tree.mount("cgroup2", "unified")
    tree.write("cgroup", "0::/user/job\n")
    tree.limit(mounted / "user/job", V2, (900 * MIB, 100 * MIB, 0))
    tree.limit(mounted / "user", V2, (512 * MIB, 200 * MIB, 50 * MIB))
    assert tree.available() == [800 * MIB, 362 * MIB]
    assert available_bytes(str(tree.proc)) == 362 * MIB


def test_max_is_no_limit(tree):
    mounted = tree.mount("cgroup2", "unified")
    tree.write("cgroup", "0::/job\n")
    tree.limit(mounted / "job", V2, ("max", 100 * MIB, 0))
    assert tree.available() == []


def test_version_1(tree):
    mounted = tree.mount("cgroup", "memory", options="rw,memory")
    tree.mount("cgroup", "cpu", options="rw,cpu")
    tree.write("cgroup", "9:cpu:/elsewhere\n4:memory:/job\n")
    tree.limit(mounted / "job", V1, (300 * MIB, 100 * MIB, 10 * MIB))
    tree.limit(mounted, V1, (9223372036854771712, 5000 * MIB, 0))
    assert tree.available() == [210 * MIB]


def test_both_versions_at_once(tree):
    old = tree.mount("cgroup", "memory", options="rw,memory")
    new = tree.mount("cgroup2", "unified")
    tree.write("cgroup", "4:hugetlb,memory:/a\n0::/b\n")
    tree.limit(old / "a", V1, (100 * MIB, 40 * MIB, 0))
    tree.limit(new / "b", V2, (80 * MIB, 70 * MIB, 5 * MIB))
    assert sorted(tree.available()) == [15 * MIB, 60 * MIB]


def test_a_path_that_only_the_host_sees(tree):
    mounted = tree.mount("cgroup2", "unified")
    tree.write("cgroup", "0::/docker/0123\n")
    tree.limit(mounted, V2, (64 * MIB, 60 * MIB, 0))
    assert tree.available() == [4 * MIB]


def test_a_mount_that_shows_a_part_of_the_tree(tree):
    mounted = tree.mount("cgroup2", "unified", root="/docker/0123")
    tree.write("cgroup", "0::/docker/0123/job\n")
    tree.limit(mounted / "job", V2, (64 * MIB, 60 * MIB, 0))
    assert tree.available() == [4 * MIB]


def test_a_space_in_a_path(tree):
    mounted = tree.mount("cgroup2", "a place")
    tree.write("cgroup", "0::/my job\n")
    tree.limit(mounted / "my job", V2, (64 * MIB, 60 * MIB, 0))
    assert tree.available() == [4 * MIB]


def test_more_in_use_than_allowed_leaves_nothing(tree):
    mounted = tree.mount("cgroup2", "unified")
    tree.write("cgroup", "0::/\n")
    tree.limit(mounted, V2, (64 * MIB, 70 * MIB, 0))
    assert tree.available() == [0]


@given(st.text(), st.text())
def test_any_text_is_no_limit(tmp_path_factory, cgroup, mountinfo):
    tree = Tree(tmp_path_factory.mktemp("proc"))
    tree.write("cgroup", cgroup)
    tree.write("mountinfo", mountinfo)
    assert tree.available() == []


@given(limit=st.text(), usage=st.text(), stat=st.text())
def test_any_text_in_a_cgroups_files(tmp_path_factory, limit, usage, stat):
    tree = Tree(tmp_path_factory.mktemp("proc"))
    mounted = tree.mount("cgroup2", "unified")
    tree.write("cgroup", "0::/\n")
    for name, text in (("memory.max", limit), ("memory.current", usage), ("memory.stat", stat)):
        (mounted / name).write_bytes(text.encode("utf-8", "surrogatepass"))
    assert all(available >= 0 for available in tree.available())


def test_this_machine():
    assert 0 < available_bytes() <= psutil.virtual_memory().total
