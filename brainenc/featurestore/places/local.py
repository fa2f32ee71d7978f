"""A folder on a local file system: publishing is a hard link, reading is a map, and a flush is a flush.

On a network file system (NFS, SMB, Lustre ...) links and flushes are as good; listings may be old, locks depend on how
it was mounted, and files are read instead of mapped.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from brainenc import atomic
from brainenc.errors import CorruptData, NotAStore, PlaceUnfit
from brainenc.featurestore.places.base import Capabilities, Entry, check_name
from brainenc.featurestore.space import FULL, full_disk_explained
from brainenc.mounts import network_file_system

_PARTIAL = re.compile(r"\.(.+)\.[0-9a-f]{12}\.partial")


class LocalPlace:
    """See :class:`~brainenc.featurestore.places.base.Place`."""

    can = Capabilities(atomic_create=True, real_flush=True, shared_locks=True, fresh_listing=True, mappable=True)

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).absolute()
        self.url = str(self.root)
        if network_file_system(self.root) is not None:
            self.can = _NETWORK

    @classmethod
    def open(cls, root: Path, *, create: bool) -> LocalPlace:
        """The folder, made if it may be, and tried if it may be written to.

        Raises:
            NotAStore: it is not there.
            PlaceUnfit: its file system cannot give a file a name without replacing another.
        """
        place = cls(root)
        if create:
            with full_disk_explained(place.root):
                place._make()
                place._probe()
        elif not place.root.is_dir():
            raise NotAStore(f"{place.url} is no folder: there is no feature store.")
        return place

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        """Bytes of a file."""
        with open(self._path(name), "rb") as file:
            file.seek(start)
            return file.read() if end is None else file.read(max(end - start, 0))

    def size(self, name: str) -> int | None:
        """Bytes of a file, None if there is none."""
        try:
            return self._path(name).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def create(self, name: str, data: bytes) -> bool:
        """Create a small file, unless other bytes are there."""
        path = self._path(name)
        with full_disk_explained(path, len(data)):
            atomic.make_dirs(path.parent)
            return atomic.write_new(path, data) or path.read_bytes() == data

    def publish(self, partial: Path, name: str) -> bool:
        """Give a finished file its name, unless that is taken."""
        with full_disk_explained(partial):
            return atomic.publish_new(partial, self._path(name))

    def partial(self, name: str) -> Path:
        """A private name in the same folder."""
        path = self._path(name)
        with full_disk_explained(path):
            atomic.make_dirs(path.parent)
        return atomic.partial_name(path)

    def partials(self, prefix: str = "") -> Iterator[Path]:
        """Partials of all writers."""
        for path, match in self._walk(prefix, hidden=True):
            if match.startswith(prefix):
                yield path

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """Files whose names begin with the prefix."""
        for path, name in self._walk(prefix, hidden=False):
            with contextlib.suppress(FileNotFoundError):  # removed since the folder was read
                yield Entry(name=name, size=path.stat().st_size)

    def folders(self, prefix: str = "") -> Sequence[str]:
        """Folders directly below."""
        try:
            with os.scandir(self.root / prefix) as entries:
                return sorted(e.name for e in entries if e.is_dir(follow_symlinks=False) and not e.name.startswith("."))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def delete(self, name: str) -> None:
        """Remove a file durably: one that came back after a power cut would be trusted again."""
        path = self._path(name)
        with contextlib.suppress(FileNotFoundError):
            if path.is_dir() and not path.is_symlink():
                _remove_empty(path)
            else:
                path.unlink()
            atomic.fsync_dir(path.parent)

    def local(self, name: str) -> Path | None:
        """Its path."""
        return self._path(name)

    def refresh(self, folder: str) -> None:
        """Change a folder on a network: what the client remembers of it, absent names included, goes then."""
        if self.can.fresh_listing:
            return
        mark = atomic.partial_name(self._path(f"{folder}/refresh"))
        with contextlib.suppress(OSError):  # who may not write here sees it a minute later, and loses nothing
            mark.touch()
            mark.unlink()

    def __reduce__(self) -> tuple[type[LocalPlace], tuple[str]]:
        return LocalPlace, (self.url,)

    def _path(self, name: str) -> Path:
        return self.root / check_name(name)

    def _walk(self, prefix: str, *, hidden: bool) -> Iterator[tuple[Path, str]]:
        """Paths and names of files below the folder ``prefix`` points into, in order of names; no linked folders."""
        folder = prefix.rpartition("/")[0]
        try:
            with os.scandir(self.root / folder) as scan:
                entries = sorted(scan, key=lambda entry: entry.name + "/" * entry.is_dir(follow_symlinks=False))
        except (FileNotFoundError, NotADirectoryError):
            return
        for entry in entries:
            name = f"{folder}/{entry.name}" if folder else entry.name
            if entry.is_symlink() and entry.is_dir():
                continue  # it may lead out of the store, and what tidies up must not
            if entry.is_dir():
                if not entry.name.startswith(".") and (hidden or name.startswith(prefix)):
                    yield from self._walk(name + "/", hidden=hidden)
            elif hidden and (match := _PARTIAL.fullmatch(entry.name)):
                yield Path(entry.path), f"{folder}/{match[1]}" if folder else match[1]
            elif not hidden and not entry.name.startswith(".") and name.startswith(prefix):
                yield Path(entry.path), name

    def _make(self) -> None:
        try:
            atomic.make_dirs(self.root)
        except OSError as error:
            if error.errno in FULL:
                raise
            raise PlaceUnfit(f"{self.url} cannot be made: {error}. Choose another folder.") from error
        if not self.root.is_dir():
            raise PlaceUnfit(f"{self.url} is a file: a feature store is a folder. Choose another name.")

    def _probe(self) -> None:
        probe = self.root / "probe"
        partial, final = atomic.partial_name(probe), atomic.partial_name(probe)
        try:
            partial.touch()
            atomic.publish_new(partial, final)
        except PermissionError as error:
            raise PlaceUnfit(f"{self.url} cannot be written to: {error}. Choose another folder.") from error
        except OSError as error:
            if error.errno in FULL:
                raise
            raise PlaceUnfit(
                f"{self.url} cannot hold a store: its file system gives no file a name without replacing another "
                f"({error}). Use a local disk, or pass stage=True to copy whole files there."
            ) from error
        finally:
            for path in (partial, final):
                with contextlib.suppress(OSError):  # what went wrong before is what there is to say
                    path.unlink()


_NETWORK = Capabilities(
    atomic_create=True, real_flush=True, shared_locks=False, fresh_listing=False, mappable=False, readable=True
)


def _remove_empty(folder: Path) -> None:
    """Remove a folder that stands where a file belongs; what somebody put into it is not ours to remove."""
    try:
        folder.rmdir()
    except OSError as error:
        raise CorruptData(f"{folder} is a folder where a file of the store belongs: move it away.") from error
