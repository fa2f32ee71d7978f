"""The whole path as a newcomer types it: what it leaves behind, what it reaches, what it takes; and a control."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

BRAINENC = [sys.executable, "-m", "brainenc"]


@pytest.fixture(scope="module")
def demo(demo_beside) -> dict:
    """One run of the demo; its result, folder and memory."""
    return demo_beside.result()


def test_it_reaches_four_fifths_of_the_planted_ceiling(demo):
    assert demo["share"] >= 0.8
    truth = json.loads((demo["out"] / "data" / "subj01" / "truth.json").read_text())
    assert demo["max_val_perf"] == pytest.approx(truth["max_val_perf"])


def test_all_its_processes_fit_in_four_gigabytes(demo):
    assert 0 < demo["peak_bytes"] < 4e9


def test_it_leaves_what_a_participant_hands_in(demo):
    predictions = demo["out"] / "run" / "predictions"
    n_test = len(list((demo["out"] / "data" / "subj01" / "test_split" / "test_images").iterdir()))
    for hemisphere, n_vertices in (("lh", 480), ("rh", 520)):
        predicted = np.load(predictions / f"{hemisphere}_pred_test.npy")
        assert predicted.dtype == np.float32
        assert predicted.shape == (n_test, n_vertices)
        assert np.load(predictions / f"{hemisphere}_val_corr.npy").shape == (n_vertices,)


def test_it_draws_accuracy_per_roi(demo):
    assert Path(demo["picture"]).read_bytes().startswith(b"\x89PNG")


def test_the_same_command_again_finds_it_done(demo):
    again = subprocess.run(
        [*BRAINENC, "demo", "--out", str(demo["out"]), "--json"], capture_output=True, text=True, timeout=200
    )  # fmt: skip

    assert again.returncode == 0, again.stderr[-4000:]
    assert json.loads(again.stdout.splitlines()[-1])["val_perf"] == demo["val_perf"]


def test_shuffled_responses_stay_at_chance(demo, tmp_path):
    out = demo["out"]
    what = ["--subject-dir", out / "data" / "subj01", "--store", out / "store", "--feature", "dino-mini/2.q"]
    how = ["--shuffle-responses", "--epochs", 2, "--lr", 0.002, "--workers", 0, "--out", tmp_path / "run", "--json"]
    command = [str(word) for word in [*BRAINENC, "train", *what, *how]]
    control = subprocess.run(command, capture_output=True, text=True, timeout=200)

    assert control.returncode == 0, control.stderr[-4000:]
    assert abs(json.loads(control.stdout.splitlines()[-1])["val_perf"]) < 0.1
