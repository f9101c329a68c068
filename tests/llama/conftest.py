"""Models for the tests of pagealloc.llama, which need llama-cpp-python."""

import pytest
from llama_models import write_tiny_gemma3, write_tiny_mamba

from pagealloc.demo.tiny_model import write_tiny_model


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    write_tiny_model(path)
    return str(path)


@pytest.fixture(scope="session")
def other_path(tmp_path_factory):
    """Of a model of the same shape with other weights."""
    path = tmp_path_factory.mktemp("model") / "other.gguf"
    write_tiny_model(path, seed=1)
    return str(path)


@pytest.fixture(scope="session")
def mamba_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "mamba.gguf"
    write_tiny_mamba(path)
    return str(path)


@pytest.fixture(scope="session")
def gemma3_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "gemma3.gguf"
    write_tiny_gemma3(path)
    return str(path)


@pytest.fixture
def make(tiny_path):
    """Make `Llama` objects, closed at the end."""
    made = []

    def make_llama(path=tiny_path, **options):
        import llama_cpp

        options = {"n_ctx": 512, "n_batch": 64, "verbose": False, "n_threads": 2} | options
        llm = llama_cpp.Llama(path, **options)
        made.append(llm)
        return llm

    yield make_llama
    for llm in made:
        llm.close()


@pytest.fixture
def cache():
    from pagealloc.llama import PageCache

    with PageCache("64MiB") as cache:
        yield cache
        cache.check()
