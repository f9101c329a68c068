"""The process that allocates from pagealloc: ``worker.py LIBRARY``, started by ``workers.py``.

The loops run in the shared library, through pagealloc's C API and without the GIL; Python only
makes the allocator, with its defaults.
"""

import ctypes
import importlib
import sys

import pagealloc


def main(library_path: str) -> int:
    importlib.import_module("pagealloc.core.c_api")  # the capsule's module
    with_gil = ctypes.PyDLL(library_path)
    with_gil.bench_bind.argtypes = [ctypes.py_object]
    allocator = pagealloc.PageAllocator()
    with_gil.bench_bind(allocator)  # an exception set in C is raised here
    code: int = ctypes.CDLL(library_path).bench_serve()
    allocator.close()
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
