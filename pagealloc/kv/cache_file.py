"""CacheFile: a file of published KV blocks, opened for reading.

Purpose
    Trust nothing that the file says: every number is checked against its size before it is used.
Structure
    Little-endian.  Blocks lie behind the index, so that a truncated file loses its last blocks::

        0               header      HEADER, then the description: JSON of what the rows are
        index_offset    index       a record a block: parent (its number; NO_PARENT: the first of a
                                    prompt), token ids, checksum of these and of its rows
        blocks_offset   blocks      rows as one piece (`block_segments`), each on a page

    A parent has a smaller number than its children.  Checksums are XXH3, 128 bits: they find damage
    by accident.  Nobody but the owner can write the file, which is what opening it checks.
Locking
    Thread-safe: pread only.
Source
    Y. Collet, XXH3 (the package xxhash).
"""

from __future__ import annotations

import errno
import json
import os
import stat
import struct
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np

try:
    import xxhash
except ImportError:  # an extra: what needs it says so
    xxhash = None  # type: ignore[assignment]

from pagealloc.errors import CacheFileError
from pagealloc.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy.typing as npt

    Path = str | os.PathLike[str]

__all__ = [
    "MAGIC",
    "NO_PARENT",
    "VERSION",
    "CacheFile",
    "Header",
    "checksum",
    "is_cache_file",
    "record_dtype",
]

MAGIC = b"PAGEALKV"
VERSION = 1
NO_PARENT = 0xFFFF_FFFF
CHECKSUM_BYTES = 16
MAX_DESCRIPTION_BYTES = 1 << 20
MAX_BLOCK_TOKENS = 1 << 16
MAX_BYTES_AT_ONCE = 1 << 30
MAX_OFFSET = 1 << 50

# magic, version, bytes of the description, block_tokens, blocks, bytes of a block's rows, bytes
# from block to block, offset of the index, of the blocks, checksum of the index, hash of the empty
# prefix, which depends on owner and model, checksum of all before and of the description
HEADER = struct.Struct("<8sIIIIQQQQ16s16s16s")
IOV_MAX = os.sysconf("SC_IOV_MAX")


class Header(NamedTuple):
    """What a file says of itself."""

    block_tokens: int
    n_blocks: int
    block_bytes: int
    block_stride: int
    index_offset: int
    blocks_offset: int
    index_checksum: bytes
    root: bytes
    description: bytes

    def pack(self) -> bytes:
        """Return it as bytes, with its checksum."""
        numbers = self[1:6]
        head = HEADER.pack(
            MAGIC, VERSION, len(self.description), self.block_tokens, *numbers,
            self.index_checksum, self.root, bytes(CHECKSUM_BYTES),
        )[:-CHECKSUM_BYTES]  # fmt: skip
        return head + checksum([head, self.description]) + self.description

    @property
    def file_bytes(self) -> int:
        """How long the file has to be."""
        return self.blocks_offset + self.n_blocks * self.block_stride


def checksum(parts: Iterable[Any]) -> bytes:
    """Return the checksum of some buffers, one behind the other.

    Raises
    ------
    ImportError
        The package xxhash is not installed.
    """
    if xxhash is None:
        raise ImportError("files of KV blocks carry XXH3 checksums: pip install 'pagealloc[disk]'")
    state = xxhash.xxh3_128()
    for part in parts:
        state.update(part)
    digest: bytes = state.digest()
    return digest


def record_dtype(block_tokens: int) -> np.dtype[Any]:
    """Return the type of a record of the index."""
    return np.dtype(
        [
            ("parent", "<u4"),
            ("tokens", "<i4", (block_tokens,)),
            ("checksum", np.uint8, (CHECKSUM_BYTES,)),
        ]
    )


class CacheFile:
    """A file of published blocks; closed when nobody refers to it.

    Parameters
    ----------
    path : path
        Where it is: a regular file of this user's that nobody else may read or write, and no
        symbolic link.

    Raises
    ------
    CacheFileError
        It is none, or not safe to open, or its header or index is damaged.
    OSError
        It cannot be opened or read.
    """

    def __init__(self, path: Path) -> None:
        self._fd = -1
        self.path = os.fspath(path)
        self._fd = _open(self.path)
        self.nbytes = os.fstat(self._fd).st_size
        self.header = self._read_header()
        self.records = self._read_index()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close it.  A second call does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def description(self) -> dict[str, Any]:
        """What the rows are, and the cache they came from."""
        try:
            found = json.loads(self.header.description)
        except (ValueError, RecursionError) as error:
            raise self._error("its description is no JSON") from error
        if not isinstance(found, dict):
            raise self._error("its description is no JSON object")
        return found

    def tokens(self, block: int) -> bytes:
        """Return a block's token ids, as `prefix_hash.token_bytes`."""
        tokens: npt.NDArray[np.int32] = self.records["tokens"][block]
        return tokens.tobytes()

    def parents(self) -> list[int]:
        """Return the number of each block's parent, -1 if it has none."""
        parents = self.records["parent"].astype(np.int64)
        parents[parents == NO_PARENT] = -1
        return [int(parent) for parent in parents]

    def place(self, block: int) -> str:
        """Return which block this is, for messages."""
        return f"block {block} of {self.header.n_blocks}"

    def has(self, block: int) -> bool:
        """Whether the file is long enough for a block."""
        header = self.header
        end = header.blocks_offset + block * header.block_stride + header.block_bytes
        return end <= self.nbytes

    def read(self, block: int, buffers: list[memoryview]) -> None:
        """Read the rows of a block into buffers, as long together, and verify what is there then.

        Raises
        ------
        CacheFileError
            The rows are not those that were saved, or are not all there.
        OSError
            The file cannot be read.
        """
        header = self.header
        offset = header.blocks_offset + block * header.block_stride
        n_read = _read_all(self._fd, buffers, offset)
        if n_read < header.block_bytes:
            raise self._error(
                f"{self.place(block)} is truncated: the file ends after {self.nbytes} bytes, the "
                f"block at {offset + header.block_bytes}"
            )
        record = self.records[block].tobytes()
        head, digest = record[:-CHECKSUM_BYTES], record[-CHECKSUM_BYTES:]
        if checksum([head, *buffers]) != digest:
            raise self._error(
                f"{self.place(block)}, {format_bytes(header.block_bytes)} at byte {offset}, is "
                "damaged: its rows and tokens do not match their checksum"
            )

    def check_length(self) -> None:
        """Raise CacheFileError if the file ends before its last block does, and name the first."""
        if self.nbytes >= self.header.file_bytes or not self.header.n_blocks:
            return
        lost = next((i for i in range(self.header.n_blocks) if not self.has(i)), None)
        if lost is not None:
            raise self._error(
                f"it is truncated: {self.nbytes} of {self.header.file_bytes} bytes are there, from "
                f"{self.place(lost)} on nothing is left; on_error='skip' uses the others"
            )

    def _read_header(self) -> Header:
        data = os.pread(self._fd, HEADER.size, 0)
        if len(data) < HEADER.size or data[: len(MAGIC)] != MAGIC:
            raise self._error("it is no file of KV blocks that pagealloc saved")
        found = HEADER.unpack(data)
        version, n_description = found[1:3]
        if version > VERSION:
            raise self._error(
                f"it was saved by a newer pagealloc: its format is {version}, this one reads up to "
                f"{VERSION}"
            )
        if n_description > MAX_DESCRIPTION_BYTES:
            raise self._error(f"its header is damaged: a description of {n_description} bytes")
        description = os.pread(self._fd, n_description, HEADER.size)
        if checksum([data[:-CHECKSUM_BYTES], description]) != data[-CHECKSUM_BYTES:]:
            raise self._error("its header is damaged: it does not match its checksum")
        header = Header._make([*found[3:-1], description])
        self._check_bounds(header, version)
        return header

    def _check_bounds(self, header: Header, version: int) -> None:
        """Numbers that would be impossible: whoever wrote the checksum was wrong, or not honest."""
        record_bytes = record_dtype(min(header.block_tokens, MAX_BLOCK_TOKENS)).itemsize
        index_bytes = header.n_blocks * record_bytes
        if (
            version < 1
            or not 1 <= header.block_tokens <= MAX_BLOCK_TOKENS
            or index_bytes > MAX_BYTES_AT_ONCE
            or not 1 <= header.block_bytes <= header.block_stride <= MAX_BYTES_AT_ONCE
            or not HEADER.size <= header.index_offset <= MAX_OFFSET
            or not header.index_offset + index_bytes <= header.blocks_offset <= MAX_OFFSET
        ):
            raise self._error("its header is damaged: it says what is impossible")

    def _read_index(self) -> npt.NDArray[Any]:
        header = self.header
        dtype = record_dtype(header.block_tokens)
        nbytes = header.n_blocks * dtype.itemsize
        if header.index_offset + nbytes > min(self.nbytes, header.blocks_offset):
            raise self._error(
                f"it is truncated: {self.nbytes} bytes are there, its index alone ends at "
                f"{header.index_offset + nbytes}"
            )
        data = bytearray(nbytes)
        if _read_all(self._fd, [memoryview(data)], header.index_offset) < nbytes:
            raise self._error("it is truncated within its index")
        if checksum([data]) != header.index_checksum:
            raise self._error("its index is damaged: it does not match its checksum")
        records = np.frombuffer(data, dtype)
        parents = records["parent"].astype(np.int64)
        numbers = np.arange(header.n_blocks)
        is_wrong = (parents >= numbers) & (parents != NO_PARENT)
        if is_wrong.any() or (records["tokens"] < 0).any():
            raise self._error("its index is damaged: it says what is impossible")
        return records

    def _error(self, what: str) -> CacheFileError:
        return CacheFileError(f"{self.path}: {what}")


def is_cache_file(path: Path) -> bool:
    """Whether a file begins as one of KV blocks does; false for what cannot be read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        return os.pread(fd, len(MAGIC), 0) == MAGIC
    except OSError:
        return False
    finally:
        os.close(fd)


def _open(path: str) -> int:
    """Open a file that is safe to read: nobody else's, and nobody else can have written it."""
    try:
        # O_NONBLOCK: opening a FIFO would wait for its writer.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise CacheFileError(f"{path}: it is a symbolic link; name the file itself") from error
        raise
    status = os.fstat(fd)
    reason = ""
    if not stat.S_ISREG(status.st_mode):
        reason = "it is no regular file"
    elif status.st_uid != os.geteuid():
        reason = f"it belongs to user {status.st_uid}, not to this one, {os.geteuid()}"
    elif status.st_mode & 0o077:
        mode = stat.S_IMODE(status.st_mode)
        reason = f"others may open it (mode {mode:04o}): chmod 600 it, if nobody else wrote it"
    if reason:
        os.close(fd)
        raise CacheFileError(f"{path}: {reason}")
    return fd


def _read_all(fd: int, buffers: list[memoryview], offset: int) -> int:
    """Fill buffers, of at most 1 GiB, from an offset on; return how many bytes there were."""
    n_read = 0
    for first in range(0, len(buffers), IOV_MAX):
        some = buffers[first : first + IOV_MAX]
        n_some = os.preadv(fd, some, offset + n_read)
        n_read += n_some
        if n_some < sum(len(buffer) for buffer in some):  # Linux is short at the end only
            break
    return n_read
