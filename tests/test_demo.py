"""The whole path as a newcomer types it: what it leaves behind, what it reaches, what it takes; and a control."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import psutil
import pytest

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

BRAINENC = [sys.executable, "-m", "brainenc"]


def pss(pid: int) -> int:
    """Proportional set size of a process in bytes, 0 when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


class Watched:
    """Largest sum of proportional set sizes of a command and all that it started, sampled while it runs."""

    def __init__(self, process: subprocess.Popen) -> None:
        self.peak_bytes, self._root = 0, psutil.Process(process.pid)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._end.wait(1.0):  # a look at all of them takes a tenth of a second of the demo's own time
            try:
                family = [self._root, *self._root.children(recursive=True)]
            except psutil.NoSuchProcess:
                return
            self.peak_bytes = max(self.peak_bytes, sum(pss(one.pid) for one in family))

    def stop(self) -> int:
        self._end.set()
        self._thread.join()
        return self.peak_bytes


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> dict:
    """One run of the demo; its result, folder and memory."""
    out = tmp_path_factory.mktemp("demo") / "out"
    process = subprocess.Popen(
        [*BRAINENC, "demo", "--out", str(out), "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )  # fmt: skip
    watched = Watched(process)
    stdout, stderr = process.communicate(timeout=360)
    peak = watched.stop()
    assert process.returncode == 0, stderr[-4000:]
    return {"out": out, "peak_bytes": peak, **json.loads(stdout.splitlines()[-1])}


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
