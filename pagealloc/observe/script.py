"""A Python script, run in this process as ``python SCRIPT`` would.

Source
    runpy and the command line: https://docs.python.org/3/using/cmdline.html
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

__all__ = ["run_script"]

RUNNERS = (__file__, runpy.run_module.__code__.co_filename)
"""Files of whoever runs a script; calls in them are not the script's."""


def run_script(
    script: str, arguments: Sequence[str], at_end: Callable[[], Any], *, is_module: bool = False
) -> int:
    """Run a script, and something at its end while its variables are still there.

    Parameters
    ----------
    script : str
        File to run, as ``__main__``; with `is_module` the name of a module, as ``python -m``.
    arguments : sequence of str
        What the script finds in ``sys.argv[1:]``.
    at_end : callable
        Called without arguments, also if the script raised or ended itself by ``sys.exit()``, once
        the threads that are no daemons have ended.  Not in a child that the script has forked.
        Called at once on SIGTERM, see below; never twice.
    is_module : bool

    Returns
    -------
    int
        The exit code that ``python SCRIPT`` would have had; what the script raised was printed.

    Raises
    ------
    FileNotFoundError
        There is no such script, or no such module that can be run; `at_end` is not called.  The
        packages that a module lies in were imported then, as ``python -m`` does to look for it.

    Notes
    -----
    SIGTERM ends the process as without us, but `at_end` is called before.  That takes the main
    thread of Python, and the signal's default action: a handler that the script installs replaces
    ours, and children that it forks die at once.  Python runs handlers between two of its own
    instructions, so native code is not interrupted.
    """
    if not is_module and not Path(script).exists():
        raise FileNotFoundError(f"there is no script {script!r}")
    argv, path = sys.argv, list(sys.path)
    pid, threads = os.getpid(), set(threading.enumerate())
    sys.argv = [script, *arguments]
    if not sys.flags.safe_path:
        sys.path[0] = str(Path.cwd() if is_module else Path(script).resolve().parent)
    end = _End(at_end)
    kept: object = None
    code = 0
    is_refused = False
    try:
        end.come_by_sigterm()
        # What the script's globals refer to lives for as long as they are kept.
        if is_module:
            kept = runpy.run_module(script, run_name="__main__", alter_sys=True)
        else:
            kept = runpy.run_path(str(Path(script).absolute()), run_name="__main__")
    except SystemExit as stop:
        kept = stop.__traceback__
        code = _exit_code(stop.code)
    except KeyboardInterrupt as stop:
        kept = stop.__traceback__
        print("interrupted", file=sys.stderr)
        code = 130
    except BaseException as error:  # noqa: BLE001  # the script's own, shown as Python would
        if isinstance(error, ImportError) and _script_stack(error) is None:
            is_refused = True
            raise FileNotFoundError(f"cannot run {script!r}: {error}") from None
        kept = error.__traceback__
        _print_error(error)
        code = 1
    finally:
        try:
            if os.getpid() == pid and not is_refused:
                _wait_and_tell(threads, end)
        finally:
            end.come_no_more_by_sigterm()
            del kept
            sys.argv, sys.path[:] = argv, path
    return code


class _End:
    """The end of a script, told once: when it has run, or before that on SIGTERM.

    Not thread-safe: Python runs handlers of signals in the main thread, where the script runs too.
    """

    def __init__(self, at_end: Callable[[], Any]) -> None:
        self._at_end = at_end
        self._pid = os.getpid()
        self._is_begun = self._is_over = False
        self._is_terminated = False

    def come_by_sigterm(self) -> None:
        """Handle SIGTERM, if this is the main thread and nobody else does."""
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, self._terminate)

    def come_no_more_by_sigterm(self) -> None:
        """Restore the default action, unless somebody has replaced ours."""
        if signal.getsignal(signal.SIGTERM) == self._terminate:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def tell(self) -> None:
        """Have the end told unless it is, or was; die then, if SIGTERM came before or meanwhile."""
        if self._is_begun:
            return
        self._is_begun = True
        try:
            self._at_end()
        except BaseException as error:
            if not self._is_terminated:
                raise
            sys.excepthook(type(error), error, error.__traceback__)
        finally:
            self._is_over = True
            if self._is_terminated:
                _die_by_sigterm()

    def _terminate(self, *_: object) -> None:
        self._is_terminated = True
        if os.getpid() != self._pid or self._is_over:  # handlers survive a fork
            _die_by_sigterm()
        if not self._is_begun:
            _open_output_anew()
        self.tell()


def _open_output_anew() -> None:
    """Have stdout and stderr without the locks that an interrupted print() holds."""
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        with suppress(OSError):  # it is closed
            stream = open(  # noqa: SIM115  # to the end of the process
                descriptor, "w", buffering=1, errors="backslashreplace", closefd=False
            )
            setattr(sys, name, stream)


def _die_by_sigterm() -> None:
    """End the process as SIGTERM does by default; who waits for it sees no difference."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)


def _wait_and_tell(threads_before: set[threading.Thread], end: _End) -> None:
    """Wait for the script's threads, as Python does at exit, and have the end told."""
    try:
        for thread in set(threading.enumerate()) - threads_before:
            if not thread.daemon:
                thread.join()
    finally:
        end.tell()


def _exit_code(code: object) -> int:
    """Return what the process ends with: https://docs.python.org/3/library/sys.html#sys.exit."""
    if code is None or isinstance(code, int):
        return int(code or 0)
    print(code, file=sys.stderr)
    return 1


def _print_error(error: BaseException) -> None:
    """Print a traceback that begins in the script, and leave it where Python does."""
    stack = _script_stack(error)
    sys.last_type, sys.last_value, sys.last_traceback = type(error), error, stack
    sys.excepthook(type(error), error.with_traceback(stack), stack)


def _script_stack(error: BaseException) -> TracebackType | None:
    """Return the traceback from the script on; None if its runners have raised the error."""
    stack = error.__traceback__
    while stack is not None and stack.tb_frame.f_code.co_filename in RUNNERS:
        stack = stack.tb_next
    return stack
