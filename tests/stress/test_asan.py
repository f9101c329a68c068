"""Under AddressSanitizer, a use after free of a slot or run ends the process with a report."""

import ctypes
import signal
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes
from pagealloc import PageAllocator

allocator = PageAllocator(backing="base")
keep = allocator.alloc({nbytes})
buffer = allocator.alloc({nbytes})
address = buffer.address
ctypes.string_at(address, 8)
buffer.close()
ctypes.string_at(address, 8)
print("not caught")
"""


def under_asan():
    return hasattr(ctypes.CDLL(None), "__asan_poison_memory_region")


@pytest.mark.skipif(not under_asan(), reason="not running under AddressSanitizer (tox -e asan)")
@pytest.mark.parametrize("nbytes", [100, 65536, 100 << 20])
def test_use_after_free_is_reported(nbytes):
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(nbytes=nbytes)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode != 0
    assert "not caught" not in run.stdout
    # A large run is unmapped when freed: the hardware catches that, and ASan lets the signal pass.
    assert "use-after-poison" in run.stderr or run.returncode == -signal.SIGSEGV
