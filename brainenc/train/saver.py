"""Where and when one rank writes its state: checkpoints of the run, emergency ones, rolling snapshots.

Worker, training thread; what may be done by a thread is done by :class:`Background`. Nothing here talks to other ranks.
"""

from __future__ import annotations

import hashlib
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from brainenc import atomic, private
from brainenc.errors import BrainencError
from brainenc.train import best as best_of
from brainenc.train import checkpoint
from brainenc.train.checkpoint import Contents
from brainenc.train.run_folder import RunFolder
from brainenc.train.snapshot import Background, StateCopy

SNAPSHOTS_KEPT = 2


def snapshot_root(folder: RunFolder, chosen: str | None) -> Path:
    """Where this machine's rolling snapshots lie: one folder a machine, whether or not machines share a disk.

    Args:
        folder: the run; snapshots lie in it by default, so they are on a local disk where it is, and else are not.
        chosen: a folder of each machine's own instead.
    """
    return (Path(chosen) / _tag(folder) if chosen else folder.snapshots) / socket.gethostname()


def spare_root(folder: RunFolder) -> Path:
    """Where an emergency checkpoint goes when the run folder cannot be written to: below a folder of the user's own."""
    return private.temporary("brainenc") / _tag(folder)


def _tag(folder: RunFolder) -> str:
    return f"{folder.path.name}-{hashlib.blake2b(str(folder.path).encode(), digest_size=4).hexdigest()}"


class Saver:
    """Writes one rank's state.

    Args:
        folder: the run.
        snapshots: this machine's folder for snapshots.
        keep: regular checkpoints kept beside the best.
        published: called with each durable checkpoint of the run, from whichever thread wrote it.
    """

    def __init__(
        self, folder: RunFolder, *, snapshots: Path, keep: int,
        published: Callable[[Path], None] = lambda path: None,
    ) -> None:  # fmt: skip
        self.folder, self.snapshots, self.keep = folder, snapshots, keep
        self._took: float | None = None
        self._copy: StateCopy | None = None
        self._published = published
        self._background = Background("saver")

    def use(self, copy: StateCopy) -> None:
        """Write copies in the background from here on; without one, writing blocks and there are no snapshots."""
        self._copy = copy

    @property
    def busy(self) -> bool:
        """Whether the thread is writing."""
        return self._background.busy

    @property
    def can_snapshot(self) -> bool:
        """Whether there is memory for copies."""
        return self._copy is not None

    def checkpoint(self, contents: Contents, *, best: bool = False) -> None:
        """Write a regular checkpoint, in the background where there is memory for a copy.

        Raises:
            OSError: it could not be written, when it is not in the background; else :meth:`failure` has it.
        """
        if self._copy is None:
            self._regular(contents, best)
            return
        self._background.wait()
        copied = self._copy.take(contents)
        self._background.start(lambda: self._regular(copied, best))

    def _regular(self, contents: Contents, best: bool) -> None:
        started = time.perf_counter()
        path = checkpoint.write(self.folder.checkpoints, contents)
        self._took = time.perf_counter() - started
        position = contents.position
        pointer = {"checkpoint": path.name, "epoch": position.epoch, "step": position.step}
        self.folder.point("last", **pointer)
        if best:
            self.folder.point("best", **pointer, val_perf=position.best)
        kept = (self.folder.pointed("best") or {}).get("checkpoint")
        checkpoint.prune(path, keep=self.keep, best=kept)
        self._published(path)

    def recorded(self, run_id: str) -> float | None:
        """The highest score of a checkpoint of the run that is there, once what is being written is."""
        self._background.wait()
        return best_of.recorded(self.folder, run_id)

    def snapshot(self, contents: Contents) -> float:
        """Copy the state and have it written; returns the seconds that training was held up."""
        assert self._copy is not None, "snapshots need memory for a copy"
        started = time.perf_counter()
        self._background.wait()
        copied = self._copy.take(contents)
        self._background.start(lambda: self._rolling(copied))
        return time.perf_counter() - started

    def _rolling(self, contents: Contents) -> None:
        # Hashes are made while writing and compared when a snapshot is used: reading each one back would cost more
        # than it tells, since the next one follows in seconds.
        path = checkpoint.write(self.snapshots, contents, verify_it=False)
        checkpoint.prune(path, keep=SNAPSHOTS_KEPT)

    def emergency(self, contents: Contents, reason: str) -> Path:
        """Write the state now, to the run folder or else to the next place that takes it; durable on return.

        Raises:
            BrainencError: no place took it; each place's answer is in the message.
        """
        answers = []
        spare = spare_root(self.folder)
        for root in (self.folder.checkpoints, self.snapshots, spare):
            try:
                if root == spare:
                    private.make(spare.parent)
                path = checkpoint.write(root, contents, emergency=True, reason=reason)
            except Exception as error:  # also a MemoryError, or what torch makes of a full disk: the next may take it
                answers.append(f"{root}: {error}")
                continue
            if root == self.folder.checkpoints:
                self._point_last(path, contents)
                self._published(path)
            return path
        raise BrainencError(f"No emergency checkpoint could be saved. {'; '.join(answers)}")

    def places(self) -> Sequence[Path]:
        """Where checkpoints of this run may lie, the best first; not where somebody else may have put them."""
        spare = spare_root(self.folder)
        spares = (spare,) if private.refusal(spare.parent) is None else ()
        return (self.folder.checkpoints, self.snapshots, *spares)

    def _point_last(self, path: Path, contents: Contents) -> None:
        try:
            self.folder.point("last", checkpoint=path.name, epoch=contents.position.epoch, step=contents.position.step)
        except OSError:  # the checkpoint itself is durable, and the newest one is found without a pointer
            return

    def wait(self) -> None:
        """Wait for what is being written."""
        self._background.wait()

    def failure(self) -> Exception | None:
        """What could not be written in the background since this was asked last."""
        return self._background.failure()

    def succeeded(self) -> bool:
        """Whether something was written in the background since this was asked last."""
        return self._background.succeeded()

    def took(self) -> float | None:
        """Seconds until a regular checkpoint was durable, if one has become so since this was asked last."""
        took, self._took = self._took, None
        return took

    def clean(self) -> None:
        """Remove this machine's snapshots: the run is done."""
        self.wait()
        for found in checkpoint.list_checkpoints(self.snapshots):
            checkpoint.discard(found.folder)
        for folder in (self.snapshots, self.snapshots.parent):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def sweep(places: Sequence[Path]) -> None:
    """Remove debris of writers that died, before the first step."""
    for root in places:
        if root.is_dir():
            checkpoint.sweep(root)
    if places and places[0].is_dir():
        atomic.fsync_dir(places[0])
