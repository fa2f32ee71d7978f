"""Features computed while training and features from a store train the same model."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from brainenc.cli.main import run as brainenc
from brainenc.cli.on_the_fly import OnTheFly
from brainenc.datasets import layout
from brainenc.datasets.algonauts import Subject
from brainenc.errors import UnknownName, UsageError
from brainenc.extract.miniature import save_miniature
from brainenc.featurestore.store import open_store
from brainenc.train.evaluate import open_run
from brainenc.train.run_folder import RunFolder


@pytest.fixture(scope="module")
def pictures(small, tmp_path_factory):
    """The small subject with images that a backbone can see, and a small real DINOv2."""
    root = tmp_path_factory.mktemp("pictures")
    subject = root / "subj01"
    shutil.copytree(small.subject_dir, subject)
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for path in (subject / layout.images_dir(split)).iterdir():
            noise = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
            Image.fromarray(noise).resize((56, 56), Image.Resampling.BILINEAR).save(path)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
             "image_size": 56, "patch_size": 14}  # fmt: skip
    return subject, save_miniature("dinov2", root / "mini", seed=0, **sizes)


def arguments(subject, out) -> list[str]:
    return [
        "train", "--subject-dir", str(subject), "--out", str(out), "--workers", "0", "--heads", "4", "--dropout", "0",
        "--epochs", "3", "--batch-size", "6", "--threads", "1", "--no-guard",
    ]  # fmt: skip


def test_losses_agree_with_those_from_a_store(pictures, tmp_path, losses, capsys):
    """Twenty-one steps to 1e-3: what differs is the rounding to float16."""
    subject, backbone = pictures
    source = OnTheFly(subject_dir=str(subject), backbone=str(backbone), features=("-1.q", "0.token"))
    store = open_store(tmp_path / "store", create=True)
    for split in ("train", "test"):
        for view, name in zip(source(split), source.names(), strict=True):
            rows = view.gather(range(len(view.ids)))
            with store.writer(
                f"subj01-{split}/{name}", ids=view.ids, row_shape=rows.shape[1:], details=dict(view.details)
            ) as writer:
                writer.append(rows)
    names = [argument for name in source.names() for argument in ("--feature", name)]

    stored = brainenc([*arguments(subject, tmp_path / "stored"), "--store", str(tmp_path / "store"), *names])
    flown = brainenc([
        *arguments(subject, tmp_path / "flown"), "--on-the-fly", "--backbone", str(backbone),
        "--feature", "-1.q", "--feature", "0.token",
    ])  # fmt: skip

    assert (stored, flown) == (0, 0), capsys.readouterr().err
    assert source.names() == ["mini/1.q", "mini/0.token"]
    assert len(losses(tmp_path / "flown")) == 21
    assert losses(tmp_path / "flown") == pytest.approx(losses(tmp_path / "stored"), rel=1e-3)
    assert losses(tmp_path / "flown") != losses(tmp_path / "stored")
    predicted = [np.load(tmp_path / run / "predictions/lh_pred_test.npy") for run in ("stored", "flown")]
    assert np.allclose(*predicted, atol=1e-2)


def test_a_run_without_a_store_is_resumed_without_saying_how_again(pictures, tmp_path, capsys):
    subject, backbone = pictures
    out = tmp_path / "run"
    assert brainenc([*arguments(subject, out), "--on-the-fly", "--backbone", str(backbone), "--feature", "-1.q"]) == 0

    assert brainenc(["train", "--resume", str(out), "--epochs", "4"]) == 0, capsys.readouterr().err
    assert max(r["step"] for r in RunFolder(out).metrics()) == 28
    assert brainenc(["train", "--resume", str(out), "--on-the-fly", "--backbone", str(backbone)]) == 2


def test_a_run_without_a_store_is_scored_and_predicts_and_shows_where_it_looks(pictures, tmp_path, monkeypatch, capsys):
    """As those from a store: features are computed again, as the run's own configuration says."""
    subject, backbone = pictures
    out = tmp_path / "run"
    options = ["--on-the-fly", "--backbone", str(backbone), "--feature", "-1.q"]
    assert brainenc([*arguments(subject, out), *options]) == 0
    best = json.loads(RunFolder(out).scores_file.read_text())["val_perf"]
    predicted = np.load(out / "predictions/lh_pred_test.npy")
    image = Subject.open(subject).ids("train")[3]
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()

    assert brainenc(["evaluate", "run", "--json"]) == 0, capsys.readouterr().err
    scored = json.loads(capsys.readouterr().out)
    assert brainenc(["predict", "run", "--out", "again"]) == 0, capsys.readouterr().err
    assert brainenc(["attention", "run", "--image", image, "--out", "maps"]) == 0, capsys.readouterr().err

    assert scored["val_perf"] == pytest.approx(best, abs=1e-5)
    np.testing.assert_allclose(np.load("again/lh_pred_test.npy"), predicted, atol=1e-5)
    assert np.load("maps/lh_attention.npy").shape[0] == 1
    with pytest.raises(UsageError, match="open_views"):
        open_run(out)


def test_a_layer_that_is_not_there_is_said_before_anything_starts(pictures, tmp_path):
    subject, backbone = pictures

    with pytest.raises(UnknownName, match="layer"):
        OnTheFly(subject_dir=str(subject), backbone=str(backbone), features=("9.q",)).names()


def test_each_batch_runs_the_backbone_once_for_all_features(pictures, monkeypatch):
    subject, backbone = pictures
    views = OnTheFly(subject_dir=str(subject), backbone=str(backbone), features=("-1.q", "0.token"))("train")
    engine, calls = views[0]._engine, []
    plain = engine._compute
    monkeypatch.setattr(engine, "_compute", lambda numbers: (calls.append(numbers), plain(numbers))[1])

    rows = [view.gather([3, 1, 4]) for view in views]

    assert calls == [[3, 1, 4]]
    assert [r.shape for r in rows] == [(3, *view.shape[1:]) for view in views]
    assert Subject.open(subject).ids("train") == list(views[0].ids)
