"""Ways to train that change how and not what: precision, compilation, several features, trackers, drills."""

import json
import math
import os
import re
import sys

import numpy as np
import pytest
import torch

from brainenc.cli.train_options import preset_feature
from brainenc.errors import NoSpace, UnknownName, UsageError
from brainenc.guard.messages import NullGuard
from brainenc.train import checkpoint
from brainenc.train.config import TrainConfig
from brainenc.train.drills import Drills, Planned
from brainenc.train.launch import resume, train
from brainenc.train.orders import FolderOrders, Hearing, clear, give
from brainenc.train.run_folder import RunFolder


@pytest.mark.parametrize(
    "features", [("tiny/1.q", "tiny/2.token"), ("tiny/1.q:cls",), ("tiny/1.q", "tiny/2.token:mean")]
)
def test_features_are_joined_and_parts_chosen(small, tmp_path, features):
    result = train(small.config(tmp_path / "run", features=features, epochs=1))

    assert result.status == "done"
    assert np.load(tmp_path / "run/predictions/lh_pred_test.npy").shape == (5, 30)


def test_bfloat16_is_close_to_float32(small, tmp_path, losses):
    for precision in ("float32", "bfloat16"):
        train(small.config(tmp_path / precision, precision=precision, dropout=0.0, epochs=1, predict=False))

    one, other = losses(tmp_path / "float32"), losses(tmp_path / "bfloat16")
    assert one != other
    assert one == pytest.approx(other, rel=0.03)


def test_a_smaller_micro_batch_changes_memory_and_not_the_loss(small, tmp_path, losses):
    for micro_batch in (None, 3):
        train(small.config(tmp_path / str(micro_batch), micro_batch=micro_batch, dropout=0.0, predict=False))

    assert losses(tmp_path / "3") == pytest.approx(losses(tmp_path / "None"), rel=1e-5)


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_a_compiled_step_computes_the_same(small, tmp_path, losses):
    """Minutes of compiling on a slow machine, so not among the quick tests."""
    for compiled in (False, True):
        config = small.config(tmp_path / str(compiled), compile=compiled, dropout=0.0, epochs=1, predict=False)
        result = train(config)
        assert result.status == "done", result.reason

    assert losses(tmp_path / "True") == pytest.approx(losses(tmp_path / "False"), rel=1e-4)


def test_tensorboard_gets_the_figures(small, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(small.config(tmp_path / "run", trackers=("tensorboard",), predict=False))

    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    assert {"train/loss", "train/lr", "train/grad_norm", "val/val_perf"} <= set(events.Tags()["scalars"])
    assert [e.step for e in events.Scalars("train/loss")] == list(range(1, 11))


def test_weights_and_biases_gets_the_figures_under_the_same_run_after_a_resume(small, tmp_path, monkeypatch):
    """The library is not needed for this: the seam is four calls."""
    from types import SimpleNamespace

    logged, begun = [], []

    def init(**fields):
        begun.append(fields)
        return SimpleNamespace(log=lambda figures, step: logged.append((step, figures)), finish=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    train(small.config(tmp_path / "run", trackers=("wandb",), predict=False))
    resume(tmp_path / "run", {"epochs": 3})

    assert {step for step, _ in logged} == set(range(1, 16))
    assert {b["id"] for b in begun} == {"run"}
    assert {b["resume"] for b in begun} == {"allow"}
    assert "train/grad_norm" in logged[0][1]


def test_an_unknown_tracker_is_named(small, tmp_path):
    with pytest.raises(UnknownName, match="tensorboard, wandb"):
        raise train(small.config(tmp_path / "run", trackers=("mlflow",))).error


def test_the_guard_of_a_run_shrinks_then_stops_in_a_drill(small, tmp_path):
    """Real watcher process, real coordinator; only the reading is pretended."""
    config = small.config(
        tmp_path / "run", guard={"on_critical": "stop"}, drill=("ram=0.99@step=3",), epochs=10**6, log_every=1000
    )

    result = train(config)

    assert (result.status, result.exit_code) == ("stopped", 75)
    assert "RAM usage is 99.0%" in result.reason
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "run/guard.jsonl").read_text().splitlines()]
    assert {"order", "ack", "incident"} <= set(kinds)
    assert f"emergency_epoch{result.epoch}_step{result.step}" in result.checkpoint


def test_a_configuration_survives_yaml(small, tmp_path):
    config = small.config(
        tmp_path / "run", guard={"ram": [0.5, 0.6]}, drill=("kill@step=1,rank=1",), trackers=("wandb",)
    )

    assert TrainConfig.from_yaml(config.to_yaml()) == config


def test_the_address_of_a_cluster_is_of_one_command_and_kept_nowhere(small, tmp_path):
    """``auto`` would join whichever Ray runs when somebody goes on with the run."""
    config = small.config(tmp_path / "run", address="auto")

    assert "address:" not in config.to_yaml()
    assert "address" not in config.to_public_dict()
    assert config.to_dict()["address"] == "auto"
    older = config.to_yaml() + "address: 10.0.0.5:6379\n"
    assert TrainConfig.from_yaml(older).address is None


def test_published_names_mean_what_they_meant():
    """``--enc_output_layer`` counts from the end; the last layer of dinov2 is the normalised output."""
    assert preset_feature("dinov2_q") == "dinov2-base/11.q"
    assert preset_feature("dinov2_q", 3) == "dinov2-base/9.q"
    assert preset_feature("dinov2") == "dinov2-base/norm.token"
    assert preset_feature("dinov2", 2) == "dinov2-base/10.token"
    assert preset_feature("resnet50") == "resnet50/layer4.token"
    with pytest.raises(UsageError, match="has 12 layers"):
        preset_feature("dinov2_q", 13)


def test_a_drill_happens_once_in_the_life_of_a_run(tmp_path):
    planned = [Planned.parse("oom@step=4,rank=1")]

    def drills() -> Drills:
        return Drills(planned, marks=tmp_path / "marks", guard=NullGuard(), driver_pid=0, driver_host="")

    drills().at(step=3, rank=1)
    drills().at(step=4, rank=0)
    with pytest.raises(torch.OutOfMemoryError):
        drills().at(step=4, rank=1)
    drills().at(step=4, rank=1)


@pytest.mark.parametrize(
    ("drill", "said"),
    [
        ("ram=0.95@step=3,rank=1", "rank 0 alone"),
        ("oom@step=10", "the run has 10 steps"),
        ("ram=0.5@step=3", "the guard acts from 0.88 on"),
        ("gpu=0.92@step=3", "the guard acts from 0.92 on"),
        ("ram=95@step=3", "looks like percent; wanted is a fraction: 0.95"),
        ("ram=1.2@step=3", "is no fraction"),
        ("ram=0@step=3", "is no fraction"),
        ("ram@step=10", "Write for example ram=0.95@step=40"),
        ("ram=1.2.3@step=3", "'1.2.3' is no number"),
        ("ram=0.95", "@step= is missing. Write for example ram=0.95@step=40"),
        ("oom=3@step=3", "oom takes no number"),
        ("fire@step=3", "one of oom, kill, sigterm, ram, gpu"),
    ],
)
def test_a_drill_that_cannot_happen_is_refused_before_a_folder_is_made(small, tmp_path, drill, said):
    with pytest.raises(UsageError, match=re.escape(said)):
        train(small.config(tmp_path / "run", drill=(drill,), guard={}))

    assert not (tmp_path / "run").exists()


def test_a_drill_of_the_guard_is_refused_without_it(small, tmp_path):
    with pytest.raises(UsageError, match="leave out --no-guard"):
        train(small.config(tmp_path / "run", drill=("ram=0.95@step=3",)))


def test_drills_that_did_not_happen_are_told_at_the_end_and_new_ones_happen_after_a_resume(small, tmp_path):
    """The first is for a step that the run never comes by; a mark is of one drill, not of its place in the list."""
    notes = []
    stopped = train(
        small.config(tmp_path / "run", drill=("sigterm@step=3", "sigterm@step=9"), predict=False), note=notes.append
    )
    assert stopped.exit_code == 75
    assert notes[-1] == f"Drills that have not happened by step {stopped.step}: sigterm@step=9."
    again = resume(tmp_path / "run", {"drill": ("sigterm@step=8", "oom@step=2")}, note=notes.append)

    assert again.exit_code == 75
    assert notes[-1] == f"Drills that have not happened by step {again.step}: oom@step=2."


def test_a_drill_signals_no_stranger_on_another_machine(tmp_path):
    planned = [Planned.parse("sigterm@step=4")]
    drills = Drills(
        planned, marks=tmp_path / "marks", guard=NullGuard(), driver_pid=os.getpid(), driver_host="elsewhere"
    )

    with pytest.raises(UsageError, match="which runs on elsewhere"):
        drills.at(step=4, rank=0)


def test_an_order_in_the_run_folder_is_heard_now_and_then(tmp_path):
    folder, now = RunFolder(tmp_path), [0.0]
    source = FolderOrders(folder, lambda: now[0])
    guard = Hearing(NullGuard(), [source])

    assert guard.pending() is None
    give(folder, "checkpoint", "by hand")
    assert guard.pending() is None, "a look costs: not at every step"
    now[0] = 1.0
    assert guard.pending().reason == "by hand"
    guard.saved(path="x", step=1, epoch=0)
    assert guard.pending() is None
    give(folder, "stop", "enough")
    now[0] = 2.0
    assert guard.pending().kind == "stop"
    guard.saved(path="x", step=1, epoch=0)
    assert guard.pending().kind == "stop"
    clear(folder)


@pytest.mark.parametrize("text", ["[]", '{"kind": "dance", "reason": "x"}', '{"kind": []}', "null", '{"kind": "st'])
def test_a_damaged_order_is_told_once_and_ignored(tmp_path, caplog, text):
    folder, now = RunFolder(tmp_path), [0.0]
    source = FolderOrders(folder, lambda: now[0])
    (tmp_path / ".order.json").write_text(text)

    for now[0] in (1.0, 2.0, 3.0):
        assert source.pending() is None
    assert [record.getMessage().split(" (")[0] for record in caplog.records] == [
        f"{tmp_path}/.order.json holds no order and is ignored"
    ]
    give(folder, "stop", "enough")
    now[0] = 4.0
    assert source.pending().kind == "stop"


def test_figures_of_a_step_are_sensible(small, tmp_path):
    train(small.config(tmp_path / "run", predict=False))

    for line in RunFolder(tmp_path / "run").metrics():
        if line["split"] == "train":
            assert line["lr"] == 5e-4
            assert line["grad_norm"] > 0
            assert line["samples_per_s"] > 0
            assert 0 <= line["data_wait_share"] <= 1
            assert math.isfinite(line["loss"])


@pytest.mark.parametrize("times", [1, 100])
def test_a_checkpoint_that_cannot_be_written_is_borne_and_many_are_not(small, tmp_path, monkeypatch, times):
    """A disk that is full for a while costs a note; one that stays so ends the run, saved elsewhere."""
    left, plain = [times], checkpoint.write

    def full(root, contents, **kwargs):
        if root.name == "checkpoints" and left[0]:
            left[0] -= 1
            raise NoSpace(28, "No space left for a checkpoint")
        return plain(root, contents, **kwargs)

    monkeypatch.setattr(checkpoint, "write", full)
    notes = []

    result = train(small.config(tmp_path / "run", epochs=6, predict=False), note=notes.append)

    assert any("could not be written" in note for note in notes)
    if times == 1:
        assert result.status == "done"
    else:
        assert result.status == "failed"
        assert "No space left" in str(result.error)
        assert ".snapshots" in result.checkpoint
