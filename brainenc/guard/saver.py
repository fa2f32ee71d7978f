"""How a plain script saves when memory is short, and which files are of its run."""

from __future__ import annotations

import mmap
import secrets
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from brainenc.guard import pytorch as files
from brainenc.guard.emergency import EmergencyFiles, Saved, save_seconds
from brainenc.guard.place_in_run import Boundary
from brainenc.out_of_memory import is_out_of_memory

_UNBRAKED_S = 2.0
"""So long a save may take without the brake, where it does not fit under it."""


class Saver:
    """Saves the objects of one run.

    Args:
        objects: what is saved, by name.
        emergency: where.
        reserve_bytes: memory held from the start and released for saving.
    """

    def __init__(self, objects: Mapping[str, Any], emergency: EmergencyFiles, reserve_bytes: int) -> None:
        self._objects, self._files = objects, emergency
        self._reserve_bytes = reserve_bytes
        self._ballast: mmap.mmap | None = None
        self.seconds = 1.0
        """What the next save is expected to take."""
        self.copied = 0
        """Bytes of the states that are copies."""
        self._run, self._trusted = secrets.token_hex(8), False
        self.came_from: tuple[Path, ...] = ()
        """The file that this process has resumed from, if any."""
        self._own: set[Path] = set()
        """Files of this run, as far as is known without reading."""

    def prepare(self) -> None:
        """Before training: hold the reserve, and find out what saving will take."""
        self.hold_reserve()
        self.seconds = save_seconds(self._files.folder, files.payload_bytes(self._objects))
        self.copied = files.copied_bytes(self._objects)

    # ---- whose file is it

    def read(self, path: Path, *, trust: bool) -> dict[str, Any]:
        """One file's content; as :func:`brainenc.guard.pytorch.load`."""
        self._trusted = trust
        return files.load(path, trust=trust)

    def go_on_from(self, path: Path, content: Mapping[str, Any]) -> str | None:
        """What was read from ``path`` is where this run goes on; the name of the script, where another one wrote it."""
        self._run = str(content.get("run", self._run))
        self._own.add(path)
        self.came_from = (path,)
        writer = str(content.get("script", script()))
        return writer if writer != script() else None

    def is_ours(self, path: Path) -> bool:
        """Whether a file is of this run."""
        return path in self._own or files.run_of(path, trust=self._trusted) in ("", self._run)

    # ---- save

    def save(self, where: Callable[[], Boundary], reason: str, unbrake: Callable[[float], None] | None) -> Saved:
        """Release the reserve and save the last finished step. Objects that copy their state may need more memory
        than the brake leaves: then without it.

        Args:
            where: tells where the run stands; it takes memory for the generators' states.
            reason: why it is saved, for the file.
            unbrake: asks the watcher to lift the brake for so many seconds; None where there is no watcher.
        """
        self.release_reserve()
        boundary = where()
        until: float | None = None
        while True:
            saved, short = self._try(boundary, reason)
            if saved.path:
                self.seconds = saved.seconds
                self._own.add(Path(saved.path))
            if saved.path or not short or unbrake is None or (until is not None and time.monotonic() > until):
                return saved
            until = until or time.monotonic() + _UNBRAKED_S
            unbrake(_UNBRAKED_S)
            time.sleep(0.02)

    def _try(self, boundary: Boundary, reason: str) -> tuple[Saved, bool]:
        """What came of it, and whether memory was too short for it."""
        short = False

        def write(path: Path) -> int:
            nonlocal short
            try:
                return files.write(content, path)
            except Exception as error:
                short = short or is_out_of_memory(error)
                raise

        try:
            content = files.payload(self._objects, **boundary._asdict(), reason=reason, run=self._run, script=script())
        except Exception as error:  # of an object's own `state_dict`
            if not (short := is_out_of_memory(error)):
                traceback.print_exception(error)
            why = f"the states could not be gathered: {type(error).__name__}: {error}"
            return Saved(failures=(why,)), short
        return self._files.save(boundary.epoch, write), short

    # ---- the reserve

    def hold_reserve(self) -> None:
        """Memory of one's own, touched page by page, that goes back to the system at once when it is released.

        Private: shared memory counts for no limit of a process (nor for the brake), and forked workers would keep it.
        """
        if self._reserve_bytes and self._ballast is None:
            if sys.platform == "win32":
                self._ballast = mmap.mmap(-1, self._reserve_bytes)
            else:
                self._ballast = mmap.mmap(-1, self._reserve_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if hasattr(mmap, "MADV_DONTFORK"):
                self._ballast.madvise(mmap.MADV_DONTFORK)
            for offset in range(0, self._reserve_bytes, mmap.PAGESIZE):
                self._ballast[offset] = 1

    def release_reserve(self) -> None:
        """Give it back."""
        ballast, self._ballast = self._ballast, None
        if ballast is not None:
            ballast.close()


def script() -> str:
    """The name of what runs, to tell trainings apart that share a folder."""
    return Path(sys.argv[0]).name if sys.argv else ""
