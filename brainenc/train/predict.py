"""Predictions of the test images: float32 arrays, one row an image in the order of the subject's files."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from brainenc.atomic import make_dirs, partial_name
from brainenc.datasets.algonauts import Subject
from brainenc.datasets.rois import HEMISPHERES
from brainenc.errors import CheckpointUnusable, DataError, KeyNotFound
from brainenc.out_of_memory import is_out_of_memory
from brainenc.train import checkpoint
from brainenc.train.best import find
from brainenc.train.config import TrainConfig
from brainenc.train.data import Batch, Loader, Samples
from brainenc.train.inputs import OpenViews, open_samples, usable
from brainenc.train.order import Order
from brainenc.train.run_folder import RunFolder
from brainenc.train.step import Stepper, predict, relieve

log = logging.getLogger(__name__)


class Predictor:
    """A model for prediction alone: no gradients, no optimizer.

    Args:
        model: on its device.
        bfloat16: autocast.
        micro_batch: the largest number of samples in one forward.
    """

    def __init__(self, model: torch.nn.Module, *, bfloat16: bool = False, micro_batch: int = 16) -> None:
        self.model, self.micro_batch, self._bfloat16 = model, micro_batch, bfloat16
        self.device = next(model.parameters()).device

    def predict(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Predictions ``(B, V_lh)`` and ``(B, V_rh)``, float32."""
        return predict(self.model, features, bfloat16=self._bfloat16)

    def shrink(self) -> None:
        """Halve the micro-batch."""
        self.micro_batch = max(1, self.micro_batch // 2)

    def relieve(self) -> None:
        """Give back what a failed forward left behind."""
        relieve(self.device)


Predictions = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]


def predict_batches(
    stepper: Stepper | Predictor, samples: Samples, batch_size: int
) -> Iterator[tuple[Batch, Predictions]]:
    """Every sample in order, batch by batch: the batch, and predictions ``(n, V_lh)`` and ``(n, V_rh)``.

    What does not fit in memory is tried again with half the micro-batch.
    """
    order = Order(n_samples=len(samples), batch_size=batch_size, seed=0, shuffle=False)
    with Loader(samples, order, device=stepper.device) as loader:
        for batch in loader.run(0, order.steps_per_epoch):
            yield batch, _predict_batch(stepper, batch)


def _predict_batch(stepper: Stepper | Predictor, batch: Batch) -> Predictions:
    while True:
        try:
            parts = [
                stepper.predict(batch.features(a, min(a + stepper.micro_batch, batch.count)))
                for a in range(0, batch.count, stepper.micro_batch)
            ]
        except Exception as error:
            if not is_out_of_memory(error) or stepper.micro_batch == 1:
                raise
            stepper.shrink()
            stepper.relieve()
            continue
        lh, rh = (np.concatenate([part[side].cpu().numpy() for part in parts]) for side in range(2))
        return lh, rh


def predict_samples(stepper: Stepper | Predictor, samples: Samples, batch_size: int) -> Predictions:
    """Predictions of all samples, ``(n, V_lh)`` and ``(n, V_rh)`` float32."""
    found = [out for _, out in predict_batches(stepper, samples, batch_size)]
    lh, rh = (np.concatenate([f[side] for f in found]).astype(np.float32, copy=False) for side in range(2))
    return lh, rh


def load_best(
    folder: RunFolder, model: torch.nn.Module, *, run_id: str | None = None, note: Callable[[str], None] = log.warning
) -> str:
    """Load the best checkpoint of a run, or the newest where none has a score; returns its name.

    Args:
        folder: of the run; nothing is written there.
        model: takes the weights.
        run_id: pass over checkpoints of another run that was in this place.
        note: told when that is not the checkpoint that ``best.json`` names.

    Raises:
        CheckpointUnusable: there is none that verifies.
    """
    path = _best(folder, run_id, note)
    checkpoint.load_weights(path, model)
    return path.name


def _best(folder: RunFolder, run_id: str | None, note: Callable[[str], None]) -> Path:
    pointed = str((folder.pointed("best") or {}).get("checkpoint", ""))
    named = f"best.json names {pointed}" if pointed else f"{folder.checkpoints} has no best.json"
    best = find(folder, run_id)
    if best is not None:
        for why in best.skipped:
            note(f"Passed over as the best: {why}")
        if best.folder.name != pointed:
            note(
                f"{named}: using {best.folder.name}, the whole checkpoint with the highest val_perf "
                f"({best.val_perf:.4f})."
            )
        return best.folder
    choice = checkpoint.newest([folder.checkpoints], run_id)
    if choice.folder is None:
        why = " ".join(choice.skipped) or "It holds none."
        raise CheckpointUnusable(f"{folder.checkpoints} has no checkpoint that can be used. {why}")
    note(f"{named} and no whole checkpoint has a score: using the newest, {choice.folder.name}.")
    return choice.folder


def predict_test(
    config: TrainConfig,
    stepper: Stepper | Predictor,
    subject: Subject,
    open_views: OpenViews,
    *,
    note: Callable[[str], None],
) -> list[Path]:
    """Predict the test images with the best weights, into ``RUN/predictions``."""
    try:
        samples = open_samples(config, subject, open_views, "test")
    except (DataError, KeyNotFound) as error:
        note(f"No predictions of test images: {error}")
        return []
    if not usable(samples).all():
        note("No predictions of test images: features of some are missing in the store.")
        return []
    folder = RunFolder(config.out)
    load_best(folder, stepper.model, run_id=config.id, note=note)
    return write_predictions(folder.predictions, predict_samples(stepper, samples, config.batch_size))


def write_predictions(folder: Path, predictions: Predictions) -> list[Path]:
    """``lh_pred_test.npy`` and ``rh_pred_test.npy``, float32; each appears whole."""
    make_dirs(folder)
    written = []
    for hemisphere, array in zip(HEMISPHERES, predictions, strict=True):
        final = folder / f"{hemisphere}_pred_test.npy"
        partial = partial_name(final)
        with open(partial, "wb") as file:
            np.save(file, np.ascontiguousarray(array, dtype=np.float32), allow_pickle=False)
        partial.replace(final)
        written.append(final)
    return written
