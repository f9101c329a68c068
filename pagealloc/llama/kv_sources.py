"""KVSources: where the KV caches of a `PageCache` come from, and are left.

Purpose
    A file for each model's blocks, from one start of a program to the next; a socket for each, at
    which other processes find them.
Structure
    Both are folders, with an entry named by the model and how its rows are stored::

        path/      0123...cdef.kv         written by `save`
        socket/    0123...cdef.sock       served by the owner, looked at by clients
Locking
    The cache's lock, which its callers hold.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pagealloc import CacheFileError, WireError
from pagealloc.kv import KVCache

if TYPE_CHECKING:
    import os

    from pagealloc.kv import KVLayout

__all__ = ["KVSources"]


class KVSources:
    """Makes KV caches by name.

    Parameters
    ----------
    path : path, optional
        Folder of files; made if it is missing.
    owner : path, optional
        Folder of sockets at which another process serves.

    Raises
    ------
    ModuleNotFoundError
        Files take the package xxhash (``pagealloc[disk]``).
    OSError
        The folder of files cannot be made.
    """

    def __init__(
        self, path: str | os.PathLike[str] | None, owner: str | os.PathLike[str] | None
    ) -> None:
        self.path = None if path is None else Path(path)
        self._owner = None if owner is None else Path(owner)
        self._served: Path | None = None
        self._joined: set[str] = set()
        if self.path is not None:
            _require_xxhash()
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)

    def new(self, name: str, layout: KVLayout, options: dict[str, Any]) -> KVCache:
        """Return the KV cache of a name: another process's, a file's, or a new one."""
        cache = self._attached(name, options) or self._loaded(name, layout, options)
        cache = cache or KVCache(layout, **options)
        if self._served is not None:
            cache.serve(self._socket(self._served, name))
        return cache

    def may_join(self, name: str) -> bool:
        """Whether another process serves this name, which it did not when the cache was made."""
        return (
            self._owner is not None
            and name not in self._joined
            and self._socket(self._owner, name).exists()
        )

    def serve(self, folder: str | os.PathLike[str], caches: dict[str, KVCache]) -> None:
        """Serve these, and all that are made from now on."""
        served = Path(folder)
        served.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name, cache in caches.items():
            cache.serve(self._socket(served, name))
        self._served = served

    def save(self, caches: dict[str, KVCache]) -> int:
        """Write all to their files; return how many blocks that were."""
        if self.path is None:
            raise ValueError("where to?  Give PageCache(path=) a folder")
        return sum(cache.save(self.path / f"{name}.kv") for name, cache in caches.items())

    def _attached(self, name: str, options: dict[str, Any]) -> KVCache | None:
        if self._owner is None or not self.may_join(name):
            return None
        self._joined.add(name)  # also if it fails: it is told once
        # How rows are stored is the owner's to say.
        own = {key: options[key] for key in ("budget_bytes", "salt", "model")}
        try:
            return KVCache.attach(self._socket(self._owner, name), **own)
        except (OSError, WireError) as error:
            warnings.warn(f"prompts of {self._owner}: {error}", RuntimeWarning, stacklevel=2)
            return None

    def _loaded(self, name: str, layout: KVLayout, options: dict[str, Any]) -> KVCache | None:
        if self.path is None or not (self.path / f"{name}.kv").exists():
            return None
        try:
            return KVCache.load(self.path / f"{name}.kv", layout, on_error="skip", **options)
        except (OSError, CacheFileError) as error:
            warnings.warn(f"saved prompts are not used: {error}", RuntimeWarning, stacklevel=2)
            return None

    @staticmethod
    def _socket(folder: Path, name: str) -> Path:
        return folder / f"{name}.sock"


def _require_xxhash() -> None:
    try:
        import xxhash  # noqa: F401  # whether it is there
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "PageCache(path=) needs the package xxhash: pip install 'pagealloc[disk]'",
            name="xxhash",
        ) from error
