"""Machines of the tests' own: folders that stand for / ."""

from pathlib import Path

import pytest

from pagealloc.observe.system_report import SystemReport, read_system_report

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


def machine(root: Path, files: dict[str, str]) -> SystemReport:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return read_system_report(root, page_bytes=4096)


def cgroup2(
    path: str, mount_root: str = "/", mount_point: str = "/sys/fs/cgroup"
) -> dict[str, str]:
    return {
        "proc/self/cgroup": f"0::{path}\n",
        "proc/self/mountinfo": (
            "22 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n"
            f"30 22 0:26 {mount_root} {mount_point} rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
        ),
    }


def cgroup1(path: str, mount_root: str = "/") -> dict[str, str]:
    return {
        "proc/self/cgroup": f"12:pids:/elsewhere\n4:cpu,memory:{path}\n0::/elsewhere\n",
        "proc/self/mountinfo": (
            "33 31 0:31 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
            f"35 31 0:32 {mount_root} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
        ),
    }


V1_UNLIMITED = "9223372036854771712\n"


class TestNothing:
    def test_an_empty_machine_is_a_report_of_nothing(self, tmp_path):
        report = machine(tmp_path, {})
        assert report.page_bytes == 4096
        assert report.total_bytes is None
        assert report.available_bytes is None
        assert report.usable_bytes is None
        assert report.thp_enabled is None
        assert report.mthp_enabled == {}
        assert report.hugetlb_pools == ()
        assert report.numa_nodes == ()
        assert report.cgroup is None
        assert report.max_map_count is None

    def test_malformed_files_are_as_good_as_missing(self, tmp_path):
        report = machine(
            tmp_path,
            {
                "proc/meminfo": "MemTotal: plenty\n",
                "proc/self/cgroup": "nonsense\n0::\n",
                "proc/self/mountinfo": "\nshort - line\n",
                "proc/sys/vm/max_map_count": "\n",
                "sys/kernel/mm/transparent_hugepage/enabled": "yes\n",
                "sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages": "x\n",
                "sys/devices/system/node/nodeless": "",
            },
        )
        assert report == read_system_report(tmp_path / "nowhere", page_bytes=4096)

    def test_this_machine_can_be_read(self):
        report = read_system_report()
        assert report.page_bytes & (report.page_bytes - 1) == 0
        assert report.total_bytes is None or report.total_bytes > 0


class TestHugePages:
    def test_thp_switches(self, tmp_path):
        folder = "sys/kernel/mm/transparent_hugepage"
        report = machine(
            tmp_path,
            {
                f"{folder}/enabled": "always [madvise] never\n",
                f"{folder}/defrag": "always defer [defer+madvise] madvise never\n",
                f"{folder}/shmem_enabled": "always within_size advise [never] deny force\n",
                f"{folder}/hpage_pmd_size": "2097152\n",
                f"{folder}/hugepages-64kB/enabled": "always inherit madvise [never]\n",
                f"{folder}/hugepages-2048kB/enabled": "always [inherit] madvise never\n",
                f"{folder}/hugepages-16kB/shmem_enabled": "always [never]\n",
            },
        )
        assert report.thp_enabled is not None
        assert report.thp_enabled.value == "madvise"
        assert report.thp_enabled.choices == ("always", "madvise", "never")
        assert report.thp_enabled.path == f"/{folder}/enabled"
        assert report.thp_defrag is not None
        assert report.thp_defrag.value == "defer+madvise"
        assert report.shmem_enabled is not None
        assert report.shmem_enabled.value == "never"
        assert report.huge_page_bytes == 2 * MIB
        assert {size: one.value for size, one in report.mthp_enabled.items()} == {
            64 * KIB: "never",
            2 * MIB: "inherit",
        }

    def test_64_kib_pages(self, tmp_path):
        folder = "sys/kernel/mm"
        machine(
            tmp_path,
            {
                f"{folder}/transparent_hugepage/hpage_pmd_size": f"{512 * MIB}\n",
                f"{folder}/hugepages/hugepages-524288kB/nr_hugepages": "3\n",
                f"{folder}/hugepages/hugepages-524288kB/free_hugepages": "1\n",
                f"{folder}/hugepages/hugepages-2048kB/nr_hugepages": "0\n",
                f"{folder}/hugepages/hugepages-2048kB/free_hugepages": "0\n",
                "proc/meminfo": "MemTotal: 100 kB\nHugepagesize:     524288 kB\n",
            },
        )
        report = read_system_report(tmp_path, page_bytes=65536)
        assert report.page_bytes == 65536
        assert report.huge_page_bytes == 512 * MIB
        small, large = report.hugetlb_pools
        assert (small.page_bytes, small.is_default_size) == (2 * MIB, False)
        assert (large.page_bytes, large.is_default_size) == (512 * MIB, True)
        assert (large.total_pages, large.free_pages) == (3, 1)
        assert large.path == f"/{folder}/hugepages/hugepages-524288kB/nr_hugepages"


class TestNuma:
    def test_nodes_in_order(self, tmp_path):
        folder = "sys/devices/system/node"
        files = {
            f"{folder}/node{node}/meminfo": f"Node {node} MemTotal: {node} kB\n"
            for node in (10, 2, 0)
        }
        report = machine(
            tmp_path,
            {**files, f"{folder}/node2/cpulist": "4-7\n", f"{folder}/online": "0,2,10\n"},
        )
        assert [node.node for node in report.numa_nodes] == [0, 2, 10]
        assert report.numa_nodes[1].cpus == "4-7"
        assert report.numa_nodes[2].total_bytes == 10 * KIB
        assert report.numa_nodes[2].free_bytes is None


class TestCgroup2:
    @pytest.mark.parametrize("path", ["/", "/app.slice/server"])
    def test_no_limit(self, tmp_path, path):
        own = f"sys/fs/cgroup/{path.strip('/')}"
        report = machine(
            tmp_path,
            {
                **cgroup2(path),
                f"{own}/memory.max": "max\n",
                f"{own}/memory.current": f"{10 * MIB}\n",
            },
        )
        assert report.cgroup is not None
        assert report.cgroup.version == 2
        assert report.cgroup.limit_bytes is None
        assert report.cgroup.used_bytes == 10 * MIB
        assert report.cgroup.available_bytes is None

    def test_own_limit_less_what_is_used_for_good(self, tmp_path):
        report = machine(
            tmp_path,
            {
                **cgroup2("/app"),
                "sys/fs/cgroup/app/memory.max": f"{GIB}\n",
                "sys/fs/cgroup/app/memory.current": f"{300 * MIB}\n",
                "sys/fs/cgroup/app/memory.stat": f"anon 1\ninactive_file {100 * MIB}\n",
                "proc/meminfo": "MemAvailable: 8388608 kB\n",
            },
        )
        assert report.cgroup is not None
        assert report.cgroup.limit_file == "/sys/fs/cgroup/app/memory.max"
        assert report.cgroup.used_bytes == 200 * MIB
        assert report.cgroup.available_bytes == 824 * MIB
        assert report.available_bytes == 8 * GIB
        assert report.usable_bytes == 824 * MIB

    def test_the_ancestor_with_the_smallest_rest_binds(self, tmp_path):
        report = machine(
            tmp_path,
            {
                **cgroup2("/a/b/c"),
                "sys/fs/cgroup/a/memory.max": f"{8 * GIB}\n",
                "sys/fs/cgroup/a/memory.current": f"{7 * GIB + 512 * MIB}\n",
                "sys/fs/cgroup/a/b/memory.max": f"{2 * GIB}\n",
                "sys/fs/cgroup/a/b/memory.current": f"{512 * MIB}\n",
                "sys/fs/cgroup/a/b/c/memory.max": "max\n",
                "sys/fs/cgroup/a/b/c/memory.current": f"{100 * MIB}\n",
            },
        )
        assert report.cgroup is not None
        assert report.cgroup.path == "/sys/fs/cgroup/a"
        assert report.cgroup.available_bytes == 512 * MIB

    def test_a_group_over_its_limit_has_nothing_left(self, tmp_path):
        report = machine(
            tmp_path,
            {
                **cgroup2("/"),
                "sys/fs/cgroup/memory.max": f"{MIB}\n",
                "sys/fs/cgroup/memory.current": f"{2 * MIB}\n",
                "proc/meminfo": "MemAvailable: 8388608 kB\n",
            },
        )
        assert report.usable_bytes == 0

    @pytest.mark.parametrize(
        ("path", "mount_root", "inside"),
        [
            ("/pod/app", "/pod", "app/"),  # part of the tree is mounted
            ("/pod/app", "/pod/app", ""),  # our own group is
            ("/podium", "/pod", ""),  # another one: what is mounted is all we see
            ("/../../other", "/", ""),  # we were started outside of our namespace
            ("/gone", "/", ""),
        ],
    )
    def test_containers_mount_a_part(self, tmp_path, path, mount_root, inside):
        report = machine(
            tmp_path,
            {
                **cgroup2(path, mount_root, r"/my\040cgroups"),
                f"my cgroups/{inside}memory.max": f"{64 * MIB}\n",
                f"my cgroups/{inside}memory.current": "0\n",
            },
        )
        assert report.cgroup is not None
        assert report.cgroup.limit_bytes == 64 * MIB
        assert report.cgroup.path == f"/my cgroups/{inside}".rstrip("/")

    def test_without_mountinfo_the_usual_place_is_tried(self, tmp_path):
        report = machine(
            tmp_path,
            {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": f"{MIB}\n"},
        )
        assert report.cgroup is not None
        assert report.cgroup.limit_bytes == MIB
        assert report.cgroup.used_bytes is None


class TestCgroup1:
    def test_no_limit_is_a_huge_number(self, tmp_path):
        report = machine(
            tmp_path,
            {
                **cgroup1("/app"),
                "sys/fs/cgroup/memory/app/memory.limit_in_bytes": V1_UNLIMITED,
                "sys/fs/cgroup/memory/app/memory.usage_in_bytes": f"{MIB}\n",
            },
        )
        assert report.cgroup is not None
        assert report.cgroup.version == 1
        assert report.cgroup.limit_bytes is None
        assert report.cgroup.path == "/sys/fs/cgroup/memory/app"

    def test_limit_of_an_ancestor(self, tmp_path):
        folder = "sys/fs/cgroup/memory"
        report = machine(
            tmp_path,
            {
                **cgroup1("/docker/abc", mount_root="/docker"),
                f"{folder}/memory.limit_in_bytes": f"{4 * GIB}\n",
                f"{folder}/memory.usage_in_bytes": f"{2 * GIB}\n",
                f"{folder}/memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB}\n",
                f"{folder}/abc/memory.limit_in_bytes": V1_UNLIMITED,
                f"{folder}/abc/memory.usage_in_bytes": f"{MIB}\n",
            },
        )
        assert report.cgroup is not None
        assert report.cgroup.version == 1
        assert report.cgroup.limit_bytes == 4 * GIB
        assert report.cgroup.used_bytes == GIB
        assert report.usable_bytes == 3 * GIB
