"""The package as others get it: sdist, the wheel built from it, and an empty venv."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
SOURCE_SUFFIXES = (
    *(".py", ".pyx", ".pxd", ".pyi", ".h", ".typed"),
    *(".html", ".js", ".json", ".yml"),
)
NOT_SOURCE = (".*", "build", "dist", "*.egg-info", "__pycache__", "*.so", "*.c", "_build")


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    process = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    assert process.returncode == 0, process.stdout
    return process.stdout


def package_sources() -> set[str]:
    return {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "pagealloc").rglob("*")
        if path.suffix in SOURCE_SUFFIXES
    }


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """The sdist of a copy of the checkout: a build leaves traces beside its sources."""
    folder = tmp_path_factory.mktemp("sdist")
    reachable = subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "-d",
            folder,
            "setuptools>=77",
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if reachable.returncode and os.environ.get("CI") != "true":
        pytest.skip(f"no package index is reachable: {reachable.stderr.strip()[-200:]}")
    project = folder / "project"
    shutil.copytree(ROOT, project, ignore=shutil.ignore_patterns(*NOT_SOURCE))
    run(sys.executable, "-m", "build", "--sdist", "--outdir", folder, project, cwd=folder)
    return next(folder.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Path:
    run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "-w",
        sdist.parent,
        sdist,
        cwd=sdist.parent,
        CFLAGS="-O0",  # half the time; what it does is tested elsewhere
    )
    return next(sdist.parent.glob("pagealloc-*.whl"))


@pytest.fixture(scope="module")
def empty_venv(wheel: Path) -> Path:
    """The bin folder of a venv in which the wheel alone was installed."""
    folder = wheel.parent / "venv"
    venv.create(folder, with_pip=True)
    run(folder / "bin/pip", "install", "-q", wheel, cwd=folder)
    return folder / "bin"


@pytest.mark.network
class TestPackage:
    def test_the_sdist_has_every_source_and_nothing_generated(self, sdist):
        with tarfile.open(sdist) as archive:
            names = {name.partition("/")[2] for name in archive.getnames()}
        assert package_sources() <= names
        assert {"LICENSE", "README.md", "setup.py", "tox.ini", "tests/conftest.py"} <= names
        assert not [name for name in names if name.endswith((".c", ".so", ".pyc"))]

    def test_the_wheel_has_every_source_and_a_module_for_each_pyx(self, wheel):
        with zipfile.ZipFile(wheel) as archive:
            names = set(archive.namelist())
            metadata = next(name for name in names if name.endswith("/METADATA"))
            fields = archive.read(metadata).decode().splitlines()
        assert package_sources() <= names
        compiled = {name.partition(".")[0] for name in names if name.endswith(".so")}
        assert compiled == {name.removesuffix(".pyx") for name in names if name.endswith(".pyx")}
        assert not [name for name in names if name.endswith((".c", ".pyc"))]
        assert "License-Expression: Apache-2.0" in fields
        assert "License-File: LICENSE" in fields

    def test_numpy_and_psutil_come_along_alone(self, empty_venv):
        listed = run(empty_venv / "pip", "list", "--format=freeze", cwd=empty_venv)
        names = {line.partition("==")[0] for line in listed.splitlines() if "==" in line}
        assert names - {"pip", "setuptools"} == {"pagealloc", "numpy", "psutil"}

    def test_it_imports_and_allocates(self, empty_venv):
        code = (
            "import pagealloc, pagealloc.kv; b = pagealloc.default_allocator().alloc('64KiB'); "
            "print(b.nbytes)"
        )
        assert run(empty_venv / "python", "-c", code, cwd=empty_venv) == "65536\n"

    def test_the_command_runs(self, empty_venv):
        assert "Backing achieved here" in run(empty_venv / "pagealloc", "info", cwd=empty_venv)

    def test_a_missing_extra_is_one_line(self, empty_venv):
        process = subprocess.run(
            [empty_venv / "pagealloc", "demo", "--quick"],
            cwd=empty_venv,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert process.returncode != 0
        assert "pip install 'pagealloc[demo]'" in process.stderr
        assert "Traceback" not in process.stderr


# --- the repository ---


@pytest.mark.skipif(os.sysconf("SC_PAGE_SIZE") != 4096, reason="the README shows 4 KiB pages")
def test_the_readme_s_lines_print_what_it_shows(tmp_path):
    readme = (ROOT / "README.md").read_text()
    example = re.search(r"```python\n(.*?)```\s+```text\n(.*?)```", readme, re.DOTALL)
    assert example is not None
    assert run(sys.executable, "-c", example[1], cwd=tmp_path) == example[2]


@pytest.mark.skipif(os.sysconf("SC_PAGE_SIZE") != 4096, reason="the README shows 4 KiB pages")
def test_the_readme_s_profile_is_what_the_command_prints(tmp_path):
    readme = (ROOT / "README.md").read_text()
    shown = re.search(r"    \$ pagealloc (profile .*)\n((?:    .*\n)+)", readme)
    assert shown is not None
    options = shown[1].removeprefix("profile").split()
    command = (Path(sys.executable).with_name("pagealloc"), "profile", "-o", tmp_path)
    printed = run(*command, *options, cwd=ROOT)

    def amounts(text):
        found = re.findall(r"([\d.]+) MiB +(\S+)", text)
        return sorted((name, float(mib)) for mib, name in found)

    assert len(amounts(shown[2])) == 8
    assert [name for name, _ in amounts(printed)] == [name for name, _ in amounts(shown[2])]
    for (_, mib), (_, mib_shown) in zip(amounts(printed), amounts(shown[2]), strict=True):
        assert mib == pytest.approx(mib_shown, rel=0.2)  # they are sampled


def examples_of(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)


def test_the_quickstart_s_lines_run(tmp_path):
    examples = examples_of("quickstart.md")
    assert len(examples) == 3
    for example in examples:
        run(sys.executable, "-c", example, cwd=tmp_path)


def test_the_lines_on_memory_run(tmp_path):
    printed = run(sys.executable, "-c", "\n".join(examples_of("memory.md")), cwd=tmp_path)
    assert "bytes went back" in printed
    assert "8388608 of 8388608" in printed


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("this is no git checkout")
    listed = run("git", "-c", f"safe.directory={ROOT}", "ls-files", "-z", cwd=ROOT)
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


def test_nothing_generated_is_tracked(tracked):
    suffixes = (".so", ".o", ".pyc", ".pyd", ".whl")
    assert [path for path in tracked if path.name.endswith(suffixes)] == []
    c_sources = [path for path in tracked if path.suffix in (".c", ".cpp")]
    assert [path for path in c_sources if b"Generated by Cython" in path.read_bytes()[:200]] == []


def test_no_tracked_file_names_a_folder_of_this_machine(tracked):
    folders = [folder for folder in (ROOT.parent, Path.home()) if len(folder.parts) > 1]
    names = [f"{folder}/".encode() for folder in folders if folder != Path("/tmp")]
    for path in tracked:
        text = path.read_bytes()
        assert not [name for name in names if name in text], path
