"""Runs started as users start them: in this process, and on Ray's workers."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
from ray.train import ControllerError

from brainenc.cli.main import run as brainenc
from brainenc.errors import ProvenanceMismatch, TrainingFailed, UsageError
from brainenc.train import launch
from brainenc.train.config import TrainConfig, Workers
from brainenc.train.elsewhere import resume_command
from brainenc.train.launch import resume, train
from brainenc.train.on_ray import cluster
from brainenc.train.on_ray.cluster import RayThere
from brainenc.train.on_ray.fit import Stopper, fit
from brainenc.train.run_folder import RunFolder


def test_a_run_leaves_what_it_promises(small, tmp_path):
    """Configuration, split, records, checkpoints with pointers, scores, predictions; and progress comes as it goes."""
    seen, out = [], tmp_path / "run"

    result = train(small.config(out), progress=seen.append)

    assert (result.status, result.exit_code, result.step) == ("done", 0, 10)
    config = TrainConfig.from_yaml((out / "config.yaml").read_text())
    assert replace(config, id="") == small.config(out)
    assert config.id
    indices = np.load(out / "idxs.npy")
    assert sorted(indices) == list(range(45))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["split"] == "train"] == list(range(1, 11))
    assert {"epoch", "step", "split", "loss", "lr", "grad_norm", "samples_per_s", "data_wait_share", "run"} <= set(
        lines[0]
    )
    last = [line for line in lines if line["split"] == "val"][-1]
    assert last["val_perf"] == pytest.approx((last["r_lh"] + last["r_rh"]) / 2)
    assert {s["step"] for s in seen} == {line["step"] for line in lines}
    assert json.loads((out / "checkpoints/last.json").read_text())["checkpoint"] == "epoch1_step10"
    assert json.loads((out / "checkpoints/best.json").read_text())["val_perf"] == result.val_perf
    for side, vertices in (("lh", 30), ("rh", 26)):
        predicted = np.load(out / f"predictions/{side}_pred_test.npy")
        assert (predicted.dtype, predicted.shape) == (np.float32, (5, vertices))
        assert np.isfinite(predicted).all()
    assert not (out / ".snapshots").exists()
    assert "PPA" in json.loads((out / "scores.json").read_text())["rois"]["lh"]


def test_evaluate_repeats_the_validation_and_predict_the_predictions(small, tmp_path, capsys):
    out = tmp_path / "run"
    result = train(small.config(out))
    predictions = np.load(out / "predictions/lh_pred_test.npy")

    assert brainenc(["evaluate", str(out), "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert brainenc(["predict", str(out), "--out", str(tmp_path / "again")]) == 0

    assert table["val_perf"] == pytest.approx(result.val_perf, abs=1e-6)
    assert (table["split"], table["n_images"]) == ("val", 5)
    assert np.array_equal(np.load(tmp_path / "again/lh_pred_test.npy"), predictions)


def test_a_resumed_run_may_not_become_another(small, tmp_path):
    out = tmp_path / "run"
    train(small.config(out, predict=False))

    with pytest.raises(UsageError, match="batch_size: 8 in the run, 4 now"):
        resume(out, {"batch_size": 4})
    more = resume(out, {"epochs": 3})

    assert (more.status, more.step) == ("done", 15)
    assert RunFolder(out).config().epochs == 3


def test_a_run_is_trained_by_one_process_at_a_time(small, tmp_path):
    out = tmp_path / "run"
    train(small.config(out, epochs=1, predict=False))

    with RunFolder(out).held():
        result = resume(out, {"epochs": 2})

    assert "is being trained by process" in str(result.error)
    assert resume(out, {"epochs": 2}).status == "done"


def test_what_another_run_left_in_the_same_place_is_not_taken(small, tmp_path):
    """Its configuration is gone, its checkpoints are not: the new run begins at the beginning, and says why."""
    out = tmp_path / "run"
    train(small.config(out, predict=False))
    (out / "config.yaml").unlink()
    notes = []

    result = train(small.config(out, epochs=1, predict=False), note=notes.append)

    assert (result.status, result.step) == ("done", 5)
    assert any("belongs to another run" in note for note in notes)


def test_a_run_goes_on_with_the_data_it_began_with(small, tmp_path):
    """The store was made again from another layer under the same name."""
    from brainenc.featurestore.store import open_store

    out, other = tmp_path / "run", tmp_path / "store"
    train(small.config(out, predict=False))
    with open_store(other, create=True).writer(
        "subj01-train/tiny/1.q", ids=[f"nsd-{i:05d}" for i in range(45)], row_shape=(17, 16), identity={"layer": "7"}
    ) as writer:
        writer.append(np.zeros((45, 17, 16), np.float16))

    with pytest.raises(ProvenanceMismatch, match=r"features: stored .*, wanted .*'layer': '7'"):
        resume(out, {"store": str(other), "epochs": 3})


def test_what_is_no_run_folder_is_said(tmp_path, capsys):
    assert brainenc(["train", "--resume", str(tmp_path)]) == 2
    assert "is no run folder" in capsys.readouterr().err


def test_the_command_line_takes_the_published_flags_and_answers_with_todays(small, tmp_path, capsys):
    code = brainenc([
        "train", "--data_dir", str(small.subject_dir.parent), "--subj", "1", "--saved_feats_dir", str(small.store),
        "--feature", "tiny/1.q", "--encoder_arch", "transformer", "--readout_res", "streams_inc", "--batch_size", "20",
        "--output_dir", str(tmp_path / "run"), "--epochs", "1", "--heads", "2", "--workers", "0", "--json",
    ])  # fmt: skip
    out, err = capsys.readouterr()

    assert code == 0, err
    assert json.loads(out)["status"] == "done"
    assert f"--subject-dir {small.subject_dir}" in err
    assert "--readout streams_inc" in err
    assert RunFolder(tmp_path / "run").config().batch_size == 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers", "two"], "neither a number nor a range"),
        (["--workers", "4:2"], "a range goes up"),
        (["--drill", "flood@step=1"], "is no drill"),
        (["--precision", "float8"], "Invalid value"),
        (["--saved_feats", "vgg"], "There is no preset 'vgg'"),
        (["--on-the-fly"], "--backbone"),
    ],
)
def test_wrong_usage_exits_with_2(small, tmp_path, capsys, arguments, message):
    given = [
        "train",
        "--subject-dir",
        str(small.subject_dir),
        "--out",
        str(tmp_path / "run"),
        "--store",
        str(small.store),
    ]

    assert brainenc([*given, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_ray_client_address_is_refused(small, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")

    with pytest.raises(UsageError, match="ray job submit"):
        train(small.config(tmp_path / "run", workers="1"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("how", ["python", "command line", "the same command"])
def test_a_run_that_goes_on_is_left_alone_where_its_address_is_refused(small, tmp_path, capsys, how):
    out = tmp_path / "run"
    train(small.config(out, epochs=1, predict=False))
    (out / "idxs.npy").unlink()  # would be made again
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}

    if how == "python":
        with pytest.raises(UsageError, match="ray job submit"):
            resume(out, {"epochs": 2, "address": "ray://head:10001"})
    else:
        given = ["--resume", out] if how == "command line" else ["--subject-dir", small.subject_dir, "--out", out]
        assert brainenc(["train", *map(str, given), "--epochs", "2", "--address", "ray://head:10001"]) == 2
        assert "ray job submit" in capsys.readouterr().err

    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_run_does_not_go_on_where_it_was_but_where_it_is_told(small, tmp_path, monkeypatch):
    """The Ray that is joined is asked for by each command; a folder of an older brainenc may still hold an address."""
    out, joined = tmp_path / "run", []
    train(small.config(out, epochs=1, predict=False))
    with open(out / "config.yaml", "a") as file:
        file.write("address: 10.0.0.5:6379\n")
    monkeypatch.setattr(launch, "train_on_ray", lambda config, *rest: joined.append(config.address) or 1 / 0)

    for changes in ({}, {"address": "10.0.0.9:6379"}):
        with pytest.raises(ZeroDivisionError):
            resume(out, {"epochs": 2, "workers": "1", **changes})

    assert joined == [None, "10.0.0.9:6379"]
    assert "address:" not in (out / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("device", "gpus", "workers", "each"),
    [
        ("auto", 0, 1, {"CPU": 1}),
        ("auto", 4, 4, {"CPU": 1, "GPU": 1}),
        ("cpu", 4, 1, {"CPU": 1}),
        ("cuda", 4, 4, {"CPU": 1, "GPU": 1}),
        ("cuda", 0, 1, {"CPU": 1, "GPU": 1}),
    ],
)
def test_workers_follow_from_the_gpus_that_ray_has(device, gpus, workers, each):
    assert cluster.default_workers(device, gpus) == Workers(low=workers, high=workers)
    assert cluster.per_worker(device, gpus) == each


def test_gpus_that_are_not_there_yet_are_waited_for_on_a_cluster_and_refused_here(small, tmp_path):
    """Of a cluster whose GPU machines an autoscaler brings, nobody can see them before they are asked for."""
    config, two = small.config(tmp_path / "run", device="cuda"), Workers(low=2, high=2)
    each = {"CPU": 1.0, "GPU": 1.0}

    assert "2 are needed" in cluster.about_gpus(config, two, each, RayThere(gpus=0, may_grow=True))
    assert cluster.about_gpus(config, two, each, RayThere(gpus=2, may_grow=True)) == ""
    with pytest.raises(UsageError, match="needs 2 GPUs, and this machine has 1"):
        cluster.about_gpus(config, two, each, RayThere(gpus=1, may_grow=False))
    guess = replace(config, device="auto")
    assert "--device cuda" in cluster.about_gpus(guess, two, {"CPU": 1.0}, RayThere(gpus=0, may_grow=True))
    assert cluster.about_gpus(guess, two, {"CPU": 1.0}, RayThere(gpus=0, may_grow=False)) == ""


@pytest.mark.ray
def test_the_cluster_is_asked_for_its_gpus_not_the_driver(small, tmp_path, ray_session, monkeypatch):
    """Torch of the driver would have three; Ray, which was joined, has none."""
    monkeypatch.setattr(cluster, "_gpus_here", lambda: 3)

    with cluster.joined(small.config(tmp_path / "run", address="auto"), None) as there:
        assert (there.gpus, there.may_grow, there.lost) == (0, True, False)


def test_workers_are_a_number_or_a_range():
    assert Workers.parse("1:4") == Workers(low=1, high=4)
    assert Workers.parse("2") == Workers(low=2, high=2)


def test_sigterm_saves_and_exits_75_and_resume_goes_on(small, tmp_path):
    """A process of its own, as Slurm or a person would end it."""
    out = tmp_path / "run"
    arguments = [
        "train", "--subject-dir", str(small.subject_dir), "--store", str(small.store), "--feature", "tiny/1.q",
        "--heads", "2", "--out", str(out), "--workers", "0", "--epochs", "100000", "--no-predict",
    ]  # fmt: skip
    program = f"import sys; sys.path[:0] = {sys.path!r}; from brainenc.cli.main import main; main({arguments!r})"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    watcher = threading.Timer(90, process.kill)
    watcher.start()
    while process.poll() is None and not (out / "checkpoints/last.json").exists():
        time.sleep(0.05)

    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate()
    watcher.cancel()

    assert process.returncode == 75
    assert f"brainenc train --resume {out}" in text
    emergency = [p.name for p in (out / "checkpoints").iterdir() if p.name.startswith("emergency_")]
    assert len(emergency) == 1
    step = int(emergency[0].rpartition("step")[2])
    assert resume(out, {"epochs": step // 5 + 1}).status == "done"


def test_what_goes_on_with_a_run_can_be_typed_as_it_is_printed(small, tmp_path, capsys):
    """A folder with a blank, and a bucket, whose local copy is nobody's business."""
    out = tmp_path / "first run"
    arguments = [
        "train", "--subject-dir", str(small.subject_dir), "--store", str(small.store), "--feature", "tiny/1.q",
        "--heads", "2", "--workers", "0", "--no-predict", "--drill", "sigterm@step=6", "--out",
    ]  # fmt: skip
    assert brainenc([*arguments, str(out)]) == 75
    out_text, err = capsys.readouterr()
    assert f"brainenc train --resume '{out}'\nWhat the guard saw: brainenc guard status '{out}'\n" in out_text
    assert "  - Train: every batch\n" in err
    assert f"To go on: brainenc train --resume '{out}'\n" in (out / "incident-1.txt").read_text()
    with pytest.raises(UsageError, match=re.escape(f"`brainenc train --resume '{out}'`")):
        RunFolder(out).create(small.config(out))

    url = "memory://bucket/told"
    assert brainenc([*arguments, url]) == 75
    assert f"brainenc train --resume {url}" in capsys.readouterr().out
    account = fsspec.filesystem("memory").cat("/bucket/told/incident-1.txt").decode()
    assert f"To go on: brainenc train --resume {url}\n" in account


def test_no_credentials_are_in_the_command_that_goes_on():
    wanted = "brainenc train --resume s3://bucket/run --address auto"
    assert resume_command("s3://KEY:SECRET@bucket/run", "auto") == wanted


@pytest.mark.ray
@pytest.mark.chaos
def test_two_workers_of_ray_survive_a_kill_and_end_where_one_ends(small, tmp_path, ray_session, losses):
    """SIGKILL to rank 1 in step 7: the run restarts by itself, and the losses are those of one undisturbed worker."""
    one, two = (small.config(tmp_path / name, dropout=0.0) for name in ("one", "two"))
    train(one)
    seen = []
    two = TrainConfig.from_dict({**two.to_dict(), "workers": "2", "drill": ["kill@step=6,rank=1"]})

    result = train(two, progress=seen.append)

    assert result.status == "done", result.reason
    assert losses(Path(two.out)) == pytest.approx(losses(Path(one.out)), rel=1e-5)
    assert {s["step"] for s in seen if s["split"] == "train"} == set(range(1, 11))
    runs = {r["step"]: r["run"] for r in RunFolder(two.out).metrics()}
    assert runs[1] == 0
    assert runs[10] == 1
    assert (tmp_path / "two/.ray").is_dir()
    assert os.environ.get("RAY_ADDRESS") is None


class Failing:
    """Stands for Ray's trainers: each fails in its turn, until one returns."""

    def __init__(self, *errors: Exception) -> None:
        self.errors, self.made = list(errors), 0

    def __call__(self):
        self.made += 1
        return self

    def fit(self) -> str:
        if self.errors:
            raise self.errors.pop(0)
        return "fitted"


def test_another_controller_goes_on_where_rays_was_killed(tmp_path, small):
    """Ray's memory monitor kills the controller's helpers first, and the controller then fails for good."""
    trainers, notes = Failing(ControllerError(RuntimeError("a helper died"))), []
    config, stopper = small.config(tmp_path / "run", max_failures=1), Stopper(RunFolder(tmp_path / "run"), None)

    assert fit(config, trainers, stopper, notes.append) == "fitted"

    assert trainers.made == 2
    assert "another goes on from the newest checkpoint" in notes[0]


def test_controllers_are_replaced_as_often_as_the_run_allows(tmp_path, small):
    trainers = Failing(*[ControllerError(RuntimeError("a helper died")) for _ in range(3)])
    config, stopper = small.config(tmp_path / "run", max_failures=2), Stopper(RunFolder(tmp_path / "run"), None)

    with pytest.raises(TrainingFailed, match=r"a helper died.*--resume"):
        fit(config, trainers, stopper, lambda text: None)

    assert trainers.made == 3


def test_no_controller_follows_when_everybody_was_asked_to_stop(tmp_path, small):
    trainers, config = Failing(ControllerError(RuntimeError("gone"))), small.config(tmp_path / "run", max_failures=5)
    stopper = Stopper(RunFolder(tmp_path / "run"), None)
    stopper.reason = "the driver received SIGTERM"

    with pytest.raises(TrainingFailed, match="gone"):
        fit(config, trainers, stopper, lambda text: None)

    assert trainers.made == 1


@pytest.mark.chaos
def test_nobody_waits_for_a_ray_whose_head_was_stopped_as_well(tmp_path, small, monkeypatch):
    """It would wait a minute, and then end this process. One look that fails is not enough."""
    monkeypatch.setattr("brainenc.train.on_ray.fit._LOST_AFTER", 2)
    config, stopper = small.config(tmp_path / "run"), Stopper(RunFolder(tmp_path / "run"), None)
    stopper.reason = "the driver received SIGTERM"
    trainers, looks = Failing(), iter([True, False, True, True])
    never = threading.Event()
    trainers.fit = never.wait

    with pytest.raises(TrainingFailed, match="head has ended"):
        fit(config, trainers, stopper, lambda text: None, lost=lambda: next(looks))

    assert next(looks, None) is None
    never.set()


def test_a_head_that_does_not_answer_is_none_of_a_drivers_business_before_it_is_asked_to_stop(tmp_path, small):
    config, stopper = small.config(tmp_path / "run"), Stopper(RunFolder(tmp_path / "run"), None)
    trainers = Failing()
    trainers.fit = lambda: time.sleep(1.1) or "fitted"

    assert fit(config, trainers, stopper, lambda text: None, lost=lambda: pytest.fail("it was asked")) == "fitted"


class Tripped:
    """Stands for the handle of the guard's coordinator."""

    def __init__(self):
        self.orders = []

    def trip(self, kind, reason):
        self.orders.append((kind, reason))


@pytest.mark.root
@pytest.mark.parametrize("guarded", [True, False])
def test_a_signal_reaches_the_coordinator_though_the_run_folder_takes_no_file(small_disk, capsys, guarded):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    coordinator = Tripped() if guarded else None
    stopper = Stopper(RunFolder(small_disk), coordinator)

    stopper(signal.SIGTERM)

    assert stopper.reason == "the driver received SIGTERM"
    assert coordinator is None or coordinator.orders == [("stop", "the driver received SIGTERM")]
    said = capsys.readouterr().err
    assert f"could not be written to {small_disk}/.order.json" in said
    assert ("send the signal again" in said) != guarded


def test_a_head_is_lost_when_nothing_listens_there():
    listening = socket.create_server(("127.0.0.1", 0))
    there = RayThere(gpus=0, may_grow=True, head=f"127.0.0.1:{listening.getsockname()[1]}")
    assert not there.lost
    listening.close()
    assert there.lost
    assert not RayThere(gpus=0, may_grow=True).lost


def test_the_same_command_again_says_how_it_is_guarded(small, tmp_path, capsys):
    command = [
        "train", "--subject-dir", str(small.subject_dir), "--store", str(small.store), "--feature", "tiny/1.q", "--out",
        str(tmp_path / "run"), "--hidden", "16", "--heads", "2", "--feedforward", "32", "--batch-size", "8",
        "--threads", "1", "--workers", "0", "--ram", "0.8,0.83", "--on-critical", "stop",
    ]  # fmt: skip
    for epochs in "12":
        assert brainenc([*command, "--epochs", epochs]) == 0
        said = capsys.readouterr().err
        assert "RAM usage: warning at 80%, emergency at 83%" in said
        assert "Halve the micro-batch" not in said


@pytest.mark.parametrize("as_it_was", [False, True], ids=["with another threshold", "as it was"])
def test_a_resumed_run_is_guarded_as_it_says(small, tmp_path, capsys, as_it_was):
    """By the thresholds and the action that the run was begun with, but for what is said anew."""
    out = tmp_path / "run"
    train(small.config(out, epochs=1, workers="0", predict=False, guard={"ram": [0.8, 0.83], "on_critical": "stop"}))
    given = ["--resume", str(out), "--epochs", "2"]
    if not as_it_was:
        given += ["--gpu", "0.7,0.75"]

    assert brainenc(["train", *given]) == 0

    said = capsys.readouterr().err
    assert "RAM usage: warning at 80%, emergency at 83%" in said
    assert "Halve the micro-batch" not in said
    assert ("GPU usage: warning at 70%, emergency at 75%" in said) != as_it_was
    wanted = {"ram": [0.8, 0.83], "on_critical": "stop"} | ({} if as_it_was else {"gpu": [0.7, 0.75]})
    assert {k: list(v) if k != "on_critical" else v for k, v in RunFolder(out).config().guard.items()} == wanted
