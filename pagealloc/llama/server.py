"""``python -m pagealloc.llama.server``: llama-cpp-python's server, with a `PageCache`.

That server knows its own caches only.  This starts it, with all its options, and has every model
that it loads use one `PageCache` of ``--cache_size`` bytes.  How rows are stored is said by
environment variables, since its command line is not ours:

``PAGEALLOC_LLAMA_QUANTIZE=1``
    K in 8 bits and V in 4.
``PAGEALLOC_LLAMA_PATH=folder``
    keep prompts there over restarts.
"""

from __future__ import annotations

import functools
import os
import sys
from typing import Any

from pagealloc.llama.attaching import attach
from pagealloc.llama.page_cache import PageCache

__all__ = ["main"]


def main() -> None:
    """Start the server; its arguments are the program's."""
    from llama_cpp.server import __main__ as server
    from llama_cpp.server.model import LlamaProxy

    load = LlamaProxy.load_llama_from_model_settings
    caches: dict[str, PageCache] = {}

    @functools.wraps(load)
    def load_with_cache(settings: Any) -> Any:
        llm = load(settings.model_copy(update={"cache": False}))
        if not settings.embedding:
            if "all" not in caches:
                caches["all"] = PageCache(
                    settings.cache_size,
                    quantize=os.environ.get("PAGEALLOC_LLAMA_QUANTIZE", "") not in ("", "0"),
                    path=os.environ.get("PAGEALLOC_LLAMA_PATH") or None,
                )
            attach(llm, caches["all"])
        return llm

    LlamaProxy.load_llama_from_model_settings = staticmethod(load_with_cache)
    try:
        server.main()
    finally:
        for cache in caches.values():
            print(cache, file=sys.stderr)
            cache.close()


if __name__ == "__main__":
    main()
