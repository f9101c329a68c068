"""The process that allocates from pagealloc, started by ``workers.py``: ``worker.py LIBRARY``.

The loops run in the shared library, through pagealloc's C API and without the GIL; Python only
makes the allocator: with its defaults, but for those named like ``time_every=0`` after the library.
"""

import ctypes
import importlib
import sys

import pagealloc


def main(library_path: str, *settings: str) -> int:
    importlib.import_module("pagealloc.core.c_api")  # the capsule's module
    with_gil = ctypes.PyDLL(library_path)
    with_gil.bench_bind.argtypes = [ctypes.py_object]
    numbers = dict(setting.split("=") for setting in settings)
    allocator = pagealloc.PageAllocator(**{name: int(text) for name, text in numbers.items()})
    with_gil.bench_bind(allocator)  # an exception set in C is raised here
    code: int = ctypes.CDLL(library_path).bench_serve()
    allocator.close()
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
