"""Training with everything on an object store, over a bad network, on machines that come and go."""

import json

import numpy as np
import pytest

from brainenc.cli.main import run as brainenc
from brainenc.featurestore import open_store
from brainenc.featurestore.places.object import ObjectPlace
from brainenc.featurestore.transfer import copy

RUN = "gs://lab/runs/first"


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """Gives this process the cache folder of another machine."""

    def be(name):
        monkeypatch.setenv("BRAINENC_CACHE", str(tmp_path / name))

    be("machine-a")
    return be


@pytest.fixture
def features(gcs, small):
    """The small subject's store, copied to the bucket; the copying is not what is tested here."""
    copy(local := open_store(small.store), target := open_store("gs://lab/features", create=True), local.keys())
    gcs.clear()
    return target


def options(small, out, *more):
    given = (
        "--hidden",
        "16",
        "--heads",
        "2",
        "--feedforward",
        "32",
        "--batch-size",
        "8",
        "--threads",
        "1",
        "--no-guard",
    )
    what = ("--subject-dir", str(small.subject_dir), "--feature", "tiny/1.q", "--out", str(out))
    return ["train", *what, *given, "--workers", "0", *more]


def validations(lines):
    records = [json.loads(line) for line in lines.splitlines()]
    return {r["epoch"]: (r["r_lh"], r["r_rh"], r["loss"]) for r in records if r.get("split") == "val"}


@pytest.mark.usefixtures("features")
def test_a_run_in_a_bucket_equals_a_local_one_whatever_the_network_does(gcs, small, tmp_path, machine, capsys):
    """Two epochs here, two more on another machine, with lost answers, errors, resets and wrong bodies on the way."""
    local = tmp_path / "local"
    assert brainenc([*options(small, local, "--store", str(small.store)), "--epochs", "4"]) == 0
    for fault, op in (("commit_reset", "upload_.*"), ("status", ".*"), ("reset", "media"), ("flip", "media"),
                      ("short", "media"), ("commit_status", "upload_simple")):  # fmt: skip
        for skip in (2, 11):
            gcs.fault(op, fault, skip=skip)
    assert brainenc([*options(small, RUN, "--store", "gs://lab/features"), "--epochs", "2"]) == 0
    assert f"{RUN}: done" in capsys.readouterr().out
    machine("machine-b")
    assert brainenc(["train", "--resume", RUN, "--epochs", "4"]) == 0
    place = ObjectPlace(RUN)
    assert validations(place.read("metrics.jsonl").decode()) == validations((local / "metrics.jsonl").read_text())
    for name in ("lh_pred_test.npy", "rh_pred_test.npy"):
        assert place.read(f"predictions/{name}") == (local / "predictions" / name).read_bytes()
    machine("machine-c")
    assert brainenc(["evaluate", RUN]) == 0
    assert "val_perf" in capsys.readouterr().out
    assert place.size("scores.json")
    assert len([entry for entry in gcs.log if entry.action]) >= 10, "the faults did happen"


@pytest.mark.usefixtures("features")
def test_no_credential_and_no_local_path_is_needed_to_go_on_elsewhere(small, tmp_path, machine):
    assert brainenc([*options(small, RUN, "--store", "gs://lab/features"), "--epochs", "1"]) == 0
    import shutil

    shutil.rmtree(tmp_path / "machine-a")
    machine("machine-b")
    assert brainenc(["train", "--resume", RUN, "--epochs", "2"]) == 0
    pointed = json.loads(ObjectPlace(RUN).read("checkpoints/last.json"))
    assert pointed["epoch"] == 1
    assert np.isfinite(json.loads(ObjectPlace(RUN).read("checkpoints/best.json"))["val_perf"])


@pytest.mark.usefixtures("features")
def test_the_same_command_goes_on_with_a_run_in_a_bucket_and_another_one_is_refused(small, machine, capsys):
    command = [*options(small, RUN, "--store", "gs://lab/features"), "--epochs", "1"]
    assert brainenc(command) == 0
    machine("machine-b")
    assert brainenc([*command[:-1], "2"]) == 0
    assert json.loads(ObjectPlace(RUN).read("checkpoints/last.json"))["epoch"] == 1
    capsys.readouterr()
    assert brainenc([*command, "--seed", "7"]) == 2
    assert "seed" in capsys.readouterr().err


def test_keys_in_an_address_reach_no_file(small):
    config = small.config("run", store="s3://AKIAEXAMPLE:topsecret@bucket/features")
    assert "topsecret" not in config.to_yaml() + json.dumps(config.to_public_dict())
    assert config.to_dict()["store"].startswith("s3://AKIAEXAMPLE:topsecret@"), "workers need them"
