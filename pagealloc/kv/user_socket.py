"""Unix sockets that only this user's processes reach.

Purpose
    Listen where nobody else can open the path, and ask the kernel who the other side is.
Invariants
    a socket lies in a folder of this user's with mode 0700, and is 0600
Source
    unix(7): SO_PEERCRED, the length of addresses.
"""

from __future__ import annotations

import os
import socket
import stat
import struct
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["check_peer", "listen", "short_path"]


def listen(path: Path) -> socket.socket:
    """Return a socket that listens at a path nobody else can reach."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    with short_path(path) as (folder, short):
        status = os.fstat(folder)
        if status.st_uid != os.geteuid() or status.st_mode & 0o077:
            mode = stat.S_IMODE(status.st_mode)
            raise PermissionError(
                f"{path.parent}: others may open this folder (mode {mode:04o}); serve from a "
                "folder of your own, chmod 700"
            )
        _remove_dead(path, short)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(short)
            Path(short).chmod(0o600)
            listener.listen()
            listener.setblocking(False)  # noqa: FBT003  its only argument
        except BaseException:
            listener.close()
            raise
    return listener


def _remove_dead(path: Path, short: str) -> None:
    """Remove the socket of an owner that is gone.

    Raises
    ------
    FileExistsError
        Something else is there, or an owner that lives.
    """
    try:
        mode = Path(short).lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise FileExistsError(f"{path} exists, and is no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(short)
        except ConnectionRefusedError:
            Path(short).unlink()
            return
    raise FileExistsError(f"{path}: another process serves there")


@contextmanager
def short_path(path: Path) -> Iterator[tuple[int, str]]:
    """Open a path's folder, and give its descriptor and a name of the path by way of it.

    A socket's address holds 107 bytes, so many a path is too long; and what was checked of the
    folder stays so, whatever becomes of the names above it.
    """
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield folder, f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


def check_peer(connection: socket.socket) -> None:
    """Raise PermissionError unless the other side runs as this user."""
    size = struct.calcsize("3i")
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    _, uid, _ = struct.unpack("3i", credentials)
    if uid != os.geteuid():
        raise PermissionError(f"the other side runs as user {uid}, this one as {os.geteuid()}")
