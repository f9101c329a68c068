"""Every exception pagealloc raises, in one place.

Floor 0: imports nothing of pagealloc.  Misuse (a bad size, a closed handle) is a plain
``ValueError`` or ``TypeError``, a handle still in use is a ``BufferError``; the classes here
are for what a program may want to catch by name.
"""

__all__ = [
    "BackingUnavailableError",
    "CacheFileError",
    "ClosedError",
    "ForkedError",
    "InvariantError",
    "LlamaStateError",
    "OutOfMemoryError",
    "PageBoundaryError",
    "PageallocError",
    "WireError",
]


class PageallocError(Exception):
    """Base of all pagealloc exceptions."""


class OutOfMemoryError(PageallocError, MemoryError):
    """The budget or the kernel refused memory.

    Nothing was handed out and nothing was lost: the allocator or cache stays usable, and the
    message says what was asked, what is held, and what would help.
    """


class BackingUnavailableError(OutOfMemoryError, OSError):
    """The backing asked for by name (``"hugetlb"``, ``"thp"``) cannot be had on this machine.

    Parameters
    ----------
    error : int
        The errno value.
    message : str
        What was asked, why it cannot be had, and what would help.
    """

    def __init__(self, error: int, message: str) -> None:
        super().__init__(error, message)
        # MemoryError comes first among the bases, so OSError has not read its arguments.
        self.errno = error
        self.strerror = message

    def __str__(self) -> str:
        return str(self.args[1])


class PageBoundaryError(PageallocError, IndexError):
    """An access would leave the committed rows of a sequence, or its window."""


class ForkedError(PageallocError, RuntimeError):
    """A KV cache was to be changed in a process that inherited it through ``os.fork()``."""


class ClosedError(PageallocError, ValueError):
    """The handle was used after ``close()``."""


class CacheFileError(PageallocError, ValueError):
    """A file of published KV blocks cannot be used, or a block of it.

    It is truncated, damaged, newer than this version, of another model or owner, or not safe to
    open; the message says which, and names the block.
    """


class LlamaStateError(PageallocError, ValueError):
    """A state of llama.cpp is not what it should be.

    It is truncated, of another model, or of a form that this version does not know; the message
    says which.
    """


class WireError(PageallocError, OSError):
    """Another process that owns published prefixes, or a client of them, cannot be dealt with.

    It hung up, speaks another protocol, has rows of another model or owner, or says what it cannot
    mean.
    """


class InvariantError(PageallocError, AssertionError):
    """``check()`` found a broken invariant: a defect of pagealloc, please report it."""
