"""The whole path as a newcomer types it: what it leaves behind, what it reaches, what it takes; and a control."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def demo(demo_beside) -> dict:
    """One run of the demo: what it printed and where it is."""
    return {"out": demo_beside.out, **demo_beside.result("demo")}


def test_it_reaches_four_fifths_of_the_planted_ceiling(demo):
    assert demo["share"] >= 0.8
    truth = json.loads((demo["out"] / "data" / "subj01" / "truth.json").read_text())
    assert demo["max_val_perf"] == pytest.approx(truth["max_val_perf"])


def test_all_its_processes_fit_in_four_gigabytes(demo, demo_beside):
    assert 0 < demo_beside.peak_bytes < 4e9


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


def test_the_same_command_again_finds_it_done(demo, demo_beside):
    assert demo_beside.result("again")["val_perf"] == demo["val_perf"]


def test_shuffled_responses_stay_at_chance(demo_beside):
    assert abs(demo_beside.result("shuffled")["val_perf"]) < 0.1
