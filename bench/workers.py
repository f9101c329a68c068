"""Processes that do the measured work: one for pagealloc, one for each peer.

``driver.c`` is compiled twice, into an executable for the peers and into a shared library that
``worker.py`` loads into a Python process for pagealloc.  Both obey the same commands on stdin.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self

from bench.installed import environment
from bench.peers import PEERS, Peer

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "OURS",
    "Drivers",
    "Worker",
    "WorkerError",
    "compile_drivers",
    "peer_versions",
    "require_compiler",
    "workers",
]

BENCH = Path(__file__).resolve().parent
OURS = "pagealloc"


class WorkerError(RuntimeError):
    """A worker could not be built or started, or could not do its work."""


class Drivers:
    """The two compiled drivers, in a folder of their own.

    Attributes
    ----------
    executable : Path
        For the peers.
    library : Path or None
        For pagealloc; None: the pagealloc that is installed has no C API.
    """

    def __init__(self, folder: Path) -> None:
        self.executable = folder / "driver"
        compile_driver(self.executable, [])
        self.library: Path | None = None
        include = include_folder()
        if include is not None:
            self.library = folder / "driver.so"
            flags = ["-shared", "-fPIC", "-fvisibility=hidden", "-DBENCH_OURS", f"-I{include}"]
            compile_driver(self.library, [*flags, f"-I{sysconfig.get_path('include')}"])


def require_compiler() -> None:
    """End the command where the driver cannot be compiled."""
    if shutil.which("gcc") is None:
        sys.exit("bench/driver.c needs gcc: install the Debian package gcc")


def include_folder() -> str | None:
    """Return where pagealloc's header is."""
    import pagealloc

    get_include = getattr(pagealloc, "get_include", None)
    return None if get_include is None else str(get_include())


def compile_driver(target: Path, flags: list[str]) -> None:
    source = str(BENCH / "driver.c")
    command = ["gcc", "-std=gnu11", "-O2", "-Wall", "-D_GNU_SOURCE", "-pthread", *flags]
    command += ["-o", str(target), source, "-lm", "-ldl"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise WorkerError(f"{' '.join(command)}\n{result.stderr}")


@contextlib.contextmanager
def compile_drivers() -> Iterator[Drivers]:
    """Compile both drivers; they are deleted at the end."""
    with tempfile.TemporaryDirectory(prefix="pagealloc-bench-") as folder:
        yield Drivers(Path(folder))


class Worker:
    """One process, and the allocator in it.

    Parameters
    ----------
    name : str
        The allocator's.
    command : list of str
        What is run.
    environment : dict of str
        In which environment.
    """

    def __init__(self, name: str, command: list[str], environment: dict[str, str]) -> None:
        self.name = name
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.stdin: IO[str] = self.process.stdin
        self.stdout: IO[str] = self.process.stdout

    @classmethod
    def of_peer(cls, peer: Peer, drivers: Drivers, under: tuple[str, ...] = ()) -> Self:
        """Start a process that allocates from a peer; `under`: a command that runs it."""
        return cls(peer.name, [*under, str(drivers.executable)], peer.environment())

    @classmethod
    def of_ours(
        cls, drivers: Drivers, under: tuple[str, ...] = (), settings: tuple[str, ...] = ()
    ) -> Self:
        """Start a process that allocates from the pagealloc imported here.

        `under` is as above; `settings` are those of the allocator, such as ``"time_every=0"``.
        """
        import pagealloc

        if drivers.library is None:
            raise WorkerError(
                f"pagealloc {pagealloc.__version__} has no C API (pagealloc.get_include), "
                "through which the driver would allocate: install a later one"
            )
        command = [sys.executable, str(BENCH / "worker.py"), str(drivers.library), *settings]
        return cls(OURS, [*under, *command], environment())

    def ask(self, work: str, *numbers: int) -> dict[str, Any]:
        """Have one work done.

        Parameters
        ----------
        work : str
            As `answer` in ``driver.c`` names them.
        *numbers : int
            Up to three; what they mean is up to the work.

        Raises
        ------
        WorkerError
            The process has died, or its allocator has refused a block.
        """
        a, b, c = (*numbers, 0, 0, 0)[:3]
        try:
            self.stdin.write(f"{work} {a} {b} {c}\n")
            self.stdin.flush()
            line = self.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerError(f"{self.name}: died, code {self.process.wait()}, asked for {work}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"{self.name}: {work} {a} {b} {c}: {answer['error']}")
        return answer

    def close(self) -> None:
        """End the process, and wait for it."""
        with contextlib.suppress(BrokenPipeError):
            self.stdin.close()
        self.stdout.close()
        self.process.wait()


@contextlib.contextmanager
def workers(
    drivers: Drivers, *, peers: tuple[Peer, ...] = PEERS, ours: bool = True
) -> Iterator[dict[str, Worker]]:
    """Start a process for pagealloc and for each peer that is installed."""
    started: dict[str, Worker] = {}
    try:
        if ours:
            started[OURS] = Worker.of_ours(drivers)
        for peer in peers:
            if peer.is_installed():
                started[peer.name] = Worker.of_peer(peer, drivers)
                library = started[peer.name].ask("identity")["library"]
                if peer.soname.partition(".so")[0] not in library:
                    raise WorkerError(f"{peer.name}: preloaded, but {library} allocates")
        yield started
    finally:
        for worker in started.values():
            worker.close()


def peer_versions(drivers: Drivers) -> dict[str, str]:
    """Return what each peer says of itself."""
    with workers(drivers, ours=False) as everyone:
        said = {name: worker.ask("identity")["version"] for name, worker in everyone.items()}
    return {
        name: said.get(name, "missing").partition("-")[0] for name in (peer.name for peer in PEERS)
    }
