"""Commands that write to this machine refuse an address, instead of making a folder that is called like one."""

import numpy as np
import pytest

from brainenc.cli.main import run
from brainenc.featurestore import open_store

COMMANDS = {
    "ensemble": ["ensemble", "runs/a", "runs/b"],
    "import-checkpoint": ["import-checkpoint", "checkpoint.pth", "--subject-dir", "subj01"],
    "predict": ["predict", "runs/a"],
    "attention": ["attention", "runs/a"],
    "store export": ["store", "export", "features", "s/net/1.q"],
    "submit": ["submit", "runs/a"],
    "data synth": ["data", "synth"],
    "demo": ["demo"],
    "guard drill": ["guard", "drill"],
}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
@pytest.mark.parametrize("address", ["gs://lab/out", "s3://KEY:sEcRet@lab/out", "memory://out"])
def test_an_address_is_refused_with_what_is_possible(command, address, here, capsys):
    assert run([*command, "--out", address]) == 2

    said = capsys.readouterr().err
    assert f"--out {address.replace('KEY:sEcRet@', '')} is an address" in said
    assert "local folder" in said
    assert list(here.iterdir()) == []


def test_snapshots_are_kept_on_disks_only(here, capsys):
    """They are refused before the run is looked for."""
    assert run(["train", "--resume", "runs/a", "--snapshot-dir", "gs://lab/snapshots"]) == 2

    assert "--snapshot-dir gs://lab/snapshots is an address" in capsys.readouterr().err
    assert list(here.iterdir()) == []


def test_training_takes_an_address(gcs, capsys):
    """It is refused for another reason: there is no such subject."""
    assert run(["train", "--subject-dir", "subj01", "--store", "features", "--feature", "a/1.q", "--workers", "0",
                "--out", "gs://lab/run"]) == 1  # fmt: skip

    assert "is not an Algonauts 2023 subject folder" in capsys.readouterr().err


def test_a_file_address_is_the_folder_that_it_names(here):
    with open_store(here / "features", create=True).writer("s/net/1.q", ids=["a"], row_shape=(2,)) as writer:
        writer.append(np.ones((1, 2), np.float16))

    assert run(["store", "export", "features", "s/net/1.q", "--out", f"file://{here}/out"]) == 0
    assert (here / "out/s/net/1.q.npy").exists()
