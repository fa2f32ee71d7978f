"""Verified copies of remote shards in a local folder of bounded size, shared by the processes of a host.

    <folder>/<32 hex digits>                 a copy, complete and verified when it got this name
    <folder>/<32 hex digits>.<id>.filling    on its way: space reserved, `flock` held by the process that fills it
    <folder>/locks/00 ... 3f                 who fills which (by hash); locks/room: who counts and evicts

Whatever dies, nothing but a whole and verified copy ever has a final name, and what a dead process was filling is
told by its lock being free. The budget counts copies and reservations of all processes together.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from brainenc.atomic import fsync_dir
from brainenc.errors import CacheTooSmall, CorruptData, NoSpace
from brainenc.featurestore.download import download
from brainenc.featurestore.places.base import Place
from brainenc.featurestore.places.scratch import cache_root
from brainenc.units import format_bytes, parse_bytes

_STRIPES = 64
_TRIES = 4
_FULL = (errno.ENOSPC, errno.EDQUOT)


def open_cache(folder: Path | None = None, budget: int | str | None = None) -> DiskCache:
    """The cache of this folder; see :class:`DiskCache`."""
    return DiskCache(folder, budget)


class DiskCache:
    """See :class:`~brainenc.featurestore.places.base.ShardCache`. Any process and thread of a host may share a folder.

    Args:
        folder: on a local disk; ``$BRAINENC_CACHE/shards``, else ``~/.cache/brainenc/shards``.
        budget: bytes, ``"20GB"``, or None for half of what the disk has free (what the cache holds counted as free).

    Raises:
        UsageError: the budget is no size.
    """

    def __init__(self, folder: Path | None = None, budget: int | str | None = None) -> None:
        self.folder = Path(folder) if folder is not None else cache_root() / "shards"
        (self.folder / "locks").mkdir(parents=True, exist_ok=True)
        self.budget = parse_bytes(budget) if budget is not None else self._half_of_free()
        self._seen: set[tuple[str, int, int]] = set()

    def __reduce__(self) -> tuple[type[DiskCache], tuple[Path, int]]:
        return DiskCache, (self.folder, self.budget)  # what this process has verified, another has not

    def fetch(self, place: Place, name: str, *, size: int, check: Callable[[Path], None]) -> Path:
        """A verified copy; see :meth:`~brainenc.featurestore.places.base.ShardCache.fetch`.

        A copy that was there is verified once by every process that comes to use it, a new one when it is filled.
        """
        if size > self.budget:
            raise CacheTooSmall(size, self.budget, place.url)
        entry = self.folder / hashlib.sha256(f"{place.url}\0{name}\0{size}".encode()).hexdigest()[:32]
        if self._ready(entry, size, check):
            return entry
        with self._lock(f"{int(entry.name[:4], 16) % _STRIPES:02x}"):
            if not self._ready(entry, size, check):  # else another filled it while we waited
                self._fill(place, name, entry, size, check)
        return entry

    def used(self) -> int:
        """Bytes of copies and reservations."""
        return sum(size for _, size, _ in self._files())

    def evict(self, keep: int = 0) -> int:
        """Remove the least recently used copies until at most ``keep`` bytes stay; returns the bytes removed."""
        with self._lock("room"):
            return self._make_room(max(0, keep))

    # ---- copies

    def _ready(self, entry: Path, size: int, check: Callable[[Path], None]) -> bool:
        try:
            found = entry.stat()
            mark = (entry.name, found.st_ino, found.st_mtime_ns)
            if found.st_size != size or (mark not in self._seen and not self._accepts(entry, check)):
                entry.unlink(missing_ok=True)
                return False
            os.utime(entry, ns=(time.time_ns(), found.st_mtime_ns))  # the access time is our order of use
        except FileNotFoundError:  # evicted under our hands
            return False
        self._seen.add(mark)
        return True

    @staticmethod
    def _accepts(entry: Path, check: Callable[[Path], None]) -> bool:
        try:
            check(entry)
        except CorruptData:
            return False
        return True

    def _fill(self, place: Place, name: str, entry: Path, size: int, check: Callable[[Path], None]) -> None:
        filling = entry.with_name(f"{entry.name}.{secrets.token_hex(4)}.filling")
        fd = self._reserve(filling, size)
        try:
            _download_checked(place, name, filling, fd, size, check)
            os.fsync(fd)  # a power cut must not leave a whole-looking file of zeros under its final name
            found = os.fstat(fd)
            os.replace(filling, entry)
            fsync_dir(self.folder)
            self._seen.add((entry.name, found.st_ino, found.st_mtime_ns))
        except BaseException:
            filling.unlink(missing_ok=True)
            raise
        finally:
            os.close(fd)

    # ---- room

    def _reserve(self, filling: Path, size: int) -> int:
        """Create the file to fill, its space allocated and its lock held."""
        while True:
            with self._lock("room"):
                self._make_room(self.budget - size)
                if self.used() + size <= self.budget:
                    return self._allocate(filling, size)
            time.sleep(0.02)  # others fill: theirs become copies, which can be evicted

    def _allocate(self, filling: Path, size: int) -> int:
        fd = os.open(filling, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            while True:
                try:
                    if hasattr(os, "posix_fallocate"):
                        os.posix_fallocate(fd, 0, max(1, size))
                    os.ftruncate(fd, size)
                    return fd
                except OSError as error:
                    if error.errno not in _FULL:
                        raise
                    os.ftruncate(fd, 0)
                if not self._make_room(max(0, self.used() - max(size, 1))):
                    raise NoSpace(
                        f"{self.folder} has no {format_bytes(size)} free for a copy of a shard, and nothing of the "
                        "cache is left to remove. Make space, or put the cache elsewhere ($BRAINENC_CACHE)."
                    )
        except BaseException:
            os.close(fd)
            filling.unlink(missing_ok=True)
            raise

    def _make_room(self, keep: int) -> int:
        """Remove what dead processes left, then least recently used copies. Needs the lock ``room``."""
        removed, copies, total = 0, [], 0
        for path, size, used_ns in self._files():
            if path.suffix == ".filling":
                if _abandoned(path):
                    path.unlink(missing_ok=True)
                    removed += size
                    continue
            else:
                copies.append((used_ns, size, path))
            total += size
        for _, size, path in sorted(copies):
            if total <= keep:
                break
            path.unlink(missing_ok=True)  # who has it mapped goes on reading; the disk is freed when they let go
            total, removed = total - size, removed + size
        return removed

    def _files(self) -> Iterator[tuple[Path, int, int]]:
        """Path, bytes and time of last use of every copy and reservation."""
        with os.scandir(self.folder) as found:
            for item in found:
                with contextlib.suppress(FileNotFoundError):
                    if item.is_file(follow_symlinks=False):
                        status = item.stat(follow_symlinks=False)
                        yield Path(item.path), status.st_size, status.st_atime_ns

    def _half_of_free(self) -> int:
        return (shutil.disk_usage(self.folder).free + self.used()) // 2

    @contextlib.contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        """Exclude all other threads and processes of this host. Lock files stay: removing them would be a race."""
        fd = os.open(self.folder / "locks" / name, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)


def _abandoned(filling: Path) -> bool:
    """Whether nobody alive holds the lock on a reservation."""
    try:
        fd = os.open(filling, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(fd)


def _download_checked(
    place: Place, name: str, filling: Path, fd: int, size: int, check: Callable[[Path], None]
) -> None:
    problem: CorruptData | None = None
    for _ in range(_TRIES):
        download(place, name, fd, size)
        try:
            return check(filling)
        except CorruptData as error:
            problem = error
    raise CorruptData(
        f"{place.url}/{name} does not match its checksums, fetched {_TRIES} times ({problem}). Run `brainenc store "
        "verify` and `brainenc store repair` there."
    )
