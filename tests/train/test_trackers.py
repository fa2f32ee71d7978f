"""Figures that cannot be written cost no step of training."""

from contextlib import suppress

import pytest

from brainenc import records
from brainenc.train.launch import resume, train
from brainenc.train.trackers import open_trackers


def fill(disk):
    with suppress(OSError), open(disk / "fill", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


@pytest.mark.root
def test_on_a_full_disk_figures_are_lost_and_training_is_told_once(small_disk, caplog):
    tracker = open_trackers((), small_disk, run=0, config={})
    tracker.record({"step": 1, "split": "train", "loss": 0.5})
    fill(small_disk)
    for step in range(2, 200):
        tracker.record({"step": step, "split": "train", "loss": 0.5})
    (small_disk / "fill").unlink()
    tracker.record({"step": 200, "split": "train", "loss": 0.5})
    tracker.close()

    written = [r["step"] for r in records.read(small_disk / "metrics.jsonl")]
    assert (written[0], written[-1]) == (1, 200)
    told = [record.getMessage() for record in caplog.records]
    assert told == [f"Training goes on, although writing figures to {small_disk}/metrics.jsonl failed; told once."]


@pytest.mark.root
def test_scores_that_cannot_be_written_end_no_training(small, tmp_path, small_disk):
    """The disk is full at the second validation, a best one; the first one's scores do not stay."""
    validations, notes, there = [], [], []

    def follow(record):
        if record.get("split") == "val":
            validations.append(record["best"])
            there.append((small_disk / "run/scores.json").exists())
            if len(validations) == 2:
                fill(small_disk)
            else:
                (small_disk / "fill").unlink(missing_ok=True)

    config = small.config(small_disk / "run", epochs=3, seed=2, predict=False, snapshot_dir=str(tmp_path / "snapshots"))
    result = train(config, progress=follow, note=notes.append)

    assert (result.status, result.exit_code) == ("done", 0), result.reason
    assert validations[:2] == [True, True], "this test needs a second one that is better"
    assert there == [False, True, False]
    assert sum("The scores of step" in note for note in notes) == 1


def test_a_tracker_that_fails_keeps_figures_from_no_other(tmp_path, monkeypatch, caplog):
    class Offline:
        def __init__(self, folder):
            pass

        def record(self, fields):
            raise ConnectionError("no network")

        def close(self):
            raise ConnectionError("no network")

    monkeypatch.setattr("brainenc.train.trackers.TensorBoard", Offline)
    tracker = open_trackers(("tensorboard",), tmp_path, run=0, config={})
    for step in (1, 2):
        tracker.record({"step": step, "split": "train"})
    tracker.close()

    assert [r["step"] for r in records.read(tmp_path / "metrics.jsonl")] == [1, 2]
    assert [record.getMessage() for record in caplog.records] == [
        "Training goes on, although writing figures to tensorboard failed; told once.",
        "Training goes on, although closing tensorboard failed; told once.",
    ]


def test_notes_that_cannot_be_written_end_no_training(small, tmp_path, caplog):
    log = tmp_path / "run/train.log"
    train(small.config(tmp_path / "run", epochs=1, workers="0", predict=False))
    log.unlink(missing_ok=True)
    log.mkdir()

    result = resume(tmp_path / "run", {"epochs": 2})  # which notes from where it goes on

    assert (result.status, result.exit_code) == ("done", 0), result.reason
    assert any(f"although writing to {log}" in record.getMessage() for record in caplog.records)
