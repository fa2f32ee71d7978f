"""Ensembles of runs: weights per vertex, what is written, what is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from brainenc.cli.main import cli
from brainenc.errors import DataError, UsageError
from brainenc.train.encoders.base import EncoderConfig
from brainenc.train.ensemble import combine, ensemble, vertex_weights
from brainenc.train.run_folder import RunFolder


def make_run(small, path, *, corr, level, subject_dir=None, readout="rois_all"):
    """A finished run that predicts a constant."""
    config = small.config(path)
    config = replace(config, encoder=EncoderConfig(readout=readout), subject_dir=subject_dir or config.subject_dir)
    folder = RunFolder(path)
    folder.create(config)
    folder.predictions.mkdir()
    for h, n in (("lh", 30), ("rh", 26)):
        np.save(folder.predictions / f"{h}_val_corr.npy", np.full(n, corr, np.float32))
        np.save(folder.predictions / f"{h}_pred_test.npy", np.full((5, n), level, np.float32))
    return path


@pytest.fixture
def runs(small, tmp_path):
    return [make_run(small, tmp_path / n, corr=c, level=v) for n, c, v in (("a", 0.30, 1.0), ("b", 0.32, 2.0))]


@given(
    hnp.arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 6)), elements=st.floats(-1, 1, width=32)),
    st.floats(0, 100),
)
@settings(deadline=None, max_examples=50)
def test_weights_are_a_distribution_over_runs(correlations, temperature):
    """They sum to 1 at each vertex and follow the order of the correlations."""
    weights = vertex_weights(correlations, temperature)

    np.testing.assert_allclose(weights.sum(axis=0), 1, rtol=1e-5)
    for v in range(weights.shape[1]):
        order = np.argsort(correlations[:, v], kind="stable")
        assert (np.diff(weights[order, v]) >= -1e-6).all()


def test_weights_are_the_softmax_of_correlation_times_forty():
    """The published temperature; NaN counts as 0."""
    weights = vertex_weights(np.array([[0.5, np.nan], [0.4, 0.1]]))

    np.testing.assert_allclose(weights[:, 0], np.exp([20, 16]) / np.exp([20, 16]).sum(), rtol=1e-5)
    np.testing.assert_allclose(weights[:, 1], np.exp([0, 4]) / np.exp([0, 4]).sum(), rtol=1e-5)


def test_each_vertex_has_its_own_weights():
    """The first vertex trusts the first run, the second the second."""
    weights = vertex_weights(np.array([[0.9, 0.1], [0.1, 0.9]]))

    found = combine([np.full((3, 2), 1.0), np.full((3, 2), 2.0)], weights)

    np.testing.assert_allclose(found, np.tile([1.0, 2.0], (3, 1)), rtol=1e-6)


def test_predictions_are_weighted_sums(runs, tmp_path):
    """What is written is the weighted sum, float32, in a run folder that can be submitted."""
    result = ensemble(runs, tmp_path / "out")

    share = np.exp(40 * 0.32) / (np.exp(40 * 0.30) + np.exp(40 * 0.32))
    for h in ("lh", "rh"):
        found = np.load(result.out / "predictions" / f"{h}_pred_test.npy")
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, 1 + share, rtol=1e-5)
        np.testing.assert_allclose(result.shares[h], (1 - share, share), rtol=1e-5)
    assert RunFolder(result.out).config().out == str(result.out)
    assert json.loads((result.out / "ensemble.json").read_text())["temperature"] == 40.0
    assert result.test_r is None  # this subject has no test responses


def test_test_scores_are_told_where_the_responses_are(runs, tmp_path, small):
    """With the organisers' responses, each run's test correlation stands beside the ensemble's."""
    import shutil

    subject = tmp_path / "subj01"
    shutil.copytree(small.subject_dir, subject)
    rng = np.random.default_rng(0)
    for h, n in (("lh", 30), ("rh", 26)):
        truth = rng.normal(size=(5, n)).astype(np.float32)
        file = subject / "test_split" / "test_fmri" / f"{h}_test_fmri.npy"
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, truth)
        np.save(runs[0] / "predictions" / f"{h}_pred_test.npy", truth)
        np.save(runs[1] / "predictions" / f"{h}_pred_test.npy", -truth)
    for run in runs:
        config = replace(RunFolder(run).config(), subject_dir=str(subject))
        (run / "config.yaml").write_text(config.to_yaml())

    result = ensemble(runs, tmp_path / "out")

    assert result.test_r == pytest.approx({str(runs[0]): 1.0, str(runs[1]): -1.0, "ensemble": -1.0})


@pytest.mark.parametrize(("name", "command"), [("lh_val_corr.npy", "evaluate"), ("rh_pred_test.npy", "predict")])
def test_what_a_run_lacks_is_said_with_the_command_that_makes_it(name, command, runs, tmp_path):
    """Before anything is written."""
    (runs[1] / "predictions" / name).unlink()

    with pytest.raises(DataError, match=rf"no predictions/{name}.*brainenc {command}"):
        ensemble(runs, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_arrays_that_do_not_fit_are_refused_with_all_shapes(runs, tmp_path):
    """Runs on other test images cannot be averaged."""
    np.save(runs[1] / "predictions" / "lh_pred_test.npy", np.zeros((4, 30), np.float32))

    with pytest.raises(DataError, match=r"\(5, 30\).*\(4, 30\)"):
        ensemble(runs, tmp_path / "out")


def test_one_run_several_subjects_and_families_are_refused(small, runs, tmp_path):
    """Each with what was found."""
    other = make_run(small, tmp_path / "c", corr=0.1, level=0.0, subject_dir="/data/subj07")
    family = make_run(small, tmp_path / "d", corr=0.1, level=0.0, readout="faces")

    with pytest.raises(UsageError, match="two runs at least, found 1"):
        ensemble(runs[:1], tmp_path / "out")
    with pytest.raises(UsageError, match="subj01, subj07"):
        ensemble([*runs, other], tmp_path / "out")
    with pytest.raises(UsageError, match="family"):
        ensemble([*runs, family], tmp_path / "out")
    with pytest.raises(UsageError, match="holds a run already"):
        ensemble(runs, runs[0])


def test_the_command_prints_shares(runs, tmp_path):
    """For people and as JSON."""
    names = [str(r) for r in runs]

    shown = CliRunner().invoke(cli, ["ensemble", *names, "--out", str(tmp_path / "out")])
    plain = CliRunner().invoke(
        cli, ["ensemble", *names, "--out", str(tmp_path / "again"), "--temperature", "0", "--json"]
    )

    assert shown.exit_code == 0, shown.output
    assert f"{names[1]}: mean weight 0.690 (lh) 0.690 (rh)" in shown.output
    assert json.loads(plain.output)["shares"]["lh"] == pytest.approx([0.5, 0.5])


def test_a_folder_that_holds_a_run_is_left_alone(runs):
    with pytest.raises(UsageError, match="choose another --out for the ensemble"):
        ensemble(runs, runs[0])
