"""A store on a mounted drive (Google Drive in Colab, or any FUSE mount): written aside, handed over whole.

What such a mount says of a file is what its cache holds. `fsync` and `rename` return before anything has left the
machine, listings are stale, there are no links and no locks between machines, and an I/O error under a memory map
kills the process. So files are made on local disk, copied whole, read by plain reads, and count as *staged* until a
later run, through another mount, has read them back.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from brainenc.atomic import partial_name
from brainenc.errors import NoSpace, NotAStore, PlaceUnfit
from brainenc.featurestore.places.base import Capabilities, Entry, check_name
from brainenc.featurestore.places.scratch import Scratch, cache_root
from brainenc.featurestore.services.base import ShortRead
from brainenc.featurestore.services.patience import Patience
from brainenc.mounts import mount_of

_COLAB_DRIVE = Path("/content/drive")
_LOCAL_FUSE = {"fuse.fuse-overlayfs", "fuse.lxcfs", "fusectl"}  # a container's own disk, not a drive behind a network
_LEDGER = ".brainenc-confirmed"
STAGED_MARK = ".brainenc-staged"
"""Lies in a folder that no mount gives away, and that somebody asked to have treated as one: readers need no flag."""
_COPY = 8 * 2**20
_FULL = (errno.ENOSPC, errno.EDQUOT)
_Names = list[str]  # inside the class `list` is the method


def needs_staging(path: Path, *, mountinfo: Path | None = None) -> bool:
    """Whether a folder (or the place where it would be made) lies on a FUSE mount or on Colab's Drive."""
    real = Path(os.path.realpath(path))
    if real == _COLAB_DRIVE or _COLAB_DRIVE in real.parents:
        return True
    found = mount_of(real, mountinfo)
    return found is not None and found[1].startswith("fuse") and found[1] not in _LOCAL_FUSE


class MountPlace:
    """See :class:`~brainenc.featurestore.places.base.Place`. One machine writes at a time; its processes may be many.

    Args:
        root: the store's folder on the mount.
        patience: how long reads that fail are tried again.
    """

    can = Capabilities(atomic_create=False, real_flush=False, shared_locks=False, fresh_listing=False, mappable=False)

    def __init__(self, root: Path, *, patience: Patience | None = None) -> None:
        self._root = Path(os.path.abspath(root))
        self.url = str(self._root)
        self._patience = patience or Patience(deadline_s=60.0)
        self._scratch = Scratch(self.url)
        self._handed = cache_root() / "handed" / _session(self._root)
        self._confirmed: set[str] | None = None

    @classmethod
    def open(cls, root: Path, *, create: bool = False) -> MountPlace:
        """Open a folder.

        Raises:
            NotAStore: it is not there and ``create`` is false.
            PlaceUnfit: it is a file, or cannot be made.
        """
        if create:
            try:
                root.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise PlaceUnfit(f"{root} cannot be made a store's folder: {error}. Choose another name.") from error
        if not root.is_dir():
            raise NotAStore(f"There is no folder {root}. Is the drive mounted? It would be made with create=True.")
        return cls(root)

    def __reduce__(self) -> tuple[Any, ...]:
        return MountPlace, (self._root,)

    # ---- reading

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        """See :meth:`~brainenc.featurestore.places.base.Place.read`. Plain reads: an I/O error is no kill."""
        path = self._path(name)
        return self._patience.call(f"Reading {path}", lambda _: _read(path, start, end))

    def size(self, name: str) -> int | None:
        """See :meth:`~brainenc.featurestore.places.base.Place.size`."""
        path = self._path(name)
        try:
            return self._patience.call(f"Looking at {path}", lambda _: path.stat().st_size)
        except FileNotFoundError:
            return None

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """See :meth:`~brainenc.featurestore.places.base.Place.list`. May lack what was made a moment ago elsewhere."""
        found = []
        for folder, folders, files in os.walk(self._folder(prefix.rpartition("/")[0])):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for file in files:
                path = Path(folder, file)
                name = path.relative_to(self._root).as_posix()
                if name.startswith(prefix) and not file.startswith("."):
                    with contextlib.suppress(FileNotFoundError):
                        found.append(Entry(name=name, size=path.stat().st_size))
        yield from sorted(found, key=lambda entry: entry.name)

    def folders(self, prefix: str = "") -> _Names:
        """See :meth:`~brainenc.featurestore.places.base.Place.folders`."""
        try:
            with os.scandir(self._folder(prefix)) as entries:  # a link may lead out of the store
                return sorted(e.name for e in entries if e.is_dir(follow_symlinks=False) and not e.name.startswith("."))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def local(self, name: str) -> None:
        """Never: an I/O error under a map of a mounted file is a SIGBUS."""
        check_name(name)

    # ---- writing

    def create(self, name: str, data: bytes) -> bool:
        """See :meth:`~brainenc.featurestore.places.base.Place.create`. Handed over on return, not confirmed."""
        path = self._path(name)
        aside = self._aside(path)
        try:
            self._write(aside, iter((data,)))
            return self._give_name(aside, path, name) or self._holds(path, data)
        finally:
            aside.unlink(missing_ok=True)

    def publish(self, partial: Path, name: str) -> bool:
        """See :meth:`~brainenc.featurestore.places.base.Place.publish`. Handed over on return, not confirmed."""
        path = self._path(name)
        if path.exists():
            return False
        aside = self._aside(path)
        try:
            with open(partial, "rb") as file:
                self._write(aside, iter(lambda: file.read(_COPY), b""))
            if not self._give_name(aside, path, name):
                return False
        finally:
            aside.unlink(missing_ok=True)
        partial.unlink(missing_ok=True)
        return True

    def replace(self, name: str, data: bytes) -> None:
        """Write a file or replace the one that is there. Nothing in a store is ever replaced; run folders are."""
        self._replace(self._path(name), iter((data,)))

    def replace_file(self, name: str, path: Path) -> None:
        """The same with a local file's bytes; the file stays."""
        with open(path, "rb") as file:
            self._replace(self._path(name), iter(lambda: file.read(_COPY), b""))

    def _replace(self, path: Path, pieces: Iterator[bytes]) -> None:
        aside = self._aside(path)
        self._write(aside, pieces)
        os.replace(aside, path)

    def partial(self, name: str) -> Path:
        """See :meth:`~brainenc.featurestore.places.base.Place.partial`: on local disk, never on the mount."""
        return self._scratch.partial(check_name(name))

    def partials(self, prefix: str = "") -> Iterator[Path]:
        """See :meth:`~brainenc.featurestore.places.base.Place.partials`: local ones, and copies that were cut short."""
        yield from self._scratch.partials(prefix)
        for path in sorted(self._folder(prefix.rpartition("/")[0]).glob("**/.*.partial")):
            if path.with_name(path.name[1:]).relative_to(self._root).as_posix().startswith(prefix):
                yield path

    def delete(self, name: str) -> None:
        """See :meth:`~brainenc.featurestore.places.base.Place.delete`."""
        self._path(name).unlink(missing_ok=True)
        (self._handed / name).unlink(missing_ok=True)
        if self._confirmed is not None:
            self._confirmed.discard(name)

    # ---- what arrived

    def doubtful(self, name: str) -> bool:
        """Whether ``name`` was handed over in an earlier session and never read back since.

        Within the session that handed it over reading back would only show the mount's cache, so it is not doubted,
        and not confirmed.
        """
        return name not in self._ledger() and not (self._handed / check_name(name)).exists()

    def confirm(self, names: Iterable[str]) -> None:
        """Remember that these files were read back whole and right in a later session than the one that made them."""
        fresh = sorted(name for name in names if self.doubtful(name))
        if not fresh:
            return
        text = "".join(f"{name}\n" for name in fresh).encode()
        file = self._root / _LEDGER / f"{hashlib.sha256(text).hexdigest()[:24]}.txt"
        if not file.exists():
            self._replace(file, iter((text,)))
        self._ledger().update(fresh)

    def staged(self, prefix: str = "") -> _Names:
        """Names handed over in this session and not confirmed, sorted."""
        found = (p.relative_to(self._handed).as_posix() for p in self._handed.glob("**/*") if p.is_file())
        return sorted(name for name in found if name.startswith(prefix))

    def _ledger(self) -> set[str]:
        if self._confirmed is None:
            self._confirmed = set()
            for file in (self._root / _LEDGER).glob("*.txt"):
                text = self._slurp(file)
                if hashlib.sha256(text).hexdigest()[:24] == file.stem:  # else it was cut on its way: verify again
                    self._confirmed.update(text.decode().splitlines())
        return self._confirmed

    # ---- inside

    def _path(self, name: str) -> Path:
        return self._root / check_name(name)

    def _folder(self, prefix: str) -> Path:
        return self._root / check_name(prefix.rstrip("/")) if prefix else self._root

    @staticmethod
    def _aside(path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        return partial_name(path)

    def _write(self, aside: Path, pieces: Iterator[bytes]) -> None:
        try:
            written = 0
            with open(aside, "xb") as file:
                for piece in pieces:
                    written += file.write(piece)
                file.flush()
                os.fsync(file.fileno())
            if aside.stat().st_size != written:
                raise ShortRead(f"{aside} has {aside.stat().st_size} bytes after {written} were written to it")
        except OSError as error:
            aside.unlink(missing_ok=True)
            if error.errno not in _FULL:
                raise
            raise NoSpace(
                f"{self._root} is full: {error.strerror} ({_free(self._root)}). Make space on the drive, or keep the "
                "store on local disk; the same command goes on from what is there."
            ) from error

    def _give_name(self, aside: Path, path: Path, name: str) -> bool:
        """Rename without replacing, as far as this machine goes: a mount has no links, and no locks across machines."""
        with self._exclusive():
            if path.exists():
                return False
            mark = self._handed / name
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()
            os.rename(aside, path)
        return True

    def _slurp(self, path: Path) -> bytes:
        return self._patience.call(f"Reading {path}", lambda _: _read(path, 0, None))

    def _holds(self, path: Path, data: bytes) -> bool:
        try:
            return self._slurp(path) == data
        except FileNotFoundError:
            return False

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        self._scratch.folder.mkdir(parents=True, exist_ok=True)
        fd = os.open(self._scratch.folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)


def _read(path: Path, start: int, end: int | None) -> bytes:
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        stop = size if end is None else min(end, size)
        pieces, at = [], start
        while at < stop:
            piece = os.pread(file.fileno(), min(_COPY, stop - at), at)
            if not piece:
                raise ShortRead(f"{path} gave {at} bytes of {size}")
            pieces.append(piece)
            at += len(piece)
    return b"".join(pieces)


def _session(root: Path) -> str:
    """The same for all processes of this machine until it restarts or the drive is mounted again."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    booted = boot.read_text().strip() if boot.exists() else ""
    mount = mount_of(Path(os.path.realpath(root)))
    return hashlib.sha256(f"{booted}\0{mount[0] if mount else ''}\0{root}".encode()).hexdigest()[:16]


def _free(root: Path) -> str:
    try:
        found = shutil.disk_usage(root)
    except OSError:
        return "its free space is unknown"
    return f"{found.free} of {found.total} bytes free"
