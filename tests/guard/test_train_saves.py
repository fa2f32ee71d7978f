"""Emergency checkpoints of a rank, where something other than a disk goes wrong: memory ends while they are written."""

from types import SimpleNamespace

import pytest

from brainenc.guard.testing import ScriptedGuard
from brainenc.train import checkpoint
from brainenc.train.loop import Fit
from brainenc.train.run_folder import RunFolder
from brainenc.train.saver import Saver


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("unexpected pos 640 vs 534")])
def test_any_error_leads_to_the_next_place(tmp_path, monkeypatch, error):
    folder = RunFolder(tmp_path / "run")

    def write(root, contents, **_):
        if root == folder.checkpoints:
            raise error
        return root / "emergency_epoch0_step3"

    monkeypatch.setattr(checkpoint, "write", write)
    saver = Saver(folder, snapshots=tmp_path / "snapshots", keep=1)

    assert saver.emergency(None, "RAM usage is 95 %") == tmp_path / "snapshots/emergency_epoch0_step3"


@pytest.fixture
def fit():
    """One rank whose memory ends whenever it wants to save."""

    def emergency(contents, reason):
        raise MemoryError("no room for a copy")

    fit = object.__new__(Fit)
    fit.position, fit._contents, fit.notes = SimpleNamespace(step=3, epoch=0), lambda: None, []
    fit._saver, fit._hooks = (
        SimpleNamespace(emergency=emergency),
        SimpleNamespace(note=fit.notes.append, guard=ScriptedGuard()),
    )
    fit._team = SimpleNamespace(rank=0, exchange_text=lambda text: [text])
    return fit


def test_a_rank_that_cannot_save_on_the_spot_says_so(fit):
    fit._save_on_the_spot("RAM usage is 95 %")

    assert fit.notes == ["MemoryError: no room for a copy"]
    assert fit._hooks.guard.acknowledged[0]["error"] == "MemoryError: no room for a copy"


def test_a_rank_that_cannot_save_for_all_leaves_nobody_waiting(fit):
    assert fit._emergency(SimpleNamespace(healthy=[0]), "SIGTERM") == ("", "MemoryError: no room for a copy")
