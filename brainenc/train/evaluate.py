"""Scores of a finished run: streaming over its data, on the split that is asked for."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from brainenc import atomic
from brainenc.datasets.algonauts import Subject
from brainenc.datasets.rois import HEMISPHERES
from brainenc.errors import DataError, UsageError
from brainenc.featurestore.places import may_be_mapped
from brainenc.scoring import StreamingPearson, pearson
from brainenc.train.config import TrainConfig
from brainenc.train.data import Samples
from brainenc.train.encoders.base import RIDGE
from brainenc.train.inputs import OpenViews, StoredViews, open_samples, read_split, split_samples, usable
from brainenc.train.predict import Predictor, load_best, predict_batches, predict_samples, write_predictions
from brainenc.train.published import split_unknown
from brainenc.train.run_folder import RunFolder, save_array
from brainenc.train.scores import Floats, summarise
from brainenc.train.worker import make_model

log = logging.getLogger(__name__)

Part = Literal["val", "train", "test"]
PARTS: tuple[Part, ...] = ("val", "train", "test")


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenRun:
    """A run, opened to predict with its best weights."""

    folder: RunFolder
    config: TrainConfig
    subject: Subject
    samples: Samples
    """The training images."""
    predictor: Predictor
    checkpoint: str
    open_views: OpenViews


def open_run(run: str | Path, *, device: str = "auto", open_views: OpenViews | None = None) -> OpenRun:
    """Open a run folder with its best checkpoint.

    Raises:
        UsageError: no run there.
        CheckpointUnusable: no checkpoint that verifies, or one of another model.
    """
    folder = RunFolder(Path(run).absolute())
    config = folder.config()
    if config.encoder.encoder == RIDGE:
        raise UsageError(
            f"{folder.path} is a ridge run: it has no weights to load. Its scores are in {folder.scores_file.name}, "
            "its predictions in predictions/."
        )
    if folder.split_file.exists():
        config = replace(config, split=str(folder.split_file))
    views = open_views or StoredViews(config)
    subject = Subject.open(config.subject_dir)
    samples = open_samples(config, subject, views)
    wanted = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    model = make_model(config, subject, samples).to(wanted)
    name = load_best(folder, model, run_id=config.id)
    predictor = Predictor(model, bfloat16=config.precision == "bfloat16", micro_batch=config.batch_size)
    return OpenRun(
        folder=folder, config=config, subject=subject, samples=samples, predictor=predictor, checkpoint=name,
        open_views=views,
    )  # fmt: skip


def evaluate(
    opened: OpenRun, part: Part = "val", *, progress: Callable[[int, int], None] = lambda done, total: None,
    note: Callable[[str], None] = log.warning,
) -> dict[str, Any]:  # fmt: skip
    """Score a run; memory does not grow with the number of images.

    Args:
        opened: the run.
        part: which of its images.
        progress: called with the images that are done, and how many there are.
        note: called with lines for a person.

    Returns:
        what :func:`brainenc.train.scores.summarise` says, with ``split``, ``n_images`` and ``checkpoint``.

    Raises:
        DataError: the test responses are not there; only the organisers have them.
    """
    if part != "test" and (warning := split_unknown(opened.folder)):
        note(warning)
    samples = part_samples(opened, part)
    r_lh, r_rh = correlate(opened, samples, progress)
    table = {"split": part, "n_images": len(samples), "checkpoint": opened.checkpoint}
    table |= summarise(r_lh, r_rh, opened.subject)
    _keep(opened.folder, part, table, r_lh, r_rh)
    return table


def evaluate_ridge(run: str | Path, part: Part = "val") -> dict[str, Any] | None:
    """Scores of a ridge run, by the predictions that it left: it has no weights. None: the run is no ridge run.

    Raises:
        UsageError: no run there, or predictions that a ridge run does not keep.
        DataError: the test responses are not there; only the organisers have them.
    """
    folder = RunFolder(Path(run).absolute())
    config = folder.config()
    if config.encoder.encoder != "ridge":
        return None
    files = [folder.predictions / f"{hemisphere}_pred_{part}.npy" for hemisphere in HEMISPHERES]
    files += [folder.scores_file] if part == "val" else []
    if part == "train" or not all(file.exists() for file in files):
        kept = sorted(file.name for file in folder.predictions.glob("*_pred_*.npy"))
        raise UsageError(
            f"{folder.path} is a ridge run: it has no weights, only predictions, and of its {part} images it has none "
            f"({', '.join(kept) or 'nothing'} is there)."
        )
    subject = Subject.open(config.subject_dir)
    predicted = [np.load(file, mmap_mode="r") for file in files[:2]]
    table = {"split": part, "n_images": len(predicted[0]), "checkpoint": "ridge"}
    if part == "val":
        scores: dict[str, Any] = json.loads(folder.scores_file.read_text())
        return table | scores
    measured = [subject.responses(h, "test", mapped=may_be_mapped(subject.folder)) for h in HEMISPHERES]
    r_lh, r_rh = (pearson(p, m) for p, m in zip(predicted, measured, strict=True))
    table |= summarise(r_lh, r_rh, subject)
    _keep(folder, part, table, r_lh, r_rh)
    return table


def _keep(folder: RunFolder, part: Part, table: dict[str, Any], r_lh: Floats, r_rh: Floats) -> None:
    folder.predictions.mkdir(exist_ok=True)
    for hemisphere, r in (("lh", r_lh), ("rh", r_rh)):
        save_array(folder.predictions / f"{hemisphere}_{part}_corr.npy", r.astype(np.float32))
    name = "scores.json" if part == "val" else f"scores_{part}.json"
    atomic.replace(folder.path / name, json.dumps(table, indent=1).encode() + b"\n")


def part_samples(opened: OpenRun, part: Part) -> Samples:
    """The samples of a split, with responses."""
    if part == "test":
        samples = open_samples(opened.config, opened.subject, opened.open_views, "test", responses=True)
        return samples.take(np.flatnonzero(usable(samples)))
    train, val = split_samples(opened.samples, read_split(opened.config, len(opened.samples)))
    return opened.samples.take(train if part == "train" else val)


def correlate(opened: OpenRun, samples: Samples, progress: Callable[[int, int], None]) -> tuple[Floats, Floats]:
    """Pearson's r of each vertex, ``(V_lh,)`` and ``(V_rh,)``."""
    scores = [StreamingPearson(n) for n in opened.subject.n_vertices]
    done = 0
    for batch, predicted in predict_batches(opened.predictor, samples, opened.config.batch_size):
        for score, out, measured in zip(scores, predicted, batch.responses(), strict=True):
            score.update(out, measured)
        done += batch.count
        progress(done, len(samples))
    lh, rh = (score.r() for score in scores)
    return lh, rh


def predict(opened: OpenRun, out: Path | None = None) -> list[Path]:
    """Predict the test images into ``RUN/predictions`` or ``out``; float32, one row an image.

    Raises:
        DataError: there are no test images, or some have no features.
    """
    samples = open_samples(opened.config, opened.subject, opened.open_views, "test")
    if lacking := [samples.ids[int(i)] for i in np.flatnonzero(~usable(samples))]:
        raise DataError(
            f"{len(lacking)} test images have no features in the store: {', '.join(lacking[:5])}. Every row of the "
            "predictions needs one; extract them again."
        )
    return write_predictions(
        out or opened.folder.predictions, predict_samples(opened.predictor, samples, opened.config.batch_size)
    )
