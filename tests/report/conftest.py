"""A run folder as training leaves one, without training: files in the documented form, for a small made-up subject."""

import json

import numpy as np
import pytest
import yaml

from brainenc import scoring
from brainenc.datasets.algonauts import Subject
from brainenc.datasets.cortex import made_up_atlas, write_atlas
from brainenc.datasets.rois import HEMISPHERES

VERTICES = (60, 70)
N_TRAIN, N_TEST = 30, 6


def make_subject(folder):
    """Files only as large as reports and submissions look at: empty images, flat responses."""
    write_atlas(folder, made_up_atlas(VERTICES, 0), 0)
    for split, n in (("training", N_TRAIN), ("test", N_TEST)):
        images = folder / f"{split}_split/{split}_images"
        images.mkdir(parents=True)
        for i in range(n):
            (images / f"{'train' if split == 'training' else 'test'}-{i + 1:04d}_nsd-{i:05d}.png").touch()
    (folder / "training_split/training_fmri").mkdir()
    (folder / "test_split/noise_ceiling").mkdir()
    for hemisphere, n in zip(HEMISPHERES, VERTICES, strict=True):
        np.save(
            folder / f"training_split/training_fmri/{hemisphere}_training_fmri.npy", np.zeros((N_TRAIN, n), np.float32)
        )
        np.save(folder / f"test_split/noise_ceiling/{hemisphere}_noise_ceiling.npy", np.full(n, 0.49))
    (folder / "truth.json").write_text(json.dumps({"max_val_perf": 0.7}))
    return Subject.open(folder)


def scores_of(subject, r):
    rois = {
        h: {
            name: {"r": None if np.isnan(v) else v, "vertices": int(subject.rois.masks(h)[name].sum())}
            for name, v in scoring.roi_means(r[h], subject.rois.masks(h)).items()
        }
        for h in HEMISPHERES
    }
    return {"val_perf": scoring.val_perf(r["lh"], r["rh"]), "score": 51.25, "rois": rois}


@pytest.fixture
def run(tmp_path):
    """(run folder, Subject, r of each vertex)."""
    subject = make_subject(tmp_path / "subj03")
    folder = tmp_path / "runs" / "first <run>"
    (folder / "predictions").mkdir(parents=True)
    rng = np.random.default_rng(0)
    r = {h: rng.uniform(0, 0.7, n) for h, n in zip(HEMISPHERES, VERTICES, strict=True)}
    for hemisphere, n in zip(HEMISPHERES, VERTICES, strict=True):
        np.save(folder / f"predictions/{hemisphere}_val_corr.npy", r[hemisphere].astype(np.float32))
        np.save(folder / f"predictions/{hemisphere}_pred_test.npy", rng.standard_normal((N_TEST, n)).astype(np.float32))
    config = {
        "subject_dir": str(subject.folder),
        "features": ["mini/2.q"],
        "encoder": {"encoder": "transformer", "readout": "rois_all"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "scores.json").write_text(json.dumps(scores_of(subject, r)))
    lines = [
        {
            "run": 0,
            "epoch": 0,
            "step": 1,
            "split": "train",
            "loss": 3.0,
            "samples_per_s": 50.0,
            "data_wait_share": 0.01,
        },
        {
            "run": 0,
            "epoch": 0,
            "step": 2,
            "split": "train",
            "loss": 2.0,
            "samples_per_s": 70.0,
            "data_wait_share": 0.03,
        },
        {"run": 0, "epoch": 0, "step": 2, "split": "val", "loss": 9.0, "val_perf": 0.9},
        {
            "run": 1,
            "epoch": 0,
            "step": 2,
            "split": "train",
            "loss": 1.9,
            "samples_per_s": 60.0,
            "data_wait_share": 0.02,
        },
        {"run": 1, "epoch": 0, "step": 2, "split": "val", "loss": 1.8, "val_perf": 0.35},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"torn": ')
    return folder, subject, r
