"""The same command again, as a scheduler gives it after a requeue."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from brainenc.cli.main import run as brainenc
from brainenc.datasets import layout
from brainenc.train.run_folder import RunFolder


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


def test_a_finished_run_starts_no_worker_to_say_so(command, capsys, tmp_path):
    assert brainenc([*command, "--epochs", "1"]) == 0
    first, log = result(capsys), tmp_path / "run" / "train.log"

    assert brainenc([*command, "--epochs", "1"]) == 0

    again = capsys.readouterr()
    assert json.loads(again.out.splitlines()[-1]) == first
    assert "has finished all of its 1 epochs" in again.err
    assert not log.exists()  # where every rank writes down from which checkpoint it goes on


def test_a_finished_run_is_not_announced_as_one_that_begins(command, capsys, tmp_path):
    """Neither by the same command nor by --resume; a longer one is."""
    guarded = [word for word in command if word not in ("--no-guard", "--json")]
    announced = []
    for arguments in (
        [*guarded, "--epochs", "1"], [*guarded, "--epochs", "1"], ["train", "--resume", str(tmp_path / "run")],
        ["train", "--resume", str(tmp_path / "run"), "--epochs", "2"],
    ):  # fmt: skip
        assert brainenc(arguments) == 0
        announced.append("memory guard is ON" in capsys.readouterr().err)

    assert announced == [True, False, False, True]


@pytest.mark.parametrize("lost", ["predictions/lh_pred_test.npy", "checkpoints", "finished.json"])
def test_the_mark_of_a_finished_run_is_not_believed_alone(command, tmp_path, lost):
    """What somebody deleted comes back, by the same command."""
    assert brainenc([*command, "--epochs", "1"]) == 0
    run = tmp_path / "run"
    wanted = (run / "predictions" / "lh_pred_test.npy").read_bytes()
    gone = run / lost
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()

    assert brainenc([*command, "--epochs", "1"]) == 0

    assert gone.exists()
    assert (run / "predictions" / "lh_pred_test.npy").read_bytes() == wanted


def test_a_command_that_means_another_run_is_refused_with_the_difference(command, capsys):
    assert brainenc([*command, "--epochs", "1"]) == 0

    assert brainenc([*command, "--epochs", "1", "--lr", "0.1"]) == 2
    assert "learning_rate: 0.0005 in the run, 0.1 now" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        (["--encoder", "transfomer"], "There is: transformer, custom_transformer, spatial_feature, linear, ridge"),
        (["--feature", "tiny/-1.q"], "the layer's number"),
        (["--encoder", "linear", "--readout", "voxels"], "no queries"),
        (["--hidden", "15"], "do not divide"),
    ],
)
def test_what_is_misspelled_leaves_no_run_behind(command, capsys, tmp_path, extra, told):
    assert brainenc([*command, *extra]) == 2

    assert told in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_where_it_is(command, capsys, tmp_path):
    assert brainenc(["train", "--resume", str(tmp_path / "run"), "--out", str(tmp_path / "other")]) == 2
    assert "leave out --out" in capsys.readouterr().err


def test_fewer_epochs_than_a_run_has_trained_are_refused_and_nothing_is_rewritten(command, capsys):
    assert brainenc([*command, "--epochs", "2"]) == 0
    folder = RunFolder(command[command.index("--out") + 1])
    written = folder.config_file.read_bytes()

    assert brainenc(["train", "--resume", str(folder.path), "--epochs", "1"]) == 2

    assert "has trained 2 epochs, and 1 are asked for" in capsys.readouterr().err
    assert folder.config_file.read_bytes() == written


def change_responses(subject: Path) -> str:
    file = subject / layout.responses_file("train", "lh")
    np.save(file, np.load(file)[::-1])
    return "responses"


def swap_images(subject: Path) -> str:
    """The order of the images is that of their names, which also hold their ids."""
    folder = subject / layout.images_dir("train")
    first, second = sorted(folder.iterdir())[:2]
    names = [layout.image_name("train", i + 1, 1 - i) for i in range(2)]
    first.rename(folder / names[0])
    second.rename(folder / names[1])
    return "stimuli"


@pytest.mark.parametrize("change", [change_responses, swap_images])
def test_a_run_goes_on_with_the_data_that_it_began_with_and_no_other(small, command, tmp_path, capsys, change):
    subject = tmp_path / small.subject_dir.name
    shutil.copytree(small.subject_dir, subject)
    command[command.index("--subject-dir") + 1] = str(subject)
    assert brainenc([*command, "--epochs", "1"]) == 0
    what = change(subject)
    out = command[command.index("--out") + 1]

    assert brainenc(["train", "--resume", out, "--epochs", "2"]) != 0

    told = capsys.readouterr().err
    assert "bring it back" in told
    assert f"{what}: stored" in told
    assert RunFolder(out).config().epochs == 1, "what is refused leaves the run as it was"

    for manifest in RunFolder(out).checkpoints.glob("*/manifest.json"):  # as an earlier version wrote it
        found = json.loads(manifest.read_text())
        del found["provenance"]["stimuli"], found["provenance"]["responses"]
        manifest.write_text(json.dumps(found))
    assert brainenc(["train", "--resume", out, "--epochs", "2"]) == 0
