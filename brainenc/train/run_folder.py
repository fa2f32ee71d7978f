"""Names in a run folder, built here and nowhere else, and the small files that point and number."""

from __future__ import annotations

import io
import json
import os
import shlex
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from brainenc import atomic, records
from brainenc.errors import UsageError
from brainenc.train.config import TrainConfig


class RunFolder:
    """``RUN``: configuration, records, checkpoints, predictions. Driver and workers; a path, nothing open."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_file = self.path / "config.yaml"
        self.metrics_file = self.path / "metrics.jsonl"
        self.guard_file = self.path / "guard.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.predictions = self.path / "predictions"
        self.split_file = self.path / "idxs.npy"
        self.ray = self.path / ".ray"
        self.snapshots = self.path / ".snapshots"
        self.drill_marks = self.path / ".drills"
        self.log_file = self.path / "train.log"
        self.scores_file = self.path / "scores.json"
        self.finished_file = self.path / "finished.json"

    def test_predictions(self, hemisphere: str) -> Path:
        """Predictions of the test images, float32 (n, V)."""
        return self.predictions / f"{hemisphere}_pred_test.npy"

    def create(self, config: TrainConfig) -> None:
        """Make the folder of a new run.

        Raises:
            UsageError: there is a run already.
        """
        if self.config_file.exists():
            raise UsageError(
                f"{self.path} holds a run already. Go on with it by `brainenc train --resume "
                f"{shlex.quote(str(self.path))}`, or choose another --out."
            )
        for folder in (self.path, self.checkpoints):
            atomic.make_dirs(folder)
        atomic.replace(self.config_file, config.to_yaml().encode())

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the run for this process and its workers; released by the system when the process dies.

        Raises:
            UsageError: another process holds it.
        """
        with open(self.path / ".lock", "a+") as file:
            try:
                _lock(file.fileno())
            except BlockingIOError:
                file.seek(0)
                who = file.read().strip() or "somebody"
                raise UsageError(
                    f"{self.path} is being trained by {who}. Wait for it, stop it (SIGTERM saves first), or choose "
                    "another --out."
                ) from None
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            yield

    def update(self, config: TrainConfig) -> None:
        """Replace the configuration of a run that goes on."""
        atomic.replace(self.config_file, config.to_yaml().encode())

    def config(self) -> TrainConfig:
        """The configuration of the run.

        Raises:
            UsageError: no run here.
        """
        try:
            return TrainConfig.from_yaml(self.config_file.read_text())
        except FileNotFoundError:
            raise UsageError(
                f"{self.path} is no run folder: it has no {self.config_file.name}. Give what --out was, as in "
                "`brainenc train --resume runs/first`."
            ) from None

    def next_run(self) -> int:
        """One more than the highest ``run`` counter in the records, so that lines of this run win over older ones."""
        if not self.metrics_file.exists():
            return 0
        return 1 + max((int(r.get("run", 0)) for r in records.read(self.metrics_file)), default=-1)

    def point(self, which: str, **fields: Any) -> None:
        """Write ``checkpoints/<which>.json``: ``last`` or ``best``."""
        atomic.replace(self.checkpoints / f"{which}.json", json.dumps(fields, indent=1).encode() + b"\n")

    def pointed(self, which: str) -> dict[str, Any] | None:
        """What :meth:`point` wrote, None when there is nothing whole."""
        try:
            found = json.loads((self.checkpoints / f"{which}.json").read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def metrics(self) -> Iterator[dict[str, Any]]:
        """Records of the run as if it had never been interrupted.

        A newer run went on from some step: what an older one wrote from there on is superseded.
        """
        if self.metrics_file.exists():
            yield from records.standing(records.read(self.metrics_file))


def _lock(descriptor: int) -> None:
    """An exclusive lock, where the system and the file system know one; other places go without."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # a network file system without locks
        return


def save_array(path: Path, array: npt.NDArray[Any]) -> None:
    """Write a small array durably, replacing what is there in one step."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    atomic.replace(path, buffer.getvalue())
