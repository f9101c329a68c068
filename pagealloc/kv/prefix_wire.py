"""What an owner of published prefixes and its clients say to each other over a Unix socket.

Purpose
    Trust nothing that comes from the other side: every length, count and offset is checked before
    it is used, and both sides are the same user's, by what the kernel says of the peer.
Structure
    Little-endian messages, HEADER and a payload::

        client -> owner   CLIENT   the name of owner and model, see `prefix_hash`
        owner -> client   OWNER    version, page_bytes, window_bytes, hash of the empty prefix, and
                                   the description (JSON); with the memory file's descriptor, open
                                   for reading only
        client -> owner   FIND     token ids
        owner -> client   FOUND    number of the lease, tokens, then runs of pages: offset in a
                                   window, offset in the file, bytes
        client -> owner   RELEASE  number of a lease
        owner -> client   REFUSED  why, before it hangs up

    A client that hangs up, or dies, gives all its leases back.
Source
    unix(7): SCM_RIGHTS.
"""

from __future__ import annotations

import array
import os
import socket
import struct
from typing import NamedTuple

from pagealloc.errors import WireError
from pagealloc.kv.prefix_hash import HASH_BYTES

__all__ = [
    "CLIENT",
    "FIND",
    "FOUND",
    "MAX_PAYLOAD_BYTES",
    "OWNER",
    "REFUSED",
    "RELEASE",
    "VERSION",
    "HungUpError",
    "Message",
    "Owner",
    "Reader",
    "Run",
    "pack_found",
    "pack_message",
    "pack_owner",
    "receive",
    "receive_owner",
    "unpack_found",
    "unpack_owner",
]

VERSION = 1
HEADER = struct.Struct("<4sII")  # magic, kind, bytes of the payload
MAGIC = b"PAKV"
CLIENT, OWNER, FIND, FOUND, RELEASE, REFUSED = range(1, 7)
OWNER_FIELDS = struct.Struct(f"<IIQ{HASH_BYTES}s")
FOUND_NUMBERS = struct.Struct("<QQI")
RUN = struct.Struct("<QQQ")
MAX_PAYLOAD_BYTES = 1 << 26


class HungUpError(WireError):
    """The other side closed the connection, or died."""


class Message(NamedTuple):
    """What came, and the descriptor that came along, -1 if none did."""

    kind: int
    payload: bytes
    fd: int = -1


class Owner(NamedTuple):
    """What an owner says of itself."""

    page_bytes: int
    window_bytes: int
    root_key: bytes
    """Hash of the empty prefix: which kind of rows, model and salt."""
    description: bytes


class Run(NamedTuple):
    """Pages of a prefix: where in a window, where in the owner's file."""

    offset: int
    file_offset: int
    nbytes: int


def pack_message(kind: int, payload: bytes = b"") -> bytes:
    """Return a message as bytes."""
    return HEADER.pack(MAGIC, kind, len(payload)) + payload


def pack_owner(owner: Owner) -> bytes:
    """Return the payload of OWNER."""
    numbers = VERSION, owner.page_bytes, owner.window_bytes
    return OWNER_FIELDS.pack(*numbers, owner.root_key) + owner.description


def receive_owner(connection: socket.socket) -> tuple[Owner, int]:
    """Wait for OWNER, and return what it says, and its file's descriptor."""
    message = receive(connection)
    if message.kind != OWNER or message.fd < 0:
        raise WireError("no owner of prefixes serves there")
    try:
        return unpack_owner(message.payload), message.fd
    except WireError:
        os.close(message.fd)
        raise


def unpack_owner(payload: bytes) -> Owner:
    """Return what the payload of OWNER says."""
    if len(payload) < OWNER_FIELDS.size:
        raise WireError("the owner's greeting is too short")
    version, page_bytes, window_bytes, root_key = OWNER_FIELDS.unpack_from(payload)
    if version != VERSION:
        raise WireError(f"the owner speaks version {version} of the protocol, this one {VERSION}")
    return Owner(page_bytes, window_bytes, root_key, payload[OWNER_FIELDS.size :])


def pack_found(lease: int, n_tokens: int, runs: list[Run]) -> bytes:
    """Return the payload of FOUND."""
    return FOUND_NUMBERS.pack(lease, n_tokens, len(runs)) + b"".join(RUN.pack(*run) for run in runs)


def unpack_found(
    payload: bytes, page_bytes: int, window_bytes: int, file_bytes: int
) -> tuple[int, int, list[Run]]:
    """Return lease, tokens and runs of FOUND: whole pages that follow each other in the window."""
    if len(payload) < FOUND_NUMBERS.size:
        raise WireError("an answer is too short")
    lease, n_tokens, n_runs = FOUND_NUMBERS.unpack_from(payload)
    if len(payload) != FOUND_NUMBERS.size + n_runs * RUN.size:
        raise WireError(f"an answer of {len(payload)} bytes says that it has {n_runs} runs")
    runs = [Run(*numbers) for numbers in RUN.iter_unpack(payload[FOUND_NUMBERS.size :])]
    end = 0
    for run in runs:
        if any(number % page_bytes for number in run) or not run.nbytes or run.offset < end:
            raise WireError(f"{run} is no run of whole pages that follows the others")
        end = run.offset + run.nbytes
        if end > window_bytes or run.file_offset + run.nbytes > file_bytes:
            raise WireError(f"{run} leaves the window of {window_bytes} or file of {file_bytes}")
    return lease, n_tokens, runs


class Reader:
    """Puts messages together from pieces as they come."""

    __slots__ = ("_data",)

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> list[Message]:
        """Return the messages that are complete now.

        Raises
        ------
        WireError
            This is none, or one too long.
        """
        self._data += data
        found = []
        while len(self._data) >= HEADER.size:
            magic, kind, nbytes = HEADER.unpack_from(self._data)
            if magic != MAGIC or nbytes > MAX_PAYLOAD_BYTES:
                raise WireError("this is no message")
            end = HEADER.size + nbytes
            if len(self._data) < end:
                break
            found.append(Message(kind, bytes(self._data[HEADER.size : end])))
            del self._data[:end]
        return found


def receive(connection: socket.socket) -> Message:
    """Wait for one message, and for the descriptor that comes with OWNER.

    Raises
    ------
    WireError
        The other side hung up, or this is no message.
    OSError
        It takes longer than the socket's timeout.
    """
    fds: list[int] = []
    try:
        data = _exactly(connection, HEADER.size, fds)
        magic, kind, nbytes = HEADER.unpack(data)
        if magic != MAGIC or nbytes > MAX_PAYLOAD_BYTES:
            raise WireError("this is no message")
        payload = _exactly(connection, nbytes, fds)
        if kind == REFUSED:
            raise WireError(payload.decode(errors="replace"))
        fd = fds.pop(0) if fds and kind == OWNER else -1
        return Message(kind, payload, fd)
    finally:
        for fd in fds:
            os.close(fd)


def _exactly(connection: socket.socket, nbytes: int, fds: list[int]) -> bytes:
    data = bytearray()
    while len(data) < nbytes:
        space = socket.CMSG_LEN(array.array("i").itemsize)
        piece, ancillary, _, _ = connection.recvmsg(
            min(nbytes - len(data), 1 << 16), space, socket.MSG_CMSG_CLOEXEC
        )
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                numbers = array.array("i")
                numbers.frombytes(content[: len(content) - len(content) % numbers.itemsize])
                fds += numbers
        if not piece:
            raise HungUpError("the other side hung up")
        data += piece
    return bytes(data)
