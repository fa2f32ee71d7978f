"""The ridge baseline: against the formula, against himalaya, and on a store."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from brainenc.cli.main import run as brainenc
from brainenc.errors import DataError, UsageError
from brainenc.train import ridge, ridge_run
from brainenc.train.evaluate import open_run
from brainenc.train.inputs import StoredViews
from brainenc.train.launch import train
from brainenc.train.ridge import RidgeConfig, folds, solve, sum_kernel
from brainenc.train.ridge_run import run_ridge
from brainenc.train.run_folder import RunFolder

N, P, V = 60, 12, 9


@pytest.fixture
def problem():
    """Features with an offset, and vertices from noiseless to pure noise."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(N, P)) + 3).astype(np.float32)
    noise = np.linspace(0, 20, V)
    y = (x @ rng.normal(size=(P, V)) + noise * rng.normal(size=(N, V)) + 5).astype(np.float32)
    return x, y


def fit(x, y, **settings):
    train, test = np.arange(40), np.arange(40, N)
    config = RidgeConfig(**{"solver": "eigen", "penalties": (1e-4, 1e-2, 1.0, 100.0), **settings})
    kernel = sum_kernel([torch.from_numpy(x)], N)
    blocks = list(solve(kernel, y, train, train, {"test": test}, config))
    penalties = np.concatenate([b.penalties for b in blocks])
    return penalties, np.concatenate([b.predictions["test"] for b in blocks], axis=1)


def by_formula(x, y, penalty):
    """Primal ridge with an intercept, of one vertex."""
    train, test = x[:40].astype(np.float64), x[40:].astype(np.float64)
    centred = train - train.mean(0)
    scale = (centred**2).sum(1).mean()
    gram = centred.T @ centred + penalty * scale * np.eye(P)
    weights = np.linalg.solve(gram, centred.T @ (y[:40] - y[:40].mean()))
    return (test - train.mean(0)) @ weights + y[:40].mean()


@pytest.mark.parametrize("solver", ["eigen", "himalaya"])
def test_predictions_are_those_of_the_formula(solver, problem):
    """With the penalty that was chosen, each vertex's prediction is that of primal ridge with an intercept."""
    x, y = problem

    penalties, predicted = fit(x, y, solver=solver)

    expected = np.stack([by_formula(x, y[:, v], penalties[v]) for v in range(V)], axis=1)
    np.testing.assert_allclose(predicted, expected, rtol=1e-4, atol=1e-3)


def test_each_vertex_has_its_own_penalty(problem):
    """Noiseless vertices take a small one, noise takes the largest."""
    x, y = problem
    y[:, -1] = np.random.default_rng(1).normal(size=N)

    penalties, _ = fit(x, y)

    assert penalties[0] == 1e-4
    assert penalties[-1] > penalties[0]


def test_himalaya_and_our_own_solver_agree(problem):
    """The same penalties and predictions: which of them serves does not matter."""
    ours, theirs = fit(*problem), fit(*problem, solver="himalaya")

    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-6)
    np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-4, atol=1e-4)


def test_blocks_of_vertices_do_not_matter(problem, monkeypatch):
    """Solving three vertices at a time gives what solving all does."""
    whole = fit(*problem)
    monkeypatch.setattr(ridge, "BLOCK", 2)

    for a, b in zip(fit(*problem), whole, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_single_precision_is_close(problem, monkeypatch):
    """Large problems are solved in float32: predictions move by less than 1e-3 of their spread."""
    exact = fit(*problem, penalties=(1e-2, 1.0))[1]
    monkeypatch.setattr(ridge, "_DOUBLE_UP_TO", 10)

    assert np.abs(fit(*problem, penalties=(1e-2, 1.0))[1] - exact).max() < 1e-3 * exact.std()


def test_chunks_of_features_add_up(problem):
    """A kernel from pieces is the kernel of the whole."""
    x = torch.from_numpy(problem[0])

    pieces = sum_kernel((x[:, a : a + 5] for a in range(0, P, 5)), N)

    shifted = (x - x.mean(0)).double()
    torch.testing.assert_close(pieces, shifted @ shifted.T, rtol=1e-6, atol=1e-5)


def test_a_constant_vertex_is_predicted_by_its_constant(problem):
    """No variance, no error, no NaN: the largest penalty."""
    x, y = problem
    y[:, 3] = 7.0

    penalties, predicted = fit(x, y)

    assert penalties[3] == 100.0
    np.testing.assert_allclose(predicted[:, 3], 7.0, rtol=1e-5)


def test_folds_cover_the_stimuli_once():
    """Each stimulus is held out in one fold; the seed decides in which."""
    splits = folds(23, RidgeConfig(n_folds=4, seed=1))

    assert sorted(np.concatenate([b for _, b in splits])) == list(range(23))
    assert all(not set(a) & set(b) and len(a) + len(b) == 23 for a, b in splits)
    other = folds(23, RidgeConfig(n_folds=4, seed=2))
    assert any(not np.array_equal(a[1], b[1]) for a, b in zip(splits, other, strict=True))


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"penalties": (0.0,)}, "above 0"), ({"n_folds": 1}, "at least 2"), ({"solver": "lasso"}, "eigen, himalaya")],
)
def test_impossible_settings_are_refused(settings, words):
    """With what was found."""
    with pytest.raises(UsageError, match=words):
        RidgeConfig(**settings)


def test_features_that_are_not_finite_are_refused(problem):
    """A NaN would make every prediction NaN."""
    x = torch.from_numpy(problem[0])
    x[3, 4] = float("nan")

    with pytest.raises(DataError, match="NaN"):
        sum_kernel([x], N)


def test_a_run_leaves_what_other_runs_leave(small, tmp_path):
    """Correlations, predictions, scores and a record, with the shapes and names of an encoder's run."""
    records = []
    config = small.config(tmp_path / "run", encoder={"encoder": "ridge"}, features=("tiny/1.q:mean",))
    folder = RunFolder(config.out)
    folder.create(config)
    perf = run_ridge(config, StoredViews(config), progress=records.append)

    assert perf > 0.6  # the planted signal is the mean of the tokens, with little noise
    assert np.load(folder.predictions / "lh_val_corr.npy").shape == (30,)
    assert np.load(folder.predictions / "rh_pred_test.npy").shape == (5, 26)
    assert np.load(folder.predictions / "rh_pred_test.npy").dtype == np.float32
    assert set(np.load(folder.predictions / "lh_penalties.npy")) <= set(ridge.PENALTIES)
    assert json.loads(folder.scores_file.read_text())["val_perf"] == pytest.approx(perf)
    assert [r["val_perf"] for r in folder.metrics()] == [pytest.approx(perf)]
    assert records[0]["split"] == "val"


CEILING = 1 / np.sqrt(1 + 0.3**2)
"""Correlation of a vertex of the small subject with its own signal."""


@pytest.fixture(scope="module")
def larger(make_small, tmp_path_factory):
    """600 training images: enough to find the readout of every vertex."""
    return make_small(tmp_path_factory.mktemp("ridge"), n_train=600, n_test=5)


def perf_of(subject, out, **fields):
    return train(subject.config(out, encoder={"encoder": "ridge"}, **fields)).val_perf


@pytest.mark.parametrize(("feature", "share"), [("tiny/1.q:mean", 0.98), ("tiny/1.q", 0.9)])
def test_the_baseline_reaches_what_the_truth_allows(feature, share, larger, tmp_path):
    """The signal is linear in the mean of the tokens: pooled features reach its ceiling, whole maps nearly."""
    assert perf_of(larger, tmp_path / "run", features=(feature,)) > share * CEILING


def test_shuffled_responses_stay_at_chance(larger, tmp_path):
    """The control: responses of other images cannot be predicted. 60 validation images, 56 related vertices."""
    assert abs(perf_of(larger, tmp_path / "run", shuffle_responses=True)) < 0.1


@pytest.mark.parametrize(
    "features",
    [("tiny/1.q",), ("tiny/1.q:cls",), ("tiny/1.q:mean", "tiny/2.token"), ("tiny/1.q:cls", "tiny/2.token:mean")],
)
def test_chunks_of_a_store_are_its_assembled_features(features, small, tmp_path, monkeypatch):
    """The kernel is that of the maps that encoders see, however few tokens are read at a time."""
    from brainenc.datasets.algonauts import Subject
    from brainenc.train.inputs import open_samples

    config = small.config(tmp_path / "run", features=features)
    samples = open_samples(config, Subject.open(config.subject_dir), StoredViews(config))
    rows = [torch.from_numpy(v.gather(r)) for v, r in zip(samples.views, samples.feature_rows, strict=True)]
    flat = samples.layout.assemble(rows).flatten(1)
    monkeypatch.setattr(ridge_run, "CHUNK_BYTES", 4 * 45 * 16 * 3)

    kernel = sum_kernel(ridge_run._chunks([samples], "cpu"), len(samples))

    shifted = (flat - flat.mean(0)).double()
    torch.testing.assert_close(kernel, shifted @ shifted.T, rtol=1e-5, atol=1e-4)


def test_training_with_the_encoder_ridge_is_the_baseline(small, tmp_path):
    """``--encoder ridge`` goes through the same door as the other encoders, and says what it cannot do later."""
    records = []
    config = small.config(tmp_path / "run", encoder={"encoder": "ridge"}, features=("tiny/1.q:mean",))

    result = train(config, progress=records.append)

    assert result.status == "done"
    assert result.val_perf == records[-1]["val_perf"] > 0.6
    assert RunFolder(config.out).config().encoder.encoder == "ridge"
    with pytest.raises(UsageError, match="no weights"):
        open_run(config.out)


def test_its_predictions_are_scored_as_those_of_other_runs(small, tmp_path, capsys):
    """`brainenc evaluate` needs no weights for that."""
    from brainenc.datasets import layout
    from brainenc.datasets.algonauts import Subject

    shutil.copytree(small.config(tmp_path / "x").subject_dir, tmp_path / "subj01")
    config = small.config(tmp_path / "run", encoder={"encoder": "ridge"}, features=("tiny/1.q:mean",))
    train(replace(config, subject_dir=str(tmp_path / "subj01")))
    predicted = {h: np.load(tmp_path / f"run/predictions/{h}_pred_test.npy") for h in ("lh", "rh")}
    capsys.readouterr()

    assert brainenc(["evaluate", str(tmp_path / "run"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["val_perf"] > 0.6
    assert brainenc(["evaluate", str(tmp_path / "run"), "--split", "test"]) == 1
    assert "has no test responses" in capsys.readouterr().err
    for hemisphere, rows in predicted.items():
        file = Subject.open(tmp_path / "subj01").folder / layout.responses_file("test", hemisphere)
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, rows)
    assert brainenc(["evaluate", str(tmp_path / "run"), "--split", "test", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["val_perf"] == pytest.approx(1)
    assert brainenc(["evaluate", str(tmp_path / "run"), "--split", "test"]) == 0
    lines = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert lines[lines.index("early") - 1] == "stream"
    assert brainenc(["evaluate", str(tmp_path / "run"), "--split", "train"]) == 2
    assert "of its train images it has none" in capsys.readouterr().err


@pytest.fixture
def command(small, tmp_path):
    """Trains ridge on a copy of the small subject."""
    subject = shutil.copytree(small.subject_dir, tmp_path / "subj01")
    what = ["--subject-dir", subject, "--store", small.store, "--feature", "tiny/1.q:mean", "--encoder", "ridge"]
    return [str(word) for word in ["train", *what, "--no-guard", "--json", "--out", tmp_path / "run"]]


def fits(tmp_path) -> int:
    """How often it was fitted: each time leaves one record."""
    return len((tmp_path / "run/metrics.jsonl").read_text().splitlines())


def test_a_finished_run_says_so_and_fits_nothing(command, tmp_path, capsys):
    """As an encoder's: the same command, and `--resume`, give what it reached."""
    assert brainenc(command) == 0
    first = json.loads(capsys.readouterr().out.splitlines()[-1])
    for again in (command, ["train", "--resume", str(tmp_path / "run"), "--json"]):
        assert brainenc(again) == 0
        said = capsys.readouterr()
        assert json.loads(said.out.splitlines()[-1]) == first
        assert "is fitted already" in said.err

    assert first["val_perf"] > 0.6
    assert fits(tmp_path) == 1


def other_responses(subject, run):
    file = subject / "training_split/training_fmri/lh_training_fmri.npy"
    np.save(file, np.load(file)[::-1])


@pytest.mark.parametrize(
    "change",
    [
        lambda subject, run: (run / "predictions/rh_val_corr.npy").unlink(),
        lambda subject, run: (run / "predictions/lh_pred_test.npy").unlink(),
        lambda subject, run: (run / "scores.json").unlink(),
        lambda subject, run: (run / "finished.json").write_text("{"),
        other_responses,
    ],
    ids=["correlations", "predictions", "scores", "torn mark", "other responses"],
)
def test_what_is_lost_or_was_fitted_to_other_data_is_fitted_again(command, tmp_path, change):
    """The mark of a finished run is not believed alone; nor does it speak of data that it does not know."""
    assert brainenc(command) == 0
    change(tmp_path / "subj01", tmp_path / "run")

    assert brainenc(command) == 0
    assert fits(tmp_path) == 2
    assert brainenc(command) == 0
    assert fits(tmp_path) == 2, "now it is finished again"


def test_test_images_that_can_be_predicted_are(command, tmp_path):
    """Those that were not wanted at first, and those that came later; where there are none nothing is left to do."""
    images = tmp_path / "subj01/test_split"
    assert brainenc([*command, "--no-predict"]) == 0
    images.rename(tmp_path / "aside")
    assert brainenc(command) == 0
    assert fits(tmp_path) == 1

    (tmp_path / "aside").rename(images)
    assert brainenc(command) == 0
    assert fits(tmp_path) == 2
    assert np.load(tmp_path / "run/predictions/lh_pred_test.npy").shape == (5, 30)
