"""``brainenc data``: one list of everything that is wrong, and an exit code."""

import json

import numpy as np
import pytest

from brainenc.cli.main import run
from brainenc.datasets.algonauts import Subject
from brainenc.datasets.check import check

from .conftest import SIZES

LH = "training_split/training_fmri/lh_training_fmri.npy"


def test_a_whole_subject_is_usable(made):
    found = check(made[0].folder)
    assert found.usable
    assert (found.n_train, found.n_test, found.n_vertices) == (SIZES["n_train"], SIZES["n_test"], SIZES["vertices"])
    assert found.synthetic
    assert found.n_rois == 30
    assert any("aTL-faces" in note for note in found.notes)


def test_every_problem_is_told_at_once(broken):
    responses = np.load(broken / LH)
    responses[7, 3] = np.nan
    np.save(broken / LH, responses)
    (broken / "training_split/training_fmri/rh_training_fmri.npy").unlink()
    images = sorted((broken / "training_split/training_images").iterdir())
    images[0].write_bytes(b"no image")
    found = check(broken)
    text = "\n".join(found.problems)
    assert "missing: training_split/training_fmri/rh_training_fmri.npy" in text
    assert "1 row and 1 vertex" in text
    assert f"{images[0]} cannot be read" in text
    assert len(found.problems) == 3


def test_a_missing_row_and_a_foreign_mask_are_problems(broken):
    np.save(broken / LH, np.load(broken / LH)[1:])
    mask = broken / "roi_masks/rh.streams_challenge_space.npy"
    np.save(mask, np.load(mask)[1:])
    text = "\n".join(check(broken).problems)
    assert "95 rows" in text
    assert "139 entries" in text


def test_constant_vertices_and_missing_fsaverage_masks_are_notes(broken):
    responses = np.load(broken / LH)
    responses[:, [2, 9]] = 1.5
    np.save(broken / LH, responses)
    (broken / "roi_masks/lh.streams_fsaverage_space.npy").unlink()
    found = check(broken)
    assert found.usable
    assert any(note.startswith("2 vertices of lh") for note in found.notes)
    assert any("fsaverage" in note for note in found.notes)


def test_exit_code_and_json_of_the_command(made, tmp_path, capsys):
    assert run(["data", "check", str(made[0].folder), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["usable"] is True
    assert told["n_vertices"] == list(SIZES["vertices"])
    assert run(["data", "check", str(tmp_path)]) == 1
    assert "roi_masks (the folder, with 18 files)" in capsys.readouterr().out


@pytest.mark.parametrize("named", [True, False])
def test_the_command_makes_a_subject_that_is_usable(tmp_path, capsys, named):
    """``--out`` is the subject's folder if it is called like one, else subj01 is made in it."""
    pytest.importorskip("skimage")
    out = tmp_path / "subj07" if named else tmp_path / "made"
    arguments = ["data", "synth", "--out", str(out), "--n-train", "6", "--n-test", "2", "--vertices", "40", "--json"]
    assert run(arguments) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["folder"] == str(out if named else out / "subj01")
    subject = Subject.open(told["folder"])
    assert subject.n_vertices == (40, 40)
    assert told["features"] == {"grid": [31, 31], "channels": 64}
    assert check(subject.folder).usable


def test_vertices_must_be_numbers(tmp_path, capsys):
    assert run(["data", "synth", "--out", str(tmp_path), "--vertices", "many"]) == 2
    assert "19004,20544" in capsys.readouterr().err


def test_one_torn_file_is_one_problem(broken):
    data = (broken / LH).read_bytes()
    (broken / LH).write_bytes(data[:500])
    problems = check(broken).problems
    assert len(problems) == 1
    assert "no whole NumPy file" in problems[0]


def test_a_torn_truth_is_a_problem(broken):
    (broken / "truth.json").write_text('{"max_val')
    assert ["truth.json is no whole JSON file" in problem for problem in check(broken).problems] == [True]
