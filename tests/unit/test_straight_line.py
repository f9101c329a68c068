"""The machine code of alloc and free: what an optimising compiler was let make of the core."""

import re
import shutil
import subprocess
from ctypes import CDLL

import pytest

from pagealloc.core import heap

SLOW = {
    "heap_alloc_checked": {"pagealloc_alloc_checked_slow"},
    "heap_free_checked": {"heap_free_slow"},
}
"""What may be called or jumped to, when the magazine does not do."""

PREFIX = "__pyx_f_9pagealloc_4core_4heap_"

LOCKED = re.compile(
    r"\b(lock|mfence|lfence|sfence|syscall|cpuid"  # x86-64
    r"|ldaxr\w*|ldxr\w*|stlxr\w*|stxr\w*|cas\w*|swp\w*|ldadd\w*|ldset\w*|ldclr\w*|dmb|dsb|svc)\b"
)


def disassemble(function):
    """Return the instructions of a function of the core's heap module."""
    if not shutil.which("objdump"):
        pytest.skip("objdump (binutils) is not installed")
    if hasattr(CDLL(None), "__asan_init") or hasattr(CDLL(None), "__tsan_init"):
        pytest.skip("a sanitizer adds calls of its own")
    result = subprocess.run(
        ["objdump", "--disassemble", "--no-show-raw-insn", heap.__file__],
        capture_output=True,
        text=True,
        check=True,
    )
    found = re.search(
        rf"^[0-9a-f]+ <{PREFIX}{function}>:\n(.+?)\n\n", result.stdout, re.MULTILINE | re.DOTALL
    )
    if not found:
        pytest.skip("the module is stripped of its functions' names")
    return found[1].splitlines()


@pytest.mark.parametrize("function", SLOW)
def test_no_lock_no_call_and_no_system_call(function):
    instructions = disassemble(function)
    assert len(instructions) > 40
    # An exchange with memory locks the bus by itself.
    exchange = re.compile(r"\bxchg\b.*\(")
    locked = [line for line in instructions if LOCKED.search(line) or exchange.search(line)]
    assert not locked
    targets = {
        target.removeprefix(PREFIX)
        for line in instructions
        for target in re.findall(r"<([^>+]+)>", line)
    }
    assert {target for target in targets if not target.startswith("_")} <= SLOW[function]


@pytest.mark.parametrize("function", SLOW)
def test_the_slow_path_is_left_to_others(function):
    """At most one call, and that behind the return of the fast path."""
    calls = [line for line in disassemble(function) if re.search(r"\tcall|\tbl\b", line)]
    assert len(calls) <= 1
