"""What `import pagealloc` loads, from where, and how long that takes."""

import importlib.machinery
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest

import pagealloc
from pagealloc.core import os_memory

ROOT = Path(__file__).resolve().parent.parent.parent
MOST_IMPORT_MS = 60


def python(code: str) -> str:
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    return process.stdout


def test_the_core_is_compiled():
    assert isinstance(os_memory.__loader__, importlib.machinery.ExtensionFileLoader)
    assert Path(os_memory.__file__).parent.parent == Path(pagealloc.__file__).parent


def test_the_installed_package_is_tested():
    distribution = importlib.metadata.distribution("pagealloc")
    origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    if origin.get("dir_info", {}).get("editable"):
        folder = ROOT / "pagealloc"
    else:
        folder = Path(str(distribution.locate_file("pagealloc"))).resolve()
    assert Path(pagealloc.__file__).resolve().parent == folder
    assert Path(python("import pagealloc; print(pagealloc.__file__)").strip()).parent == folder


def test_the_installed_package_is_the_checkout_s():
    installed = Path(pagealloc.__file__).parent
    for path in (ROOT / "pagealloc").rglob("*"):
        if path.suffix in (".py", ".pyx", ".pxd", ".pyi", ".h", ".typed"):
            name = path.relative_to(ROOT / "pagealloc")
            assert (installed / name).read_bytes() == path.read_bytes(), f"{name} is stale"


def test_version():
    assert pagealloc.__version__ == importlib.metadata.version("pagealloc")


def test_every_public_name_is_there():
    for name in pagealloc.__all__:
        assert getattr(pagealloc, name) is not None


def test_importing_loads_no_optional_package():
    loaded = json.loads(
        python("import json, sys, pagealloc, pagealloc.kv; print(json.dumps(list(sys.modules)))")
    )
    optional = {
        "gguf",
        "llama_cpp",
        "matplotlib",
        "opentelemetry",
        "prometheus_client",
        "rich",
        "tokenizers",
        "torch",
    }
    assert optional.isdisjoint(name.partition(".")[0] for name in loaded)


@pytest.mark.timing
def test_import_time():
    code = (
        "import time, numpy; start = time.perf_counter(); import pagealloc; "
        "print(1000 * (time.perf_counter() - start))"
    )
    python(code)  # the first import may compile to bytecode
    # NumPy is there already: what is measured is what pagealloc adds.  The least of several: a
    # busy machine makes all of them longer, and none shorter.
    import_ms = min(float(python(code)) for _ in range(9))
    assert import_ms <= MOST_IMPORT_MS
