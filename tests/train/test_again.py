"""The same command again, as a scheduler gives it after a requeue."""

import json

import pytest

from brainenc.cli.main import run as brainenc


@pytest.fixture
def command(small, tmp_path):
    what = ["--subject-dir", small.subject_dir, "--store", small.store, "--feature", "tiny/1.q"]
    how = ["--hidden", 16, "--heads", 2, "--batch-size", 8, "--workers", 0, "--threads", 1, "--no-guard", "--json"]
    return [str(word) for word in ["train", *what, *how, "--out", tmp_path / "run"]]


def result(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_it_goes_on_with_its_own_run_and_finds_a_finished_one_done(command, capsys):
    assert brainenc([*command, "--epochs", "1"]) == 0
    first = result(capsys)
    assert brainenc([*command, "--epochs", "1"]) == 0
    again = result(capsys)
    assert brainenc([*command, "--epochs", "2"]) == 0
    longer = result(capsys)

    assert (again["step"], again["val_perf"]) == (first["step"], first["val_perf"])
    assert longer["step"] == 2 * first["step"]


def test_a_command_that_means_another_run_is_refused_with_the_difference(command, capsys):
    assert brainenc([*command, "--epochs", "1"]) == 0

    assert brainenc([*command, "--epochs", "1", "--lr", "0.1"]) == 2
    assert "learning_rate: 0.0005 in the run, 0.1 now" in capsys.readouterr().err
