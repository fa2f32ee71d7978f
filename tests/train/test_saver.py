"""Snapshots and checkpoints that are written while training goes on, and emergency ones that find a place."""

import os
import stat
import threading

import pytest
import torch

from brainenc.errors import BrainencError
from brainenc.train import checkpoint, saver
from brainenc.train.checkpoint import Contents, Position
from brainenc.train.run_folder import RunFolder
from brainenc.train.saver import Saver
from brainenc.train.snapshot import Background, StateCopy, copy_bytes
from brainenc.train.step import Stepper, StepSettings
from brainenc.train.team import Solo


@pytest.fixture
def stepper() -> Stepper:
    torch.manual_seed(0)
    return Stepper(torch.nn.Linear(6, 4), Solo(), StepSettings(seed=0), micro_batch=4)


def at(stepper: Stepper, step: int) -> Contents:
    return Contents(
        position=Position(step=step, epoch=0), weights=stepper.model.state_dict,
        optimizer=stepper.optimizer.state_dict(),
    )  # fmt: skip


@pytest.fixture
def writer(tmp_path, stepper) -> Saver:
    made = Saver(RunFolder(tmp_path / "run"), snapshots=tmp_path / "run/.snapshots/here", keep=2)
    made.folder.checkpoints.mkdir(parents=True)
    made.use(StateCopy(stepper.model, stepper.optimizer))
    return made


def test_a_snapshot_holds_the_weights_of_its_step_though_training_goes_on(writer, stepper, monkeypatch):
    """The thread writes only when the weights have changed already."""
    go, plain = threading.Event(), checkpoint.write
    monkeypatch.setattr(checkpoint, "write", lambda *a, **k: (go.wait(10), plain(*a, **k))[1])
    before = {k: v.clone() for k, v in stepper.model.state_dict().items()}

    writer.snapshot(at(stepper, 3))
    with torch.no_grad():
        stepper.model.weight += 1
        stepper.optimizer.state[stepper.model.weight]["exp_avg"] += 1
    go.set()
    writer.wait()

    fresh = torch.nn.Linear(6, 4)
    folder = checkpoint.newest([writer.snapshots]).folder
    checkpoint.load_weights(folder, fresh)
    assert all(torch.equal(fresh.state_dict()[k], v) for k, v in before.items())
    assert checkpoint.load_state(folder)["optimizer"]["state"][0]["exp_avg"].abs().sum() == 0


def test_two_snapshots_are_kept_and_none_after_the_run(writer, stepper):
    for step in range(1, 5):
        writer.snapshot(at(stepper, step))
    writer.wait()

    assert sorted(os.listdir(writer.snapshots)) == ["epoch0_step3", "epoch0_step4"]
    writer.clean()
    assert not writer.snapshots.parent.exists()


def test_a_snapshot_that_was_torn_gives_way_to_the_one_before(writer, stepper):
    for step in (1, 2):
        writer.snapshot(at(stepper, step))
    writer.wait()
    (writer.snapshots / "epoch0_step2" / "state.pt").write_bytes(b"torn")

    assert checkpoint.newest(writer.places()).manifest.position.step == 1


def test_copying_the_state_allocates_nothing_each_time(stepper):
    """The guard was asked for these bytes once."""
    kept = StateCopy(stepper.model, stepper.optimizer)
    taken = kept.take(at(stepper, 1))
    pointers = [t.data_ptr() for t in taken.weights().values()]

    again = kept.take(at(stepper, 2))

    assert [t.data_ptr() for t in again.weights().values()] == pointers
    assert copy_bytes(stepper.model, stepper.optimizer) == 3 * 4 * (24 + 4) + 2 * 4


def test_a_write_that_failed_in_the_background_is_told_once_when_asked():
    background = Background("test")

    def fail() -> None:
        raise OSError("quota")

    background.start(fail)
    background.wait()
    assert str(background.failure()) == "quota"
    assert background.failure() is None
    background.start(lambda: None)
    background.wait()
    assert background.failure() is None


def test_without_memory_for_a_copy_checkpoints_are_still_written(writer, stepper, tmp_path):
    plain = Saver(writer.folder, snapshots=writer.snapshots, keep=2)

    plain.checkpoint(at(stepper, 5), best=True)

    assert not plain.can_snapshot
    assert plain.folder.pointed("last") == {"checkpoint": "epoch0_step5", "epoch": 0, "step": 5}


def test_an_emergency_checkpoint_goes_where_it_can(writer, stepper, tmp_path, monkeypatch):
    """The run folder cannot be written to: a file lies where its folder should be."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    writer.folder.checkpoints.rmdir()
    writer.folder.checkpoints.write_text("in the way")

    assert writer.emergency(at(stepper, 7), "test").parent == writer.snapshots
    writer.snapshots = tmp_path / "run/checkpoints/nowhere"
    path = writer.emergency(at(stepper, 8), "test")

    assert path.is_relative_to(tmp_path / "tmp")
    assert stat.S_IMODE(path.parents[1].stat().st_mode) == 0o700
    assert checkpoint.newest(writer.places()).manifest.position.step == 8
    monkeypatch.setattr("tempfile.tempdir", str(writer.folder.checkpoints))
    with pytest.raises(BrainencError, match=r"No emergency checkpoint could be saved.*checkpoints.*nowhere"):
        writer.emergency(at(stepper, 9), "test")


def test_a_folder_that_others_may_have_made_is_neither_read_nor_written(writer, stepper, tmp_path, monkeypatch):
    """In a temporary folder that everybody shares, its name can be guessed."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    spare = saver.spare_root(writer.folder)
    checkpoint.write(spare, at(stepper, 9), emergency=True)
    spare.parent.chmod(0o777)
    writer.folder.checkpoints.rmdir()
    writer.folder.checkpoints.write_text("in the way")
    writer.snapshots = writer.folder.checkpoints / "nowhere"

    assert checkpoint.newest(writer.places()).folder is None
    with pytest.raises(BrainencError, match="can be written to by others; nothing is kept there"):
        writer.emergency(at(stepper, 10), "test")


def test_debris_of_writers_that_died_is_swept(writer):
    (writer.folder.checkpoints / ".epoch0_step1.abc.partial").mkdir()

    saver.sweep(writer.places())

    assert os.listdir(writer.folder.checkpoints) == []
