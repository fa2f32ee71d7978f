"""A checkpoint is whole and verified, or is not taken for one."""

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from brainenc.errors import CheckpointUnusable
from brainenc.train import checkpoint
from brainenc.train.checkpoint import Contents, Position


def contents(step: int = 3, *, width: int = 8, run: str = "") -> Contents:
    torch.manual_seed(step)
    model = torch.nn.Linear(width, 5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(2, width)).sum().backward()
    optimizer.step()
    return Contents(
        position=Position(step=step, epoch=step // 10, validated=1, micro_batch=4, best=0.25),
        weights=model.state_dict, optimizer=optimizer.state_dict(),
        config={"seed": 1} | ({"id": run} if run else {}), provenance={"subject": "x"}, random={"seed": 1},
    )  # fmt: skip


def test_what_was_written_is_read_back(tmp_path):
    """By us, by the safetensors library, and by torch with weights only."""
    given = contents()

    folder = checkpoint.write(tmp_path, given)

    assert folder.name == "epoch0_step3"
    assert sorted(os.listdir(folder)) == ["manifest.json", "model.safetensors", "state.pt"]
    assert checkpoint.verify(folder).position == given.position
    weights = load_file(folder / "model.safetensors")
    assert all(torch.equal(weights[name], tensor) for name, tensor in given.weights().items())
    state = torch.load(folder / "state.pt", weights_only=True)
    assert state["position"] == {
        "step": 3,
        "epoch": 0,
        "validated": 1,
        "micro_batch": 4,
        "best": 0.25,
        "val_perf": None,
    }
    assert torch.equal(state["optimizer"]["state"][0]["exp_avg"], given.optimizer["state"][0]["exp_avg"])
    assert (state["config"], state["random"]) == ({"seed": 1}, {"seed": 1})


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_byte_that_changes_or_is_lost_is_noticed(data, tmp_path_factory):
    folder = checkpoint.write(tmp_path_factory.mktemp("torn"), contents())
    victim = folder / data.draw(st.sampled_from(["model.safetensors", "state.pt", "manifest.json"]))
    raw = bytearray(victim.read_bytes())
    if data.draw(st.booleans()):
        last = len(raw) - (2 if victim.name == "manifest.json" else 1)  # its final newline tells nothing
        del raw[data.draw(st.integers(0, last)) :]
    elif victim.name == "manifest.json":  # a changed space in it would change nothing that counts
        return
    else:
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    victim.write_bytes(raw)

    with pytest.raises(CheckpointUnusable):
        checkpoint.verify(folder)


def test_the_newest_that_verifies_is_taken_and_the_others_are_explained(tmp_path):
    here, there = tmp_path / "run", tmp_path / "snapshots"
    checkpoint.write(here, contents(10))
    checkpoint.write(there, contents(20))
    (checkpoint.write(here, contents(30)) / "state.pt").unlink()
    checkpoint.write(here, contents(25), emergency=True)
    with open(here / "emergency_epoch2_step25" / "model.safetensors", "ab") as file:
        file.write(b"more")

    choice = checkpoint.newest([here, there])

    assert choice.folder == there / "epoch2_step20"
    assert [s.split(" is ")[1].split(":")[0] for s in choice.skipped] == ["torn", "torn"]
    assert "state.pt is missing" in choice.skipped[0]


def test_writing_the_same_position_again_keeps_a_whole_one_and_replaces_a_torn_one(tmp_path):
    folder = checkpoint.write(tmp_path, contents())
    before = os.stat(folder).st_ino

    assert os.stat(checkpoint.write(tmp_path, contents())).st_ino == before
    (folder / "state.pt").write_bytes(b"")
    checkpoint.verify(checkpoint.write(tmp_path, contents()))


def test_the_same_position_of_another_run_is_no_checkpoint_of_this_one(tmp_path):
    """What an earlier run left where emergency checkpoints go when the run folder takes none."""
    checkpoint.write(tmp_path, contents(run="old"), emergency=True)

    folder = checkpoint.write(tmp_path, contents(run="new"), emergency=True)

    assert checkpoint.verify(folder).config["id"] == "new"
    assert os.listdir(tmp_path) == [folder.name]


def test_a_full_disk_leaves_nothing_behind_and_older_ones_whole(tmp_path, monkeypatch):
    """The error is the operating system's own; only the write that fails is chosen here."""
    checkpoint.write(tmp_path, contents(1))
    plain, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return plain(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left for a checkpoint"):
        checkpoint.write(tmp_path, contents(2))

    assert os.listdir(tmp_path) == ["epoch0_step1"]
    assert checkpoint.newest([tmp_path]).folder == tmp_path / "epoch0_step1"


def test_pruning_keeps_the_newest_the_best_and_the_newest_emergency(tmp_path):
    for step in (1, 2, 3, 4):
        checkpoint.write(tmp_path, contents(step))
    for step in (2, 3):
        checkpoint.write(tmp_path, contents(step), emergency=True)

    checkpoint.prune(tmp_path / "epoch0_step4", keep=2, best="epoch0_step1")

    assert sorted(os.listdir(tmp_path)) == ["emergency_epoch0_step3", "epoch0_step1", "epoch0_step3", "epoch0_step4"]


def test_pruning_counts_and_removes_what_is_of_its_own_run_only(tmp_path):
    """An earlier run in the same place had come further; the new one keeps its own two."""
    old = {checkpoint.write(tmp_path, contents(step, run="old")).name for step in (70, 80)}
    for step in (10, 20, 30):
        checkpoint.prune(checkpoint.write(tmp_path, contents(step, run="new")), keep=2)

    assert set(os.listdir(tmp_path)) == {*old, "epoch2_step20", "epoch3_step30"}
    assert checkpoint.newest([tmp_path], "new").manifest.position.step == 30


def test_pruning_never_removes_whole_ones_in_favour_of_damaged_ones(tmp_path):
    """The run went on from step 50, because the newer ones were torn."""
    for step in (40, 50, 100, 110):
        checkpoint.write(tmp_path, contents(step))
    for step in (100, 110):
        (tmp_path / f"epoch{step // 10}_step{step}" / checkpoint.WEIGHTS).write_bytes(b"torn")

    removed = checkpoint.prune(checkpoint.write(tmp_path, contents(60)), keep=2)

    assert [path.name for path in removed] == ["epoch4_step40"]
    assert checkpoint.newest([tmp_path]).manifest.position.step == 60
    checkpoint.prune(checkpoint.write(tmp_path, contents(120)), keep=2)
    assert sorted(os.listdir(tmp_path)) == ["epoch12_step120", "epoch6_step60"]


def test_what_a_death_left_half_removed_goes_and_what_cannot_be_understood_stays(tmp_path):
    newer = checkpoint.write(tmp_path, contents(10)) / checkpoint.MANIFEST
    newer.write_text(newer.read_text().replace('"version": 1', '"version": 99'))
    (checkpoint.write(tmp_path, contents(20)) / checkpoint.MANIFEST).unlink()

    checkpoint.prune(checkpoint.write(tmp_path, contents(30)), keep=1)

    assert sorted(os.listdir(tmp_path)) == ["epoch1_step10", "epoch3_step30"]


def test_keys_that_differ_are_named(tmp_path):
    folder = checkpoint.write(tmp_path, contents())

    with pytest.raises(
        CheckpointUnusable, match=r"bias: unknown to the model.*weight: \(5, 8\) in the checkpoint, \(5, 9\)"
    ):
        checkpoint.load_weights(folder, torch.nn.Linear(9, 5, bias=False))


def test_another_version_is_refused_in_a_sentence(tmp_path):
    folder = checkpoint.write(tmp_path, contents())
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"version": 1', '"version": 99'))

    with pytest.raises(CheckpointUnusable, match="version 99 of the checkpoint format, this brainenc reads 1"):
        checkpoint.verify(folder)


@pytest.mark.parametrize("name", ["../other", "/etc/hostname", "sub/file", "..", ""])
def test_a_manifest_that_names_files_elsewhere_is_not_trusted(tmp_path, name):
    """A folder may come from anywhere: nothing outside of it is opened because it says so."""
    folder = checkpoint.write(tmp_path, contents())
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = manifest["files"]["state.pt"]
    (folder / "manifest.json").write_text(json.dumps(manifest))

    with pytest.raises(CheckpointUnusable, match="is not to be trusted"):
        checkpoint.verify(folder)
    assert checkpoint.newest([tmp_path]).folder is None


def test_a_death_while_writing_leaves_no_checkpoint(tmp_path):
    """SIGKILL between the files and the rename: only debris, which `sweep` removes."""
    program = f"""
import os, signal, sys
sys.path[:0] = {sys.path!r}
from pathlib import Path
import torch
from brainenc.train import checkpoint
checkpoint.verify = lambda folder: os.kill(os.getpid(), signal.SIGKILL)
model = torch.nn.Linear(2, 2)
contents = checkpoint.Contents(
    position=checkpoint.Position(step=1, epoch=0), weights=model.state_dict, optimizer={{}}
)
checkpoint.write(Path({str(tmp_path)!r}), contents)
"""
    code = subprocess.run([sys.executable, "-c", program], timeout=60).returncode

    assert code == -9
    assert checkpoint.newest([tmp_path]).folder is None
    assert len(os.listdir(tmp_path)) == 1
    checkpoint.sweep(tmp_path)
    assert os.listdir(tmp_path) == []


def test_two_writers_of_one_position_leave_one_whole_checkpoint(tmp_path, monkeypatch):
    """The loser of the race finds the winner's, and is content with it."""
    given = contents()
    plain, raced = os.rename, []

    def slow(source, target):
        if not raced:
            raced.append(True)
            checkpoint.write(tmp_path, replace(given))
        return plain(source, target)

    monkeypatch.setattr(os, "rename", slow)
    folder = checkpoint.write(tmp_path, given)

    checkpoint.verify(folder)
    assert os.listdir(tmp_path) == ["epoch0_step3"]


def test_another_run_that_is_quicker_at_the_same_place_is_not_taken_for_this_one(tmp_path, monkeypatch):
    plain, raced = os.rename, []

    def slow(source, target):
        if not raced:
            raced.append(True)
            checkpoint.write(tmp_path, contents(run="other"))
        return plain(source, target)

    monkeypatch.setattr(os, "rename", slow)
    with pytest.raises(CheckpointUnusable, match="is of another run, and cannot be replaced"):
        checkpoint.write(tmp_path, contents(run="mine"))

    assert os.listdir(tmp_path) == ["epoch0_step3"]


def test_writers_that_still_move_are_waited_for(tmp_path):
    """Of a run whose driver has lost its Ray: workers elsewhere save, and what they save is what it goes on from."""
    partial = tmp_path / ".emergency_epoch1_step7.abc.partial"
    partial.mkdir()

    def write():
        for _ in range(5):
            time.sleep(0.3)
            with open(partial / "state.pt", "ab") as file:
                file.write(b"x" * 100)
        os.rename(partial, tmp_path / "emergency_epoch1_step7")

    writing = threading.Thread(target=write)
    writing.start()
    checkpoint.wait_for_writers([tmp_path, tmp_path / "missing"], patience_s=60, still_s=10)
    assert (tmp_path / "emergency_epoch1_step7").exists()
    writing.join()


def test_writers_that_died_are_not(tmp_path):
    (tmp_path / ".epoch1_step7.abc.partial").mkdir()
    (tmp_path / ".epoch1_step7.abc.partial" / "state.pt").write_bytes(b"x")

    checkpoint.wait_for_writers([tmp_path], patience_s=3600, still_s=0.5)

    assert (tmp_path / ".epoch1_step7.abc.partial").exists()
