"""The CPU profiler: CPU time by stack, inside pagealloc marked, its own thread left out."""

import mmap
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest

from pagealloc import PageAllocator
from pagealloc.observe import cpu_profile, profile
from pagealloc.observe.cpu_profile import CPUProfiler
from pagealloc.observe.native_code import NativeCode
from pagealloc.observe.stacks import lock
from pagealloc.observe.thread_capture import capture_threads

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's thread clocks")


def burn(seconds: float) -> int:
    """Compute for so much CPU time of this thread."""
    end = time.thread_time() + seconds
    total = 0
    while time.thread_time() < end:
        total += sum(range(2000))
    return total


def churn(allocator: PageAllocator, seconds: float) -> None:
    """Spend CPU time in the core, which lets go of the GIL for it."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        allocator.alloc_many("64KiB", 5000).close()


def cpu_ns_of(found, *functions: str) -> int:
    return sum(
        values[1]
        for stack, values in found.samples.items()
        if any(frame.function.startswith(functions) for frame in stack)
    )


def test_cpu_time_by_function():
    with profile("cpu", period_ns=2_000_000) as p:
        threads = [
            threading.Thread(target=burn, args=(0.2,)),
            threading.Thread(target=time.sleep, args=(0.2,)),
        ]
        for thread in threads:
            thread.start()
        burn(0.2)
        for thread in threads:
            thread.join()
    found = p.profile
    assert cpu_ns_of(found, "burn") == pytest.approx(0.4e9, rel=0.5)
    assert cpu_ns_of(found, "burn") > 0.6 * found.total()
    assert cpu_ns_of(found, "CPUProfiler._sample") == 0


def test_it_ends_also_where_its_lock_is_held(monkeypatch):
    """As by a handler of SIGTERM that has interrupted a note of the heap profiler."""
    monkeypatch.setattr(cpu_profile, "STOP_S", 0.2)
    profiler = CPUProfiler()
    profiler.start()
    with lock:
        burn(0.1)  # which it wants to note
        profiler.stop()
        assert profiler._thread.is_alive(), "it waits for the lock"
    profiler._thread.join(10)
    assert not profiler._thread.is_alive()


def test_it_keeps_nobodys_variables():
    class Held:
        pass

    def work(profiling):
        held, n_looks = Held(), profiling.profile.total(0)
        while profiling.profile.total(0) == n_looks:
            burn(0.0005)
        return weakref.ref(held)

    with profile("cpu", period_ns=20_000_000) as p:
        for _ in range(5):
            reference = work(p)
            for _ in range(20):  # asleep, nobody is looked at again
                if reference() is None:
                    break
                time.sleep(0.05)
            assert reference() is None


def test_time_inside_pagealloc_is_marked():
    with PageAllocator() as allocator, profile("cpu", period_ns=2_000_000) as p:
        churn(allocator, 0.5)
    marked = [
        stack for stack in p.profile.samples if stack[0].function.startswith("pagealloc.core.")
    ]
    assert marked
    assert all(frame.file.endswith(".so") for frame, *_ in marked)
    assert any(stack[1].function == "churn" for stack in marked)
    assert cpu_ns_of(p.profile, "pagealloc.core.") > 0.1 * p.profile.total()


def test_one_at_a_time_and_again():
    with profile("cpu"):
        refused = profile("cpu")
        with pytest.raises(RuntimeError, match="stop that profile first"):
            refused.start()
        refused.stop()
        with pytest.raises(RuntimeError, match="stop that profile first"):
            profile("cpu").start()
    with profile("cpu", period_ns=2_000_000) as p:
        burn(0.1)
    assert p.profile.total() > 0


def test_period_is_checked():
    with pytest.raises(ValueError, match="period_ns=10"):
        CPUProfiler(10)


def test_another_profiler_of_the_signal_is_left_alone():
    """In a process of its own: the handler is never taken back."""
    script = (
        "import signal; from pagealloc.observe import profile\n"
        "signal.signal(signal.SIGPROF, lambda *_: None)\n"
        "try: profile('cpu').start()\n"
        "except RuntimeError as error: print(error)\n"
        "print(signal.getsignal(signal.SIGPROF) is not signal.SIG_DFL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert "another profiler handles SIGPROF" in done.stdout
    assert done.stdout.endswith("True\n")


def test_a_signal_that_comes_late_ends_nothing():
    with profile("cpu", period_ns=2_000_000):
        burn(0.01)
    signal.raise_signal(signal.SIGPROF)
    burn(0.01)


def test_a_thread_that_blocks_the_signal_is_sampled_without_native_code():
    def blocked():
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPROF})
        burn(0.1)

    with profile("cpu", period_ns=2_000_000) as p:
        thread = threading.Thread(target=blocked)
        thread.start()
        thread.join()
    assert cpu_ns_of(p.profile, "test_a_thread_that_blocks") == pytest.approx(0.1e9, rel=0.6)


def test_whose_code():
    code = NativeCode()
    assert code.pagealloc_frame([]) is None
    code.refresh()
    assert code.file_at(0) is None
    assert code.file_at(1 << 63) is None


def test_one_that_cannot_start_is_in_nobodys_way():
    p = profile("cpu")
    with p:
        pass
    with pytest.raises(RuntimeError, match="only be started once"):
        p.start()
    with profile("cpu"):
        pass


def test_threads_that_ended_are_forgotten():
    """Their numbers come again, and a server has many."""
    spent_ns = {1 << 30: 5, threading.get_native_id(): 0}
    capture_threads([threading.get_native_id()], spent_ns, 1)
    assert 1 << 30 not in spent_ns


def test_a_forked_child_takes_its_own():
    with profile("cpu"):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                with profile("cpu", period_ns=1_000_000) as p:
                    burn(0.1)
                code = 0 if p.profile.total() else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_script_that_takes_the_signal_back_lives():
    """The default would end the process."""
    script = (
        "import signal, time; from pagealloc.observe import profile\n"
        "with profile('cpu', period_ns=1_000_000) as p:\n"
        "    signal.signal(signal.SIGPROF, signal.SIG_DFL)\n"
        "    while time.thread_time() < 0.5: sum(range(1000))\n"
        "print(p.profile.total() > 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "True\n"


def test_code_of_no_file(monkeypatch):
    """A JIT compiler's is known too: the mappings are not read at each look."""
    code = NativeCode()
    options = {
        "flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS,
        "prot": mmap.PROT_READ | mmap.PROT_EXEC,
    }
    with mmap.mmap(-1, mmap.PAGESIZE, **options) as mapping:
        start = next(
            int(line.split("-")[0], 16)
            for line in Path("/proc/self/maps").read_text().splitlines()
            if "r-x" in line and len(line.split()) == 5
        )
        assert code.pagealloc_frame([start]) is None
        monkeypatch.setattr(code, "refresh", lambda: pytest.fail("read again"))
        assert code.file_at(start) is not None
        assert code.pagealloc_frame([start]) is None
        assert len(mapping) == mmap.PAGESIZE
