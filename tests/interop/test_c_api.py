"""The C API as other packages get it: by cimport, and by the header over the capsule.

Everything here is compiled against the installed pagealloc, in a folder of its own.
"""

import ctypes
import gc
import re
import shutil
import sys
import sysconfig
import threading
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
from native import STRICT, build_tool, compile_c, load, run

import pagealloc
from pagealloc import ClosedError, PageAllocator

ROOT = Path(__file__).resolve().parent.parent.parent
HERE = Path(__file__).resolve().parent
PAGE_BYTES = pagealloc.page_size_bytes()


def need_cython() -> None:
    """Skip if the dependency group `test` is not installed: nothing here may ask the network."""
    pytest.importorskip("Cython", minversion="3.1")
    pytest.importorskip("setuptools", minversion="77")


@pytest.fixture
def allocator():
    with PageAllocator() as allocator:
        yield allocator


# --- a foreign Cython package ---


@pytest.fixture(scope="module")
def foreign(tmp_path_factory) -> ModuleType:
    """`tests/interop/foreign`, built and installed as pip does it, into a folder of its own."""
    build_tool("gcc", "cc", "clang")
    need_cython()
    pytest.importorskip("pip")
    folder = tmp_path_factory.mktemp("foreign")
    shutil.copytree(HERE / "foreign", folder / "source")
    run(
        *(sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps"),
        *("--no-index", "--disable-pip-version-check", "--target", "installed", "./source"),
        cwd=folder,
    )
    return load("pagealloc_foreign", folder / "installed")


class TestCimport:
    @pytest.mark.parametrize("nbytes", [1, 64, 65, 1000, PAGE_BYTES // 2, PAGE_BYTES, 1_000_001])
    def test_a_block_is_aligned_usable_and_freed_once(self, foreign, allocator, nbytes):
        address = foreign.alloc(allocator, nbytes)
        assert address % (PAGE_BYTES if nbytes >= PAGE_BYTES else 64) == 0
        assert nbytes <= foreign.usable_bytes(allocator, address) < nbytes * 1.2 + PAGE_BYTES
        ctypes.memset(address, 0xA5, foreign.usable_bytes(allocator, address))
        assert foreign.give_back(allocator, address) == "freed"
        assert foreign.usable_bytes(allocator, address) == 0
        assert foreign.give_back(allocator, address) in ("not live", "not ours")
        allocator.check()

    def test_a_small_block_freed_twice_is_not_live(self, foreign, allocator):
        first, second = foreign.alloc(allocator, 64), foreign.alloc(allocator, 64)
        assert foreign.give_back(allocator, first) == "freed"
        assert foreign.give_back(allocator, first) == "not live"
        assert foreign.give_back(allocator, second) == "freed"

    @pytest.mark.parametrize("align_bytes", [64, 256, PAGE_BYTES, 1 << 21])
    def test_alignment(self, foreign, allocator, align_bytes):
        address = foreign.alloc(allocator, 100, align_bytes)
        assert address
        assert address % align_bytes == 0
        assert foreign.give_back(allocator, address) == "freed"

    @pytest.mark.parametrize(
        ("nbytes", "align_bytes"),
        [
            (0, 0),
            ((1 << 47) + 1, 0),
            ((1 << 64) - 1, 0),
            ((1 << 64) - 1, 1 << 30),
            (64, 3),
            (64, 96),
            (64, 1 << 31),
            (64, (1 << 64) - 1),
            (64, 1 << 63),
        ],
    )
    def test_a_request_that_is_none_is_refused(self, foreign, allocator, nbytes, align_bytes):
        before = foreign.stats(allocator)
        assert foreign.alloc(allocator, nbytes, align_bytes) == 0
        assert foreign.alloc_many(allocator, 3, nbytes, align_bytes) is None
        assert foreign.stats(allocator) == before

    def test_more_than_the_kernel_has_is_refused(self, foreign, allocator):
        assert foreign.alloc(allocator, 1 << 47) == 0
        assert foreign.stats(allocator)["n_failed"] == 1

    def test_a_foreign_pointer_is_not_ours(self, foreign, allocator):
        with PageAllocator() as other, other.alloc(100) as buffer:
            text = ctypes.create_string_buffer(100)
            block = foreign.alloc(allocator, 1000)
            wrong = [0, 1, buffer.address, ctypes.addressof(text), block + 64, (1 << 64) - 64]
            for address in wrong:
                assert foreign.give_back(allocator, address) == "not ours"
                assert foreign.usable_bytes(allocator, address) == 0
            assert foreign.give_back_many(allocator, [*wrong, block, *wrong]) == 1
            assert other.stats().n_live == 1
        allocator.check()

    @pytest.mark.parametrize("nbytes", [64, 1000, PAGE_BYTES, 3 * PAGE_BYTES])
    def test_many(self, foreign, allocator, nbytes):
        addresses = foreign.alloc_many(allocator, 300, nbytes)
        assert len(set(addresses)) == 300
        spans = sorted((a, a + foreign.usable_bytes(allocator, a)) for a in addresses)
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))
        assert foreign.stats(allocator)["n_live"] == 300
        assert foreign.give_back(allocator, addresses[7]) == "freed"
        assert foreign.give_back_many(allocator, addresses[::-1]) == 299
        assert foreign.give_back_many(allocator, addresses) == 0
        assert foreign.stats(allocator)["n_live"] == 0
        allocator.check()

    def test_many_may_be_none(self, foreign, allocator):
        assert foreign.alloc_many(allocator, 0, 64) == []
        assert foreign.give_back_many(allocator, []) == 0

    def test_the_budget_refuses(self, foreign):
        with PageAllocator(backing="base", budget_bytes=16 * PAGE_BYTES) as allocator:
            assert foreign.alloc(allocator, 17 * PAGE_BYTES) == 0
            assert foreign.stats(allocator)["n_failed"] == 1
            assert foreign.alloc_many(allocator, 17, PAGE_BYTES) is None
            assert foreign.stats(allocator)["n_live"] == 0
            addresses = foreign.alloc_many(allocator, 16, PAGE_BYTES)
            assert foreign.alloc(allocator, 1) == 0
            assert foreign.give_back_many(allocator, addresses) == 16

    def test_stats_are_those_of_python(self, foreign, allocator):
        buffer = allocator.alloc(5 * PAGE_BYTES)
        address = foreign.alloc(allocator, 100)
        counts, shown = foreign.stats(allocator), allocator.stats()
        for name in ("reserved_bytes", "committed_bytes", "live_bytes"):
            assert counts[name] == getattr(shown, name) > 0, name
        assert counts["live_bytes"] == 5 * PAGE_BYTES + foreign.usable_bytes(allocator, address)
        assert counts["idle_bytes"] >= 0
        assert (counts["n_live"], counts["n_allocs"]) == (2, 2)
        assert (counts["n_frees"], counts["n_failed"]) == (0, 0)
        assert foreign.give_back(allocator, address) == "freed"
        assert foreign.stats(allocator)["n_frees"] == 1
        buffer.close()

    def test_live_blocks_keep_the_allocator_open(self, foreign):
        allocator = PageAllocator()
        address = foreign.alloc(allocator, 100)
        with pytest.raises(BufferError, match="1 live"):
            allocator.close()
        assert foreign.give_back(allocator, address) == "freed"
        allocator.close()
        with pytest.raises(ClosedError, match="is closed"):
            foreign.alloc(allocator, 100)
        with pytest.raises(ClosedError, match="is closed"):
            foreign.stats(allocator)

    def test_a_block_survives_a_lost_allocator(self, foreign):
        allocator = PageAllocator(arena_bytes="2MiB", backing="base")
        address = foreign.alloc(allocator, 100)
        ctypes.memset(address, ord("x"), 100)
        del allocator
        gc.collect()
        assert ctypes.string_at(address, 100) == b"x" * 100

    @pytest.mark.parametrize("thing", [None, 64, "allocator", PageAllocator, object()])
    def test_only_an_allocator_has_a_heap(self, foreign, thing):
        with pytest.raises(TypeError, match=r"PageAllocator"):
            foreign.heap_address(thing)

    def test_one_allocator_is_one_heap(self, foreign, allocator):
        class Special(PageAllocator):
            pass

        with Special() as special:
            heaps = [foreign.heap_address(one) for one in (allocator, allocator, special)]
        assert heaps[0] == heaps[1] != heaps[2]

    def test_a_heap_that_is_null(self, foreign):
        assert foreign.null_heap() == (0, "not ours", -1, 0, 0, False)

    def test_threads_without_the_gil(self, foreign, allocator):
        n_broken = {}

        def work(mark):
            n_broken[mark] = foreign.churn(allocator, 20_000, mark)

        threads = [threading.Thread(target=work, args=(mark,)) for mark in (1, 2, 3, 4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert n_broken == {1: 0, 2: 0, 3: 0, 4: 0}
        counts = foreign.stats(allocator)
        assert (counts["n_live"], counts["n_allocs"], counts["n_frees"]) == (0, 80_000, 80_000)
        allocator.check()

    def test_a_block_may_be_freed_in_another_thread(self, foreign, allocator):
        addresses = foreign.alloc_many(allocator, 1000, 200)
        n_freed = []

        def work():
            n_freed.append(foreign.give_back_many(allocator, addresses))

        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(n_freed) == 1000
        allocator.check()


# --- plain C ---

PLAIN_C = r"""
#include <pagealloc.h>

static const pagealloc_api *api;

static PyObject *describe(PyObject *self, PyObject *unused)
{
    (void)self, (void)unused;
    return Py_BuildValue("II", api->abi_version, api->n_functions);
}

/* Every function once on blocks of `nbytes`; a list of what they said. */
static PyObject *exercise(PyObject *self, PyObject *args)
{
    PyObject *allocator;
    Py_ssize_t nbytes;
    pagealloc_heap *heap;
    pagealloc_stats before, during, after;
    void *block, *blocks[20];
    void *const *constant = blocks;
    int many, freed, again, foreign;
    size_t usable, n_freed;
    (void)self;
    if (!PyArg_ParseTuple(args, "On", &allocator, &nbytes)) {
        return NULL;
    }
    heap = api->heap_of(allocator);
    if (heap == NULL) {
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    api->stats(heap, &before);
    block = api->alloc(heap, (size_t)nbytes, 0);
    usable = api->usable_bytes(heap, block);
    many = api->alloc_many(heap, (size_t)nbytes, 128, 20, blocks);
    api->stats(heap, &during);
    freed = api->free(heap, block);
    again = api->free(heap, block);
    foreign = api->free(heap, &usable);
    n_freed = many ? 0 : api->free_many(heap, constant, 20);
    api->stats(heap, &after);
    Py_END_ALLOW_THREADS
    return Py_BuildValue(
        "{s:n,s:n,s:i,s:i,s:i,s:i,s:n,s:[LLL],s:[LLLLLL]}",
        "block", (Py_ssize_t)(intptr_t)block, "usable", (Py_ssize_t)usable, "many", many,
        "freed", freed, "again", again, "foreign", foreign, "n_freed", (Py_ssize_t)n_freed,
        "n_live", (long long)before.n_live, (long long)during.n_live, (long long)after.n_live,
        "counts", (long long)after.reserved_bytes, (long long)after.committed_bytes,
        (long long)after.live_bytes, (long long)(after.n_allocs - before.n_allocs),
        (long long)(after.n_frees - before.n_frees), (long long)after.n_failed
    );
}

/* Arguments that are none; all must be answered. */
static PyObject *misuse(PyObject *self, PyObject *allocator)
{
    pagealloc_heap *heap = api->heap_of(allocator);
    (void)self;
    if (heap == NULL) {
        return NULL;
    }
    api->stats(heap, NULL);
    return Py_BuildValue(
        "OOiini", api->alloc(heap, 0, 0) == NULL ? Py_True : Py_False,
        api->alloc(heap, 64, 48) == NULL ? Py_True : Py_False,
        api->alloc_many(heap, 64, 0, 2, NULL), api->free(heap, NULL),
        (Py_ssize_t)api->free_many(heap, NULL, 2), api->free(NULL, NULL)
    );
}

static PyMethodDef methods[] = {
    {"describe", describe, METH_NOARGS, NULL},
    {"exercise", exercise, METH_VARARGS, NULL},
    {"misuse", misuse, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    .m_base = PyModuleDef_HEAD_INIT, .m_name = "plain", .m_size = -1, .m_methods = methods,
};

PyMODINIT_FUNC PyInit_plain(void)
{
    api = pagealloc_import();
    return api == NULL ? NULL : PyModule_Create(&definition);
}
"""


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> ModuleType:
    folder = tmp_path_factory.mktemp("plain")
    compile_c(PLAIN_C, "plain", folder)
    return load("plain", folder)


class TestPlainC:
    def test_the_table_is_the_header_s(self, plain):
        header = Path(pagealloc.get_include(), "pagealloc.h").read_text()
        defined = re.findall(r"#define PAGEALLOC_(?:ABI_VERSION|N_FUNCTIONS) (\d+)", header)
        assert plain.describe() == tuple(map(int, defined))

    @pytest.mark.parametrize("nbytes", [1, 128, 1000, PAGE_BYTES, 10 * PAGE_BYTES])
    def test_every_function(self, plain, allocator, nbytes):
        buffer = allocator.alloc(7)
        said = plain.exercise(allocator, nbytes)
        assert said["block"] % (PAGE_BYTES if nbytes >= PAGE_BYTES else 64) == 0
        assert said["usable"] >= nbytes
        assert said["n_live"] == [1, 22, 1]
        assert (said["many"], said["freed"], said["foreign"], said["n_freed"]) == (0, 0, 1, 20)
        assert said["again"] in (1, 2)
        shown = allocator.stats()
        assert said["counts"] == [
            shown.reserved_bytes,
            shown.committed_bytes,
            shown.live_bytes,
            21,
            21,
            0,
        ]
        buffer.close()
        allocator.check()

    def test_misuse_is_answered(self, plain, allocator):
        assert plain.misuse(allocator) == (True, True, -1, 1, 0, 1)
        assert allocator.stats().n_live == 0

    def test_no_heap(self, plain, allocator):
        with pytest.raises(TypeError, match="PageAllocator"):
            plain.misuse(3)
        allocator.close()
        with pytest.raises(ClosedError):
            plain.exercise(allocator, 64)

    @pytest.mark.parametrize(
        ("line", "other", "complaint"),
        [
            ("#define PAGEALLOC_ABI_VERSION 1", "#define PAGEALLOC_ABI_VERSION 99", "version 99 "),
            ("#define PAGEALLOC_N_FUNCTIONS 7", "#define PAGEALLOC_N_FUNCTIONS 8", "8 functions"),
        ],
    )
    def test_another_version_s_header_is_an_import_error(self, tmp_path, line, other, complaint):
        header = Path(pagealloc.get_include(), "pagealloc.h").read_text()
        assert header.count(line) == 1
        (tmp_path / "pagealloc.h").write_text(header.replace(line, other))
        compile_c(PLAIN_C, "plain", tmp_path, include=str(tmp_path))
        with pytest.raises(ImportError, match=complaint):
            load("plain", tmp_path)

    @pytest.mark.parametrize("standard", ["c++11", "c++17", "c++20"])
    def test_the_header_is_cpp(self, tmp_path, standard):
        (tmp_path / "user.cc").write_text(
            "#include <pagealloc.h>\n#include <pagealloc.h>\n"
            "const pagealloc_api *api() { return pagealloc_import(); }\n"
            "void *block(pagealloc_heap *heap) { return api()->alloc(heap, 64, 0); }\n"
        )
        run(
            build_tool("g++", "clang++"),
            *(*STRICT, "-fsyntax-only", f"-std={standard}"),
            *("-isystem", sysconfig.get_path("include"), "-I", pagealloc.get_include()),
            "user.cc",
            cwd=tmp_path,
        )

    @pytest.mark.parametrize("standard", ["c99", "c11", "c17", "gnu11"])
    def test_the_header_is_c(self, tmp_path, standard):
        (tmp_path / "user.c").write_text("#include <pagealloc.h>\n#include <pagealloc.h>\n")
        run(
            build_tool("gcc", "cc", "clang"),
            *(*STRICT, "-pedantic", "-fsyntax-only", f"-std={standard}"),
            *("-isystem", sysconfig.get_path("include"), "-I", pagealloc.get_include()),
            "user.c",
            cwd=tmp_path,
        )


# --- the manual ---


@pytest.mark.parametrize("language", ["cython", "c"])
def test_the_manual_s_example_builds_and_runs(tmp_path, language):
    """A block of docs/c_api.md whose first line is a comment with a file's name is that file."""
    build_tool("gcc", "cc", "clang")
    need_cython()
    page = (ROOT / "docs/c_api.md").read_text()
    section = {"cython": "## From Cython", "c": "## From C and C++"}[language]
    text = page.partition(section + "\n")[2].partition("\n## ")[0]
    files = {
        name: body
        for body, name in re.findall(r"```\w+\n((?:#|/\*) ([\w.]+).*?)```", text, re.DOTALL)
    }
    assert {"setup.py", "use.py"} < files.keys()
    assert len(files) == 3
    for name, body in files.items():
        (tmp_path / name).write_text(body)
    build = (sys.executable, "setup.py", "-q", "build_ext", "--inplace")
    run(*build, cwd=tmp_path, imports_pagealloc=True)
    code = "import sys; sys.path.insert(0, '.'); exec(open('use.py').read())"
    printed = run(sys.executable, "-c", code, cwd=tmp_path, imports_pagealloc=True)
    assert printed == "332833500.0\n"
