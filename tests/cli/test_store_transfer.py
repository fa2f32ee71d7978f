"""The commands that move features between stores and files."""

import json

import numpy as np
import pytest

from brainenc.cli.main import run
from brainenc.featurestore import open_store

TRAIN, TEST = "subj01-train/dinov2-base/11.q", "subj01-test/dinov2-base/11.q"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BRAINENC_CACHE", str(tmp_path / "brainenc-cache"))


@pytest.fixture
def store(tmp_path):
    made = open_store(tmp_path / "store", create=True)
    for key, n in ((TRAIN, 6), (TEST, 2)):
        rows = np.random.default_rng(n).standard_normal((n, 4, 3)).astype(np.float16)
        with made.writer(key, ids=[f"nsd-{i:05d}" for i in range(n)], row_shape=(4, 3), rows_per_shard=4) as writer:
            writer.append(rows)
    return made


def test_cp_copies_and_says_what_was_there(store, tmp_path, capsys):
    target = str(tmp_path / "copy")
    assert run(["store", "cp", store.url, target]) == 0
    assert "2 collections, 3 shards copied" in capsys.readouterr().out
    assert run(["store", "cp", store.url, target, "*-train/*/*", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["keys"], told["shards"], told["shards_there"]) == ([TRAIN], 0, 2)
    assert np.array_equal(open_store(target)[TRAIN][:], store[TRAIN][:])


def test_cp_to_a_drive_says_that_nothing_is_confirmed(store, tmp_path, capsys):
    assert run(["store", "cp", store.url, str(tmp_path / "drive"), "--stage"]) == 0
    assert "Handed over to the drive, not confirmed" in capsys.readouterr().err


def test_what_was_written_staged_is_read_staged_without_the_flag(store, tmp_path, capsys):
    drive = str(tmp_path / "drive")
    assert run(["store", "cp", store.url, drive, "--stage", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["confirmed"] is False
    opened = open_store(drive)
    assert not opened.place.can.mappable
    assert np.array_equal(opened[TRAIN][:], store[TRAIN][:])
    assert open_store(drive, stage=False).place.can.mappable, "who says otherwise is believed"
    assert open_store(store.url).place.can.mappable
    assert run(["store", "cp", drive, str(tmp_path / "back"), "--no-source-stage"]) == 0
    assert open_store(tmp_path / "back").keys() == store.keys()


def test_export_and_import_say_that_nothing_is_confirmed(store, tmp_path, monkeypatch, capsys):
    np.save(tmp_path / "rows.npy", np.ones((3, 2), np.float32))
    rows = [str(tmp_path / "rows.npy"), "--key", "s/net/1.q"]
    assert run(["store", "import", str(tmp_path / "drive"), *rows, "--stage"]) == 0
    assert "Handed over to the drive, not confirmed" in capsys.readouterr().err
    assert run(["store", "import", str(tmp_path / "disk"), *rows]) == 0
    assert run(["store", "export", store.url, TEST, "--out", str(tmp_path / "out"), "--no-stage"]) == 0
    assert "Handed over" not in capsys.readouterr().err
    monkeypatch.setattr("brainenc.featurestore.places.mount.needs_staging", lambda path: path.name == "mounted")
    assert run(["store", "export", store.url, TEST, "--out", str(tmp_path / "mounted")]) == 0
    assert "Handed over to the drive, not confirmed" in capsys.readouterr().err


def test_cp_of_an_unknown_key_fails_with_those_there_are(store, tmp_path, capsys):
    assert run(["store", "cp", store.url, str(tmp_path / "copy"), "no/such/1.q"]) == 1
    assert TRAIN in capsys.readouterr().err
    assert not (tmp_path / "copy").exists()


def test_export_for_the_old_code_says_what_its_loader_wants(store, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(["store", "export", store.url, TRAIN, "--layout", "adeli", "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert "dinov2_q_last/01/train.npy: 6x4x3 float32" in said.out
    assert "clip_vit_512/" in said.err
    assert np.load(out / "dinov2_q_last/01/synt.npy").shape == (2, 4, 3)
    assert run(["store", "export", store.url, TRAIN, "--layout", "adeli", "--out", str(out), "--json"]) == 0
    assert all(file["there"] for file in json.loads(capsys.readouterr().out)["files"])


def test_export_takes_the_clip_features_of_the_images_that_test_names(store, tmp_path, capsys):
    for key, n in (("mine/q/11.q", 6), ("held_out/q/11.q", 2), ("mine/clip/p.token", 6), ("held_out/clip/p.token", 2)):
        shape = (4, 512) if "clip" in key else (4, 3)
        with store.writer(key, ids=[f"nsd-{i:05d}" for i in range(n)], row_shape=shape) as writer:
            writer.append(np.full((n, *shape), n, np.float16))
    out = tmp_path / "out"
    options = ["--layout", "adeli", "--out", str(out), "--subject", "3", "--clip", "mine/clip/p.token"]
    assert run(["store", "export", store.url, "mine/q/11.q", *options]) == 2
    assert "--test KEY" in capsys.readouterr().err
    assert run(["store", "export", store.url, "mine/q/11.q", *options, "--test", "held_out/q/11.q"]) == 0
    assert np.load(out / "clip_vit_512/03/synt.npy").shape == (2, 4, 512)
    assert np.load(out / "clip_vit_512/03/train.npy").shape == (6, 4, 512)


def test_export_of_many_as_plain_files(store, tmp_path, capsys):
    assert run(["store", "export", store.url, "*/*/11.q", "--out", str(tmp_path / "out"), "--dtype", "stored"]) == 0
    assert np.load(tmp_path / f"out/{TEST}.npy").dtype == np.float16


def test_import_of_the_old_codes_files(store, tmp_path, capsys):
    run(["store", "export", store.url, TRAIN, "--layout", "adeli", "--out", str(tmp_path / "out")])
    again = str(tmp_path / "again")
    folder = str(tmp_path / "out/dinov2_q_last/01")
    assert run(["store", "import", again, folder, "--dtype", "float16"]) == 0
    said = capsys.readouterr()
    assert f"{TRAIN}: 6x4x3 float16" in said.out
    assert "has rows of 4 x 3; the published code's dinov2_q_last are 962 x 768" in said.err
    assert run(["store", "import", str(tmp_path / "named"), folder, "--backbone", "dino-mini"]) == 0
    assert "Note" not in capsys.readouterr().err
    assert np.array_equal(open_store(again)[TEST][:], store[TEST][:])


@pytest.mark.parametrize("inside", [False, True])
def test_import_files_only_what_it_knows_by_name(tmp_path, monkeypatch, capsys, inside):
    for parent in ("clip_vit_512", "my_resnet"):
        (tmp_path / parent / "01").mkdir(parents=True)
        for name, n in (("train", 3), ("synt", 2)):
            np.save(tmp_path / parent / "01" / f"{name}.npy", np.ones((n, 4, 512), np.float32))
    store = str(tmp_path / "s")

    def imported(parent, *more):
        monkeypatch.chdir(tmp_path / parent / "01" if inside else tmp_path)
        return run(["store", "import", store, "." if inside else f"{parent}/01", *more])

    assert imported("clip_vit_512") == 0
    assert imported("my_resnet") == 2
    said = capsys.readouterr().err
    assert "does not say what its rows are" in said
    assert "--backbone dinov2-base --feature 11.q" in said
    assert imported("my_resnet", "--backbone", "resnet50") == 2
    assert imported("my_resnet", "--key", "subj01-train/resnet50/layer4.token") == 2
    assert "two splits" in capsys.readouterr().err
    keys = ["subj01-test/clip-vit-512/proj.token", "subj01-train/clip-vit-512/proj.token"]
    assert open_store(store).keys() == keys
    assert imported("my_resnet", "--backbone", "resnet50", "--feature", "layer4.token") == 0
    assert "subj01-train/resnet50/layer4.token" in open_store(store)


def test_import_of_one_file_and_of_one_file_an_image(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for n in range(3):
        np.save(tmp_path / f"images/train-{n:04d}_nsd-{n + 5:05d}.npy", np.full((2, 2), n, np.float32))
    np.save(tmp_path / "rows.npy", np.ones((3, 2), np.float32))
    (tmp_path / "ids").write_text("a\nb\nc\n")
    store = str(tmp_path / "s")
    assert run(["store", "import", store, str(tmp_path / "images"), "--key", "s/net/1.q"]) == 0
    ids = ["--ids", str(tmp_path / "ids"), "--json"]
    capsys.readouterr()
    assert run(["store", "import", store, str(tmp_path / "rows.npy"), "--key", "t/net/1.q", *ids]) == 0
    assert json.loads(capsys.readouterr().out)["collections"][0]["shape"] == [3, 2]
    opened = open_store(store)
    assert opened["s/net/1.q"].ids == ["nsd-00005", "nsd-00006", "nsd-00007"]
    assert opened["t/net/1.q"].ids == ["a", "b", "c"]


def test_import_of_rows_of_another_width_is_refused(tmp_path, capsys):
    store = str(tmp_path / "s")
    for name, shape in (("train", (3, 4, 6)), ("synt", (2, 4, 5)), ("same", (2, 9, 6))):
        (tmp_path / "01").mkdir(exist_ok=True)
        np.save(tmp_path / f"01/{name}.npy", np.ones(shape, np.float32))
    assert run(["store", "import", store, str(tmp_path / "01"), "--backbone", "net", "--feature", "1.q"]) == 1
    assert "different shapes: train.npy of 4 x 6, synt.npy of 4 x 5" in capsys.readouterr().err
    assert open_store(store).keys() == []
    assert run(["store", "import", store, str(tmp_path / "01/train.npy"), "--key", "a-train/net/1.q"]) == 0
    assert run(["store", "import", store, str(tmp_path / "01/synt.npy"), "--key", "a-test/net/1.q"]) == 1
    assert "one feature has one width" in capsys.readouterr().err
    assert run(["store", "import", store, str(tmp_path / "01/same.npy"), "--key", "a-test/net/1.q"]) == 0
    assert open_store(store).keys() == ["a-test/net/1.q", "a-train/net/1.q"]


def test_import_into_a_file_is_said(tmp_path, capsys):
    np.save(tmp_path / "rows.npy", np.ones((3, 2), np.float32))
    assert run(["store", "import", str(tmp_path / "rows.npy"), str(tmp_path / "rows.npy"), "--key", "a/b/1.q"]) == 1
    assert "rows.npy is a file: a feature store is a folder" in capsys.readouterr().err


def test_import_without_a_key_says_how_to_give_one(tmp_path, capsys):
    np.save(tmp_path / "rows.npy", np.ones((3, 2), np.float32))
    assert run(["store", "import", str(tmp_path / "s"), str(tmp_path / "rows.npy")]) == 2
    assert "--key subj01-train/net/layer.facet" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["cp", "export", "import"])
def test_help_has_an_example(name, capsys):
    assert run(["store", name, "--help"]) == 0
    assert "Example: brainenc store" in capsys.readouterr().out
