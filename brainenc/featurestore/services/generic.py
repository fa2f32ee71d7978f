"""Any other fsspec file system: read where it lies; written only where creation is known to be atomic (``memory://``)."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec

from brainenc.featurestore.services.base import ShortRead, Stat, refused
from brainenc.featurestore.services.patience import Patience

_creating = threading.Lock()  # fsspec's memory file system looks first and writes then


class FsspecService:
    """See :class:`~brainenc.featurestore.services.base.ObjectService`. Time limits are the client's own.

    Args:
        fs: the file system.
        root: the store's root in it.
        atomic_create: whether this process is the only one that can write there.
    """

    def __init__(self, fs: Any, root: str, *, atomic_create: bool) -> None:
        self._fs, self._root, self.atomic_create = fs, root.rstrip("/"), atomic_create

    @classmethod
    def open(cls, url: str, patience: Patience) -> FsspecService:
        """Connect as fsspec would."""
        fs, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
        return cls(fs, root, atomic_create=fs.protocol == "memory")

    def put(self, key: str, data: bytes, token: str, limit: float, *, replace: bool = False) -> None:
        """Creation under a lock of this process."""
        path = self._path(key)
        with _creating:
            if not replace and self._fs.exists(path):
                raise FileExistsError(path)
            self._fs.pipe_file(path, data)

    def put_file(self, key: str, path: Path, token: str, limit: float, *, replace: bool = False) -> None:
        """Through memory, where the bytes end anyway."""
        self.put(key, path.read_bytes(), token, limit, replace=replace)

    def refuses(self, key: str, data: bytes, limit: float) -> bool:
        """By the one request; files are put in no other way."""
        return refused(lambda token: self.put(key, data, token, limit))

    def get(self, key: str, start: int, end: int | None, limit: float) -> bytes:
        """Compared with the length that the file system tells."""
        path = self._path(key)
        size = int(self._fs.info(path)["size"])
        stop = size if end is None else min(end, size)
        if stop <= start:
            return b""
        data: bytes = self._fs.cat_file(path, start=start, end=stop)
        if len(data) != stop - start:
            raise ShortRead(f"{key}: {len(data)} bytes came of {stop - start}")
        return data

    def stat(self, key: str, limit: float) -> Stat | None:
        """None also for a folder."""
        try:
            found = self._fs.info(self._path(key))
        except FileNotFoundError:
            return None
        return None if found["type"] == "directory" else Stat(size=int(found["size"]), token=None)

    def entries(self, prefix: str, limit: float) -> Iterator[tuple[str, int]]:
        """By a walk."""
        try:
            found = self._fs.find(self._path(prefix.rpartition("/")[0]), detail=True)
        except FileNotFoundError:
            return
        for path in sorted(found):
            key = path[len(self._root) :].lstrip("/")
            if key.startswith(prefix):
                yield key, int(found[path]["size"])

    def folders(self, prefix: str, limit: float) -> list[str]:
        """Empty where there is nothing."""
        try:
            entries = self._fs.ls(self._path(prefix.rstrip("/")), detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(entry["name"].rstrip("/").rpartition("/")[2] for entry in entries if entry["type"] == "directory")

    def delete(self, key: str, limit: float) -> None:
        """Absent is fine."""
        try:
            self._fs.rm_file(self._path(key))
        except FileNotFoundError:
            return

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}" if key else self._root
