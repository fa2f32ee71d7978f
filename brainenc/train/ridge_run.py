"""A run of the ridge baseline: features from a store, a run folder with the same files as that of an encoder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from brainenc import atomic
from brainenc.datasets.algonauts import Responses, Subject
from brainenc.datasets.rois import HEMISPHERES, Hemisphere
from brainenc.errors import DataError, KeyNotFound
from brainenc.records import JsonLines
from brainenc.scoring import pearson
from brainenc.train.config import TrainConfig
from brainenc.train.data import Samples
from brainenc.train.features import RowLayout
from brainenc.train.inputs import OpenViews, open_samples, provenance, read_split, split_samples, usable
from brainenc.train.predict import write_predictions
from brainenc.train.ridge import RidgeConfig, Rows, solve, sum_kernel
from brainenc.train.run_folder import RunFolder, save_array
from brainenc.train.scores import summarise

CHUNK_BYTES = 1 << 30
"""Features in memory at a time, as float32."""

Floats = npt.NDArray[np.float32]


def run_ridge(
    config: TrainConfig, open_views: OpenViews, *, ridge: RidgeConfig | None = None,
    progress: Callable[[Mapping[str, Any]], None] | None = None, note: Callable[[str], None] | None = None,
) -> float:  # fmt: skip
    """Fit the baseline on the training images of a run and predict its validation and test images.

    The run folder must be there. Written into it: ``predictions/{lh,rh}_val_corr.npy``, ``{lh,rh}_pred_val.npy`` and,
    where there are test images with features, ``{lh,rh}_pred_test.npy``; ``{lh,rh}_penalties.npy``; ``scores.json``;
    one record in ``metrics.jsonl``; last of all ``finished.json``.

    Returns:
        ``val_perf``.
    """
    folder, subject = RunFolder(config.out), Subject.open(config.subject_dir)
    ridge = ridge or RidgeConfig(seed=config.seed, device=_device(config.device))
    samples, train, val = _training_samples(config, subject, open_views)
    test = _test_samples(config, subject, open_views, note or _ignore)
    parts = [samples.take(train), samples.take(val), *([test] if test is not None else [])]
    kernel = sum_kernel(_chunks(parts, ridge.device), sum(map(len, parts)))
    places = np.split(np.arange(len(kernel)), np.cumsum([len(p) for p in parts])[:-1])
    sets = dict(zip(("val", "test"), places[1:], strict=False))
    results = {h: _fit(kernel, samples, train, places[0], sets, ridge, h) for h in HEMISPHERES}
    folder.finished_file.unlink(missing_ok=True)  # what it speaks of is replaced now
    perf = _write(folder, subject, samples, val, results, progress or _ignore)
    mark = {"id": config.id, "val_perf": perf, **_made_from(config, subject, samples, (train, val), test)}
    atomic.replace(folder.finished_file, json.dumps(mark, indent=1).encode() + b"\n")
    return perf


def finished_ridge(config: TrainConfig, open_views: OpenViews) -> float | None:
    """``val_perf`` of a run that was fitted to the very data that lie there now, with all of its files; else None.

    The mark alone is not believed: scores, correlations, penalties and predictions must be there. A ridge run has no
    checkpoint that knows its data, so the mark does; fitted again it is where they are others, or where test images
    can be predicted that were not.
    """
    folder, subject = RunFolder(config.out), Subject.open(config.subject_dir)
    try:
        said = json.loads(folder.finished_file.read_bytes())
        scored = json.loads(folder.scores_file.read_bytes())["val_perf"]
        if said["id"] != config.id or said["val_perf"] != scored:
            return None
    except (OSError, ValueError, TypeError, KeyError):  # no mark, or none that can be read
        return None
    samples, train, val = _training_samples(config, subject, open_views)
    test = _test_samples(config, subject, open_views, _ignore)
    kinds = ["val_corr", "pred_val", "penalties", *(["pred_test"] if test is not None else [])]
    if not all((folder.predictions / f"{h}_{kind}.npy").exists() for h in HEMISPHERES for kind in kinds):
        return None
    now = _made_from(config, subject, samples, (train, val), test)
    if test is None:  # nothing to predict, or not wanted
        del now["test"]
    return float(scored) if now.items() <= said.items() else None


def _training_samples(config: TrainConfig, subject: Subject, open_views: OpenViews) -> tuple[Samples, Rows, Rows]:
    """All training images, and which of them are trained on and which are held out."""
    samples = open_samples(config, subject, open_views)
    train, val = split_samples(samples, read_split(config, len(samples)))
    return samples, train, val


def _made_from(
    config: TrainConfig, subject: Subject, samples: Samples, split: tuple[Rows, Rows], test: Samples | None
) -> dict[str, Any]:
    """The data of a run, as plain JSON: what was fitted, and what was predicted (None: no test images)."""
    return {
        "train": provenance(config, subject, samples, len(split[0])), "validation_samples": len(split[1]),
        "test": None if test is None else provenance(config, subject, test, 0),
    }  # fmt: skip


Result = tuple[npt.NDArray[np.float64], dict[str, Floats]]


def _fit(
    kernel: Tensor, samples: Samples, train: Rows, places: Rows, sets: Mapping[str, Rows], ridge: RidgeConfig,
    hemisphere: Hemisphere,
) -> Result:  # fmt: skip
    """Penalties (V,) and predictions of each set, of one hemisphere."""
    responses = _responses(samples, hemisphere)
    n_vertices = responses.shape[1]
    penalties = np.zeros(n_vertices)
    predictions = {name: np.zeros((len(rows), n_vertices), np.float32) for name, rows in sets.items()}
    for block in solve(kernel, responses, samples.response_rows[train], places, sets, ridge):
        penalties[block.vertices] = block.penalties
        for name, predicted in block.predictions.items():
            predictions[name][:, block.vertices] = predicted
    return penalties, predictions


def _write(
    folder: RunFolder, subject: Subject, samples: Samples, val: Rows, results: Mapping[Hemisphere, Result],
    progress: Callable[[Mapping[str, Any]], None],
) -> float:  # fmt: skip
    atomic.make_dirs(folder.predictions)
    r, loss = {}, 0.0
    for h, (penalties, predictions) in results.items():
        measured = _responses(samples, h)[samples.response_rows[val]]
        r[h] = pearson(predictions["val"], measured)
        loss += float(np.mean((predictions["val"] - measured) ** 2, dtype=np.float64))
        save_array(folder.predictions / f"{h}_val_corr.npy", r[h].astype(np.float32))
        save_array(folder.predictions / f"{h}_pred_val.npy", predictions["val"])
        save_array(folder.predictions / f"{h}_penalties.npy", penalties)
    if "test" in results["lh"][1]:
        write_predictions(folder.predictions, (results["lh"][1]["test"], results["rh"][1]["test"]))
    table = summarise(r["lh"], r["rh"], subject)
    record = {"run": 0, "epoch": 0, "step": 0, "split": "val", "loss": loss}
    record |= {name: table[name] for name in ("r_lh", "r_rh", "val_perf")}
    with JsonLines(folder.metrics_file) as metrics:
        metrics.write(**record)
    atomic.replace(folder.scores_file, json.dumps({"epoch": 0, "step": 0, **table}, indent=1).encode() + b"\n")
    progress(record)
    return float(table["val_perf"])


def _responses(samples: Samples, hemisphere: Hemisphere) -> Responses:
    if samples.responses is None:
        raise DataError("Ridge needs the responses of the training images.")
    return samples.responses[HEMISPHERES.index(hemisphere)]


def _test_samples(
    config: TrainConfig, subject: Subject, open_views: OpenViews, note: Callable[[str], None]
) -> Samples | None:
    if not config.predict:
        return None
    try:
        samples = open_samples(config, subject, open_views, "test")
    except (DataError, KeyNotFound) as error:
        note(f"No predictions of test images: {error}")
        return None
    if not usable(samples).all():
        note("No predictions of test images: features of some are missing in the store.")
        return None
    return samples


def _chunks(parts: Sequence[Samples], device: str) -> Iterator[Tensor]:
    """Features of all samples, some tokens at a time: (n, features of the chunk) float32.

    From maps only the tokens wanted are read, so that the store is walked through once.
    """
    n = sum(map(len, parts))
    n_places = parts[0].layout.grid[0] * parts[0].layout.grid[1]
    for number, layout in enumerate(parts[0].layout.rows):
        first, last = _tokens(layout)
        if layout.part != "map":  # one vector, in the inner product as often as it is tiled over the grid
            out = torch.empty(n, layout.channels)
            _fill(out, parts, number, first, last)
            yield (out * n_places**0.5).to(device)
            continue
        step = max(1, CHUNK_BYTES // (4 * n * layout.channels))
        for a in range(first, last, step):
            b = min(a + step, last)
            out = torch.empty(n, (b - a) * layout.channels)
            _fill(out, parts, number, a, b)
            yield out.to(device)


def _tokens(layout: RowLayout) -> tuple[int, int]:
    """The tokens of a stored row that are used."""
    if len(layout.row_shape) == 1 or layout.grid is None or layout.part == "cls":
        return 0, 1
    return layout.n_prefix, layout.row_shape[0]


def _fill(out: Tensor, parts: Sequence[Samples], number: int, a: int, b: int) -> None:
    """Tokens ``a`` to before ``b`` of every sample's row, or their mean."""
    array, i = out.numpy(), 0
    for samples in parts:
        view, layout = samples.views[number], samples.layout.rows[number]
        for row in samples.feature_rows[number]:
            stored = _row(view, int(row))
            used = stored if stored.ndim == 1 else stored[a:b]
            array[i] = used.mean(axis=0, dtype=np.float32) if layout.part == "mean" else used.reshape(-1)
            i += 1
        view.release()


def _row(view: Any, row: int) -> npt.NDArray[Any]:
    """One stored row: mapped where the view can, else copied."""
    if hasattr(view, "__getitem__"):
        found: npt.NDArray[Any] = view[row]
        return found
    gathered: npt.NDArray[Any] = view.gather(np.array([row]))[0]
    return gathered


def _device(device: str) -> str:
    return device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def _ignore(_: Any) -> None:
    """Nobody listens."""
