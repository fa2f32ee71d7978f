"""The whole path in a bucket, every process killed on the way: nothing is lost, nothing is there twice."""

import hashlib
import json

import numpy as np
import pytest

from brainenc.cli.main import run as brainenc
from brainenc.featurestore import open_store
from brainenc.featurestore.places.object import ObjectPlace
from tests.extract.killing import family, finish, kill, start, wait_for

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]
STORE, RUN = "gs://lab/features", "gs://lab/runs/first"


@pytest.fixture
def subject(tmp_path):
    folder = tmp_path / "subj01"
    made = ["data", "synth", "--out", str(folder), "--n-train", "40", "--n-test", "8", "--vertices", "24,26"]
    assert brainenc(made) == 0
    return folder


def extraction(subject, store):
    where = ["--subject-dir", str(subject), "--store", str(store), "--backbone", str(subject.parent / "backbone")]
    return ["extract", *where, "--feature", "-1.q", "--rows-per-shard", "8", "--batch-size", "4", "--json"]


def shards(store):
    """Name -> hash of every shard and receipt."""
    names = [entry.name for entry in store.place.list() if "/shard-" in entry.name]
    return {name: hashlib.sha256(store.place.read(name)).hexdigest() for name in names}


def in_bucket(gcs, text):
    return [name for name in gcs.names("lab") if text in name]


def test_extract_and_train_in_a_bucket_with_everything_killed(gcs, subject, tmp_path, monkeypatch):
    local = tmp_path / "local"
    assert brainenc(extraction(subject, local)) == 0
    wanted = shards(open_store(local))

    monkeypatch.setenv("BRAINENC_CACHE", str(tmp_path / "machine-a"))
    log = tmp_path / "extract.log"
    process = start(extraction(subject, STORE), log=log)
    assert wait_for(lambda: len(in_bucket(gcs, ".arrow")) > 2, process)
    kill(family(process))
    process.wait()
    for skip in (3, 20, 40):
        gcs.fault("upload_.*", "commit_reset", skip=skip)
        gcs.fault(".*", "status", skip=skip)
    finish(start(extraction(subject, STORE), log=log), log=log)
    assert shards(open_store(STORE)) == wanted
    assert brainenc(["store", "verify", STORE]) == 0

    feature = open_store(STORE).keys()[0].partition("/")[2]
    log = tmp_path / "train.log"
    training = ["train", "--subject-dir", str(subject), "--store", STORE, "--feature", feature, "--out", RUN]
    process = start([*training, "--workers", "0", "--epochs", "20", "--checkpoint-every", "1s"], log=log)
    assert wait_for(lambda: len(in_bucket(gcs, "/manifest.json")) > 0, process)
    kill(family(process))
    process.wait()

    monkeypatch.setenv("BRAINENC_CACHE", str(tmp_path / "machine-b"))
    log = tmp_path / "resume.log"
    resumed = start([*training, "--workers", "0", "--epochs", "20", "--checkpoint-every", "1s", "--json"], log=log)
    done = finish(resumed, log=log)
    assert (done["status"], done["run_folder"]) == ("done", RUN)
    place = ObjectPlace(RUN)
    records = [json.loads(line) for line in place.read("metrics.jsonl").decode().splitlines()]
    assert {r["epoch"] for r in records if r.get("split") == "val"} == set(range(20))
    assert len({r["run"] for r in records}) == 2, "it went on, it did not begin again"
    assert np.isfinite(json.loads(place.read("checkpoints/best.json"))["val_perf"])


def test_ranks_on_nodes_that_share_no_disk_keep_one_run_in_the_bucket(cluster, gcs, subject, tmp_path, monkeypatch):
    """Two nodes with a cache folder each and a driver with another one; then the driver's machine goes on alone."""
    assert brainenc(extraction(subject, STORE)) == 0
    for node in ("node-a", "node-b"):
        (tmp_path / node).mkdir()
        scratch = {"BRAINENC_CACHE": str(tmp_path / node), "STORAGE_EMULATOR_HOST": gcs.url}
        cluster.add_node(num_cpus=1, object_store_memory=100_000_000, env_vars=scratch, include_dashboard=False)
    cluster.wait_for_nodes()
    monkeypatch.setenv("BRAINENC_CACHE", str(tmp_path / "driver"))
    feature = open_store(STORE).keys()[0].partition("/")[2]
    where = ["--subject-dir", str(subject), "--store", STORE, "--feature", feature, "--out", RUN]
    log = tmp_path / "train.log"
    process = start(
        ["train", *where, "--workers", "2", "--epochs", "2", "--address", cluster.address, "--json"], log=log
    )
    done = finish(process, log=log)
    assert (done["status"], done["run_folder"]) == ("done", RUN)
    driver = next((tmp_path / "driver" / "runs").glob("first-*[!k]"))
    assert not list(driver.glob("checkpoints/*/manifest.json")), "the ranks were on the other nodes"
    assert len(in_bucket(gcs, "/manifest.json")) == 2
    assert in_bucket(gcs, "predictions/lh_pred_test.npy")
    assert brainenc(["train", "--resume", RUN, "--epochs", "3", "--workers", "0"]) == 0
    records = [json.loads(line) for line in ObjectPlace(RUN).read("metrics.jsonl").decode().splitlines()]
    assert {r["epoch"] for r in records if r.get("split") == "val"} == {0, 1, 2}
    assert len({r["run"] for r in records}) == 2
