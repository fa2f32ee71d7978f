"""``brainenc submit``: from runs to the zip."""

import json
import zipfile

import numpy as np
import yaml

from brainenc.cli.main import run as brainenc

from .conftest import N_TEST, VERTICES


def test_a_run_becomes_a_checked_zip(run, tmp_path, capsys):
    out = tmp_path / "s.zip"
    assert brainenc(["submit", str(run[0]), "--out", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["subjects"] == ["subj03"]
    assert told["problems"] == []
    assert len(told["missing"]) == 7
    with zipfile.ZipFile(out) as archive, archive.open("subj03/lh_pred_test.npy") as file:
        assert np.load(file).shape == (N_TEST, VERTICES[0])
    assert brainenc(["submit", "--check", str(out), str(run[0])]) == 0
    assert brainenc(["submit", "--check", str(out)]) == 1  # the challenge's subj03 has 293 test images
    assert "(293, 19004)" in capsys.readouterr().out


def test_what_the_shapes_were_held_against_is_said(run, tmp_path, capsys):
    """One word for both: what fits a small subject is not what the server wants."""
    out = str(tmp_path / "s.zip")
    assert brainenc(["submit", str(run[0]), "--out", out]) == 0
    written = capsys.readouterr().out
    assert "shapes fit the subject folders of the runs, but subj03 there has other shapes than in the chall" in written
    assert brainenc(["submit", "--check", out]) == 1
    assert "held against the challenge's own subjects" in capsys.readouterr().out


def test_all_subjects_can_be_demanded(run, tmp_path):
    assert brainenc(["submit", str(run[0]), "--out", str(tmp_path / "s.zip"), "--all-subjects"]) == 1


def test_a_run_of_one_family_is_refused(run, tmp_path, capsys):
    config = yaml.safe_load((run[0] / "config.yaml").read_text())
    config["encoder"]["readout"] = "faces"
    (run[0] / "config.yaml").write_text(yaml.safe_dump(config))
    assert brainenc(["submit", str(run[0]), "--out", str(tmp_path / "s.zip")]) == 2
    assert "predicts the ROIs of 'faces' only" in capsys.readouterr().err
    assert not (tmp_path / "s.zip").exists()


def test_predictions_of_another_number_of_images_are_refused(run, tmp_path, capsys):
    path = run[0] / "predictions/rh_pred_test.npy"
    np.save(path, np.load(path)[:-1])
    assert brainenc(["submit", str(run[0]), "--out", str(tmp_path / "s.zip")]) == 1
    assert f"shape ({N_TEST - 1}, {VERTICES[1]}), wanted ({N_TEST}, {VERTICES[1]})" in capsys.readouterr().err


def test_two_runs_of_one_subject_and_no_run_at_all_are_wrong_usage(run, capsys):
    assert brainenc(["submit", str(run[0]), str(run[0])]) == 2
    assert "2 runs are of 1 subjects" in capsys.readouterr().err
    assert brainenc(["submit"]) == 2
