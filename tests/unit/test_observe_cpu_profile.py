"""The CPU profiler: CPU time by stack, inside pagealloc marked, its own thread left out."""

import signal
import subprocess
import sys
import threading
import time
import weakref

import pytest

from pagealloc import PageAllocator
from pagealloc.observe import profile
from pagealloc.observe.cpu_profile import CPUProfiler
from pagealloc.observe.native_code import NativeCode

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
    with profile("cpu"), pytest.raises(RuntimeError, match="stop that profile first"):
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
