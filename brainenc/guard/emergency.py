"""Where emergency files lie, which of them counts, and what is done when one place cannot take them."""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from brainenc import private
from brainenc.errors import CheckpointUnusable, NeedsTrust

_NAME = re.compile(r"emergency_epoch(\d+)\.pth")


@dataclass(frozen=True, kw_only=True, slots=True)
class Saved:
    """Outcome of an attempt to save. ``path`` is empty when no place took it."""

    path: str = ""
    n_bytes: int = 0
    seconds: float = 0.0
    failures: tuple[str, ...] = ()
    """One sentence for every place that could not take it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """Where a script goes on."""

    epoch: int = 0
    """The epoch to go on with, counted from 0."""
    step: int = 0
    """Batches of that epoch that are finished; 0 at its beginning."""
    path: str = ""
    """The file it was restored from; empty for a fresh start."""


class EmergencyFiles:
    """The emergency files of one script.

    Args:
        folder: where they lie as a rule.
        fallbacks: tried after it, in this order; then a folder of this user's own in the temporary folder, and the
            home folder.
    """

    def __init__(self, folder: str | os.PathLike[str], fallbacks: Sequence[str | os.PathLike[str]] = ()) -> None:
        self._temporary = private.temporary("brainenc-emergency")
        last = (self._temporary, Path.home() / "brainenc-emergency")
        self.folder = Path(folder).absolute()  # the script may change its working folder
        # What is found in shared folders must be this script's: its folder's name goes into theirs.
        tag = re.sub(r"\W+", "_", str(self.folder)).strip("_")[-80:] or "root"
        self._places = [self.folder, *(Path(f).absolute() for f in fallbacks), *(place / tag for place in last)]

    @property
    def places(self) -> list[Path]:
        """All folders, in the order in which they are tried."""
        return list(self._places)

    def save(self, epoch: int, write: Callable[[Path], int]) -> Saved:
        """Save under ``emergency_epoch<epoch>.pth`` in the first place that takes it.

        Args:
            epoch: for the name.
            write: writes the file durably under this path and returns its bytes.
        """
        failures = []
        start = time.perf_counter()
        for place in self._places:
            path = place / f"emergency_epoch{epoch}.pth"
            try:
                if place.parent == self._temporary:
                    private.make(self._temporary)
                n_bytes = write(path)
            except Exception as error:  # also a MemoryError, or what torch makes of a full disk: the next may take it
                failures.append(f"{path}: {_why(error)}")
                continue
            seconds = time.perf_counter() - start
            return Saved(path=str(path), n_bytes=n_bytes, seconds=seconds, failures=tuple(failures))
        return Saved(seconds=time.perf_counter() - start, failures=tuple(failures))

    def newest(self, load: Callable[[Path], dict[str, Any]]) -> tuple[Path | None, dict[str, Any], list[str]]:
        """The file of the latest step that verifies.

        Args:
            load: reads one file, or raises CheckpointUnusable.

        Returns:
            its path (None: there is no usable one), its content, and a sentence for every file or folder passed over.

        Raises:
            NeedsTrust: of a file that is whole: whose work it is decides, nobody begins again because of it.
        """
        best: tuple[tuple[int, int], Path, dict[str, Any]] | None = None
        files, passed_over = self._search()
        for path in files:
            if best is not None and _epoch(path) < best[0][0]:
                break  # sorted by epoch: no older one can win
            try:
                content = load(path)
            except NeedsTrust:
                raise
            except CheckpointUnusable as error:
                passed_over.append(str(error))
                continue
            position = (int(content["epoch"]), int(content["step"]))
            if best is None or position > best[0]:
                best = (position, path, content)
        return (best[1], best[2], passed_over) if best else (None, {}, passed_over)

    def found(self) -> list[Path]:
        """Every emergency file, the highest epoch first."""
        return self._search()[0]

    def _search(self) -> tuple[list[Path], list[str]]:
        """Every emergency file, the highest epoch first, and a sentence for every folder that cannot be looked into."""
        files: list[Path] = []
        refused = []
        for place in self._places:
            try:
                if place.is_dir() and self._is_ours(place):
                    files += [path for path in place.iterdir() if _NAME.fullmatch(path.name)]
            except OSError as error:
                refused.append(f"{place} cannot be looked into: {_why(error)}.")
        return sorted(files, key=_epoch, reverse=True), refused

    def _is_ours(self, place: Path) -> bool:
        """Not a folder that somebody else has made where this script would look."""
        return place.parent != self._temporary or private.refusal(self._temporary) is None

    def retire(self, is_ours: Callable[[Path], bool]) -> list[str]:
        """Training has ended by itself: rename what is left to ``*.done``, so that the next run starts afresh.

        Args:
            is_ours: whether a file is of the run that has ended; what others have saved is left alone.

        Returns:
            a sentence for every file that is left: the next run would go on from it.
        """
        left = []
        for path in self.found():
            if not is_ours(path):
                left.append(f"{path} is not of this run, and stays: `resume` would go on from it.")
                continue
            try:
                for part in (path.with_name(path.name + ".xxh128"), path):
                    if part.exists():
                        part.replace(part.with_name(part.name + ".done"))
            except OSError as error:
                left.append(f"{path} cannot be set aside ({_why(error)}): move it away before the next run.")
        return left


EXPECTED_AT_MOST_S = 5.0
"""An expectation that is far too long makes alarms of what is none: growth that would be harmless."""


def disk_speed(folder: Path, n_bytes: int = 4 << 20) -> float:
    """Bytes a second that ``folder`` takes durably, measured with a small file; 0 where nothing can be written."""
    data = os.urandom(1 << 16) * (n_bytes >> 16)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix=".brainenc-speed-", dir=folder, buffering=0) as file:
            start = time.perf_counter()
            file.write(data)
            os.fsync(file.fileno())
            return n_bytes / (time.perf_counter() - start)
    except OSError:
        return 0.0


def save_seconds(folder: Path, n_bytes: int) -> float:
    """What to expect of a file of so many bytes before one was written: written at the disk's speed, hashed and read
    back at 500 MB/s; at most :data:`EXPECTED_AT_MOST_S`, because a small file on a disk far away tells little."""
    return min(EXPECTED_AT_MOST_S, 0.1 + n_bytes * (1 / (disk_speed(folder) or 50e6) + 1 / 500e6))


def _epoch(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    return int(match.group(1)) if match else -1


def _why(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def describe(objects: Mapping[str, Any]) -> str:
    """``"model, optimizer"``: what will be saved."""
    return ", ".join(name for name, thing in objects.items() if thing is not None)
