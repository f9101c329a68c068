"""Embedding in llama-cpp-python: prompt caching by pages, and llama.cpp's sequence calls.

``pip install 'pagealloc[llama]'`` brings llama-cpp-python; nothing else of pagealloc needs it.

state
    What llama.cpp makes of a context's tokens: a blob of K and V rows by layer.
whole state
    One that cannot be taken apart, which is kept and found as a whole.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pagealloc.llama.attaching import attach, detach
    from pagealloc.llama.context_memory import KVMemory, KVMemoryStats, kv_memory
    from pagealloc.llama.page_cache import PageCache, PageCacheStats
    from pagealloc.llama.page_state import PageState
    from pagealloc.llama.sequences import LlamaSequences, sequence
    from pagealloc.llama.shared_prefix import SharedPrefix

__all__ = [
    "KVMemory",
    "KVMemoryStats",
    "LlamaSequences",
    "PageCache",
    "PageCacheStats",
    "PageState",
    "SharedPrefix",
    "attach",
    "detach",
    "kv_memory",
    "sequence",
]

_ROOMS = {
    "KVMemory": "context_memory",
    "KVMemoryStats": "context_memory",
    "LlamaSequences": "sequences",
    "PageCache": "page_cache",
    "PageCacheStats": "page_cache",
    "PageState": "page_state",
    "SharedPrefix": "shared_prefix",
    "attach": "attaching",
    "detach": "attaching",
    "kv_memory": "context_memory",
    "sequence": "sequences",
}


def __getattr__(name: str) -> Any:
    # When it is asked for: what needs no llama-cpp-python can be imported without it.
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    try:
        room = importlib.import_module(f"{__name__}.{_ROOMS[name]}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "llama_cpp":
            raise
        raise ModuleNotFoundError(
            f"pagealloc.llama.{name} needs llama-cpp-python: pip install 'pagealloc[llama]'",
            name=error.name,
        ) from error
    return getattr(room, name)
