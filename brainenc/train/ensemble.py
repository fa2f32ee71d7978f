"""Several runs as one: each vertex trusts the runs that predict it well.

The weight of a run at a vertex is the softmax, over runs, of its validation correlation times a temperature. Runs may
differ in layers, seeds, backbones, encoders; they share the subject and the test images.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from brainenc import atomic
from brainenc.datasets.algonauts import Subject
from brainenc.datasets.rois import FAMILIES, HEMISPHERES, Hemisphere
from brainenc.errors import DataError, UsageError
from brainenc.featurestore.places import may_be_mapped
from brainenc.scoring import mean_r, pearson
from brainenc.train.run_folder import RunFolder, save_array

TEMPERATURE = 40.0
"""As published."""

Floats = npt.NDArray[np.float32]


def vertex_weights(correlations: npt.NDArray[Any], temperature: float = TEMPERATURE) -> Floats:
    """Weight of each run at each vertex.

    Args:
        correlations: array of shape (n_runs, V); NaN (a constant vertex or prediction) counts as 0.
        temperature: 0 weighs all runs alike; the larger, the more the best one counts.

    Returns:
        array of shape (n_runs, V); columns sum to 1.
    """
    scores = temperature * np.nan_to_num(np.asarray(correlations, dtype=np.float64))
    powers = np.exp(scores - scores.max(axis=0))
    weights: Floats = (powers / powers.sum(axis=0)).astype(np.float32)
    return weights


def combine(predictions: Sequence[npt.NDArray[Any]], weights: Floats) -> Floats:
    """Sum of predictions (n_stimuli, V) of each run, weighted per vertex by (n_runs, V)."""
    total = np.zeros(predictions[0].shape, np.float32)
    for predicted, weight in zip(predictions, weights, strict=True):
        total += weight * predicted
    return total


@dataclass(frozen=True, kw_only=True, slots=True)
class EnsembleResult:
    """What was combined, and how well it does where that is known."""

    out: Path
    runs: tuple[Path, ...]
    temperature: float
    shares: Mapping[Hemisphere, tuple[float, ...]]
    """Hemisphere -> mean weight of each run."""
    test_r: Mapping[str, float] | None
    """Mean correlation on the test images of each run, by its path, and of ``ensemble``; None without responses."""


def ensemble(runs: Sequence[str | Path], out: str | Path, *, temperature: float = TEMPERATURE) -> EnsembleResult:
    """Combine the test predictions of runs into a run folder of their own, which can be submitted.

    Written: ``predictions/{lh,rh}_pred_test.npy``, ``{lh,rh}_weights.npy`` (n_runs, V), ``ensemble.json`` and the
    first run's ``config.yaml`` with this folder as ``out``.

    Raises:
        UsageError: fewer than two runs, runs of several subjects, or of a family of ROIs; ``out`` holds a run.
        DataError: a run has no validation correlations or test predictions, or their shapes differ.
    """
    folders = [RunFolder(Path(run).absolute()) for run in runs]
    target = RunFolder(Path(out).absolute())
    if target.config_file.exists():
        raise UsageError(f"{target.path} holds a run already: choose another --out for the ensemble, or remove it.")
    subject = _common_subject(folders, temperature)
    gathered = {h: _gather(folders, h) for h in HEMISPHERES}
    target.create(replace(folders[0].config(), out=str(target.path)))
    atomic.make_dirs(target.predictions)
    shares, combined = {}, {}
    for h, (correlations, predictions) in gathered.items():
        weights = vertex_weights(correlations, temperature)
        combined[h] = combine(predictions, weights)
        shares[h] = tuple(float(w) for w in weights.mean(axis=1))
        save_array(target.predictions / f"{h}_weights.npy", weights)
        save_array(target.predictions / f"{h}_pred_test.npy", combined[h])
    scores = _test_scores(subject, [str(f.path) for f in folders], {h: g[1] for h, g in gathered.items()}, combined)
    result = EnsembleResult(
        out=target.path, runs=tuple(f.path for f in folders), temperature=temperature, shares=shares, test_r=scores
    )
    atomic.replace(target.path / "ensemble.json", json.dumps(_plain(result), indent=1).encode() + b"\n")
    return result


def _common_subject(folders: Sequence[RunFolder], temperature: float) -> Subject:
    if len(folders) < 2:
        raise UsageError(f"An ensemble wants two runs at least, found {len(folders)}.")
    if not np.isfinite(temperature) or temperature < 0:
        raise UsageError(f"The temperature must be 0 or more, found {temperature}.")
    configs = [folder.config() for folder in folders]
    if partial := [str(f.path) for f, c in zip(folders, configs, strict=True) if c.encoder.readout in FAMILIES]:
        raise UsageError(f"{', '.join(partial)} predict a family of ROIs only, 0 elsewhere: leave them out.")
    names = {Path(config.subject_dir).name for config in configs}
    if len(names) > 1:
        raise UsageError(f"The runs are of different subjects: {', '.join(sorted(names))}. Combine those of one.")
    return Subject.open(configs[0].subject_dir)


def _gather(folders: Sequence[RunFolder], hemisphere: Hemisphere) -> tuple[npt.NDArray[Any], list[npt.NDArray[Any]]]:
    """Correlations (n_runs, V), and test predictions of each run as maps."""
    correlations = [_load(f, f"{hemisphere}_val_corr.npy", "brainenc evaluate", 1) for f in folders]
    predictions = [_load(f, f"{hemisphere}_pred_test.npy", "brainenc predict", 2) for f in folders]
    shapes = {f.path.name: (c.shape, p.shape) for f, c, p in zip(folders, correlations, predictions, strict=True)}
    first = predictions[0].shape
    if any(c.shape != first[1:] or p.shape != first for c, p in zip(correlations, predictions, strict=True)):
        listing = "; ".join(f"{name}: correlations {c}, predictions {p}" for name, (c, p) in shapes.items())
        raise DataError(f"The {hemisphere} arrays of the runs do not go together: {listing}. Were images added?")
    return np.stack(correlations), predictions


def _load(folder: RunFolder, name: str, advice: str, ndim: int) -> npt.NDArray[Any]:
    path = folder.predictions / name
    try:
        found: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise DataError(f"{folder.path} has no predictions/{name}. Make it with `{advice} {folder.path}`.") from None
    except ValueError as error:
        raise DataError(
            f"{path} is no whole NumPy file: {error}. Make it again with `{advice} {folder.path}`."
        ) from error
    if found.ndim != ndim:
        raise DataError(f"{path} holds an array of shape {found.shape}, wanted {ndim} dimension(s).")
    return found


def _test_scores(
    subject: Subject, names: Sequence[str], predictions: Mapping[Hemisphere, Sequence[npt.NDArray[Any]]],
    combined: Mapping[Hemisphere, Floats],
) -> dict[str, float] | None:  # fmt: skip
    try:
        measured = {h: subject.responses(h, "test", mapped=may_be_mapped(subject.folder)) for h in HEMISPHERES}
    except DataError:  # participants do not have them
        return None
    if any(len(measured[h]) != len(combined[h]) for h in HEMISPHERES):
        return None
    scores = {
        name: float(np.mean([mean_r(pearson(predictions[h][i], measured[h])) for h in HEMISPHERES]))
        for i, name in enumerate(names)
    }
    return scores | {"ensemble": float(np.mean([mean_r(pearson(combined[h], measured[h])) for h in HEMISPHERES]))}


def _plain(result: EnsembleResult) -> dict[str, Any]:
    return {
        "out": str(result.out), "runs": [str(run) for run in result.runs], "temperature": result.temperature,
        "shares": {h: list(s) for h, s in result.shares.items()}, "test_r": result.test_r,
    }  # fmt: skip
