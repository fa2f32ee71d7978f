"""A run and a store whose addresses hold keys: trained, gone on with, scored, and the keys are nowhere."""

import json

import s3fs

from brainenc.cli.main import run as brainenc
from brainenc.featurestore import open_store
from brainenc.featurestore.transfer import copy
from tests.featurestore.conftest import KEY, SECRET, keyed_bucket, moto_server, s3  # noqa: F401


def test_a_run_with_keys_in_its_addresses_leaves_none_behind(keyed_bucket, small, tmp_path, capsys, caplog):  # noqa: F811
    store, run = f"{keyed_bucket}/features", f"{keyed_bucket}/run"
    bare = run.replace(f"{KEY}:{SECRET}@", "")
    copy(local := open_store(small.store), open_store(store, create=True), local.keys())
    options = [
        "train", "--subject-dir", str(small.subject_dir), "--feature", "tiny/1.q", "--store", store, "--out", run,
        "--hidden", "16", "--heads", "2", "--feedforward", "32", "--batch-size", "8", "--threads", "1",
        "--workers", "0",
    ]  # fmt: skip

    assert brainenc([*options, "--epochs", "1"]) == 0
    said = capsys.readouterr()
    texts = [said.out, said.err]
    assert f"{bare}: done" in said.out
    for arguments in (
        ["train", "--resume", run, "--store", store, "--epochs", "2", "--json"],
        ["evaluate", run],
        ["report", run],
        ["predict", run],
        ["attention", run, "--json"],
        ["ensemble", run, "--out", str(tmp_path / "ensemble")],
        [*options, "--epochs", "2", "--seed", "7"],
        ["--debug", "train", "--resume", f"{keyed_bucket}/nothing"],
    ):
        brainenc(arguments)
        said = capsys.readouterr()
        texts += [said.out, said.err]

    assert f'"run_folder": "{bare}"' in texts[2]
    fs = s3fs.S3FileSystem(key="test", secret="test", skip_instance_cache=True, use_listings_cache=False)
    files = {str(p): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    files |= {path: fs.cat_file(path) for path in fs.find(keyed_bucket.rpartition("@")[2])}
    assert any(name.endswith("config.yaml") for name in files)
    assert any(b'"epoch": 1' in data for name, data in files.items() if name.endswith("last.json")), "it went on"
    for secret in (KEY, SECRET):
        assert not [text for text in (*texts, caplog.text) if secret in text]
        assert not [name for name, data in files.items() if secret in name or secret.encode() in data]


def test_what_a_checkpoint_and_trackers_are_told_of_a_run_holds_no_key(small, tmp_path):
    config = small.config(tmp_path / "run", store=f"s3://{KEY}:{SECRET}@bucket/features")
    with_source = config.to_dict() | {"source": {"backbone": f"https://h/x?token={SECRET}"}}

    public = type(config).from_dict(with_source).to_public_dict()

    assert SECRET not in json.dumps(public)
    assert public["store"] == "s3://bucket/features"
