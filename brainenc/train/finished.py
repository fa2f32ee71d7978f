"""The mark of a run that has done all it was asked for: the same command again starts no workers to find that out."""

from __future__ import annotations

import json

from brainenc import atomic
from brainenc.datasets.rois import HEMISPHERES
from brainenc.train import best
from brainenc.train.checkpoint import Position
from brainenc.train.config import TrainConfig
from brainenc.train.run_folder import RunFolder


def mark(config: TrainConfig, position: Position, *, predicted: bool) -> None:
    """Write ``finished.json``; rank 0, after the last epoch and the predictions.

    Args:
        config: of the run.
        position: where it ended.
        predicted: whether predictions of the test images were written.
    """
    fields = {"id": config.id, "epochs": config.epochs, "predicted": predicted}
    fields |= {"epoch": position.epoch, "step": position.step, "val_perf": position.best}
    atomic.replace(RunFolder(config.out).finished_file, json.dumps(fields, indent=1).encode() + b"\n")


def find(config: TrainConfig) -> Position | None:
    """Where the run ended, if nothing is left to do: no more epochs, no predictions that are wanted and missing.

    The mark alone is not believed: the best checkpoint must be there, whole, pointed to, and have its score.
    """
    folder = RunFolder(config.out)
    try:
        said = json.loads(folder.finished_file.read_bytes())
        if (said["id"], said["epochs"]) != (config.id, config.epochs):
            return None
        position = Position(step=int(said["step"]), epoch=int(said["epoch"]), best=said["val_perf"])
        predicted = bool(said["predicted"])
    except (OSError, ValueError, TypeError, KeyError):  # no mark, or none that can be read: the workers will see
        return None
    if config.predict and not (predicted and all(folder.test_predictions(h).exists() for h in HEMISPHERES)):
        return None
    found, pointed = best.find(folder, config.id), folder.pointed("best") or {}
    if found is None or found.val_perf != position.best or pointed.get("checkpoint") != found.folder.name:
        return None
    return position
