"""The best weights are found and kept, whatever became of the pointer to them."""

import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from brainenc.errors import CheckpointUnusable
from brainenc.train import best, checkpoint
from brainenc.train.checkpoint import Contents, Position
from brainenc.train.evaluate import open_run
from brainenc.train.launch import resume, train
from brainenc.train.run_folder import RunFolder

_OVERFITS = {"learning_rate": 0.3, "epochs": 4, "keep": 1, "seed": 3}
"""So fast that later epochs are worse, and only the pointer or the score keeps an early one."""

_KILLED = """
import os, signal, sys
from pathlib import Path
from brainenc.train.config import TrainConfig
from brainenc.train.launch import train
from brainenc.train.run_folder import RunFolder

plain, left = RunFolder.point, [int(sys.argv[2])]

def point(self, which, **fields):
    if which == "best":
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
    plain(self, which, **fields)

RunFolder.point = point
train(TrainConfig.from_yaml(Path(sys.argv[1]).read_text()))
"""


def save(folder: RunFolder, step: int, perf: float | None, *, value: float = 0.0, run: str = "") -> str:
    weights = torch.full((2, 3), value)
    made = checkpoint.write(
        folder.checkpoints,
        Contents(
            position=Position(step=step, epoch=step // 5, validated=step // 5, val_perf=perf),
            weights=lambda: {"weight": weights}, optimizer={"state": {}}, config={"id": run},
        ),
    )  # fmt: skip
    return made.name


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    made = RunFolder(tmp_path / "run")
    made.checkpoints.mkdir(parents=True)
    return made


def test_pruning_spares_the_highest_score_though_nothing_points_to_it(folder):
    names = [save(folder, step, perf) for step, perf in ((5, 0.1), (10, 0.5), (15, 0.3), (20, None), (25, 0.2))]

    checkpoint.prune(folder.checkpoints / names[-1], keep=1, best=names[0])

    assert sorted(p.name for p in folder.checkpoints.iterdir()) == sorted([names[0], names[1], names[4]])


def test_pruning_does_not_take_a_checkpoint_cut_short_or_of_another_run_for_the_best(folder):
    before = save(folder, 5, 0.9, run="before")
    names = [save(folder, step, perf, run="now") for step, perf in ((10, 0.8), (15, 0.3), (20, 0.2))]
    (folder.checkpoints / names[0] / checkpoint.WEIGHTS).write_bytes(b"short")

    checkpoint.prune(folder.checkpoints / names[-1], keep=1)

    assert sorted(p.name for p in folder.checkpoints.iterdir()) == sorted([before, *names[1:]])


@pytest.mark.parametrize("pointer", [None, "lesser", "gone", "right"])
def test_the_pointer_is_put_right(folder, pointer):
    lesser, right = save(folder, 5, 0.1), save(folder, 10, 0.5)
    save(folder, 15, 0.5)
    if pointer:
        name = {"lesser": lesser, "gone": "epoch9_step99", "right": right}[pointer]
        folder.point("best", checkpoint=name, epoch=2, step=10, val_perf=0.5 if pointer == "right" else 0.1)
    notes = []

    found = best.settle(folder, "", notes.append)

    assert (found.folder.name, found.val_perf) == (right, 0.5), "of equals the first, as training keeps it"
    assert folder.pointed("best") == {"checkpoint": right, "epoch": 2, "step": 10, "val_perf": 0.5}
    assert len(notes) == (pointer != "right")


def test_a_damaged_best_gives_way_to_the_next_and_is_said(folder):
    second, first = save(folder, 5, 0.1), save(folder, 10, 0.5)
    path = folder.checkpoints / first / checkpoint.WEIGHTS
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    folder.point("best", checkpoint=first, epoch=2, step=10, val_perf=0.5)
    notes = []

    assert best.settle(folder, "", notes.append).folder.name == second
    assert folder.pointed("best")["val_perf"] == 0.1
    assert f"{first} is damaged" in notes[0]


def test_a_score_that_is_only_in_the_pointer_counts(folder):
    """Checkpoints of earlier versions do not know their own."""
    name = save(folder, 5, None)
    folder.point("best", checkpoint=name, epoch=1, step=5, val_perf=0.4)

    assert best.settle(folder, "", print).val_perf == 0.4


def test_a_checkpoint_from_before_its_validation_is_replaced_by_the_one_after(folder):
    early = Position(step=5, epoch=0)
    what = {"weights": lambda: {"weight": torch.zeros(2)}, "optimizer": {"state": {}}}
    checkpoint.write(folder.checkpoints, Contents(position=early, **what))
    after = Position(step=5, epoch=0, validated=1, val_perf=0.25)

    path = checkpoint.write(folder.checkpoints, Contents(position=after, **what))

    assert checkpoint.verify(path).position == after
    assert checkpoint.verify(checkpoint.write(folder.checkpoints, Contents(position=early, **what))).position == after


# ---------------------------------------------------------------------- whole runs


def ends(out) -> dict:
    """What a run ends with."""
    folder = RunFolder(out)
    pointed = folder.pointed("best")
    return {
        "best": pointed, "scores": json.loads(folder.scores_file.read_text()),
        "weights": load_file(folder.checkpoints / pointed["checkpoint"] / checkpoint.WEIGHTS),
        "arrays": {path.name: np.load(path) for path in folder.predictions.glob("*.npy")},
    }  # fmt: skip


def assert_same(one: dict, other: dict) -> None:
    assert (one["best"], one["scores"]) == (other["best"], other["scores"])
    for kind in ("weights", "arrays"):
        assert one[kind].keys() == other[kind].keys()
        assert all((np.asarray(one[kind][k]) == np.asarray(other[kind][k])).all() for k in one[kind])


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory):
    """A run whose best validation is not its last two, and what it ended with."""
    config = small.config(tmp_path_factory.mktemp("whole") / "run", **_OVERFITS)
    assert train(config).status == "done"
    made = ends(config.out)
    assert made["best"]["epoch"] < config.epochs - 2, "keep=1 holds the last; the best is older"
    return config, made


@pytest.mark.chaos
def test_a_kill_between_the_two_pointers_does_not_cost_the_best(small, tmp_path, whole):
    """At each time that best.json would be written."""
    _, wanted = whole
    for number in range(2):
        config = small.config(tmp_path / f"run{number}", **_OVERFITS)
        given = tmp_path / f"{number}.yaml"
        given.write_text(config.to_yaml())
        command = [sys.executable, "-c", _KILLED, str(given), str(number)]
        ended = subprocess.run(command, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
        if number and ended.returncode == 0:  # only one validation was ever the best
            continue
        assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()

        result = resume(config.out)

        assert (result.status, result.val_perf) == ("done", wanted["best"]["val_perf"])
        assert_same(ends(config.out), wanted)


def test_a_run_without_its_pointer_is_evaluated_and_goes_on_with_the_best(tmp_path, whole, caplog):
    config, wanted = whole
    out = tmp_path / "run"
    shutil.copytree(config.out, out)
    folder = RunFolder(out)
    (folder.checkpoints / "best.json").unlink()

    opened = open_run(out)

    assert opened.checkpoint == wanted["best"]["checkpoint"]
    assert f"using {opened.checkpoint}" in caplog.text
    assert folder.pointed("best") is None, "evaluating writes no pointers"
    assert resume(out).val_perf == wanted["best"]["val_perf"]
    assert_same(ends(out), wanted)
    (folder.checkpoints / "best.json").unlink()
    longer = resume(out, {"epochs": config.epochs + 1})
    assert longer.val_perf >= wanted["best"]["val_perf"]
    assert (folder.checkpoints / wanted["best"]["checkpoint"]).is_dir()


def test_a_run_whose_best_is_damaged_says_the_score_of_what_is_left(tmp_path, whole):
    config, wanted = whole
    out = tmp_path / "run"
    shutil.copytree(config.out, out)
    folder = RunFolder(out)
    checkpoint.discard(folder.checkpoints / wanted["best"]["checkpoint"])

    result = resume(out)

    left = checkpoint.newest([folder.checkpoints]).manifest.position
    assert result.val_perf == left.val_perf < wanted["best"]["val_perf"]
    assert folder.pointed("best")["step"] == left.step
    shutil.rmtree(folder.checkpoints)
    with pytest.raises(CheckpointUnusable, match="no checkpoint that can be used"):
        open_run(out)
