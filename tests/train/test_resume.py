"""A run that was interrupted and resumed ends as one that was not."""

import shutil

import pytest
import torch

from brainenc.train import checkpoint
from brainenc.train.run_folder import RunFolder

STEPS = 10
"""Two epochs of five."""


@pytest.fixture(scope="session")
def undisturbed(small, tmp_path_factory):
    """A whole run, with dropout."""
    return small.config(tmp_path_factory.mktemp("whole") / "run")


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def whole(undisturbed, run_ranks):
    if not RunFolder(undisturbed.out).config_file.exists():
        assert run_ranks(undisturbed)[0].status == "done"
    return undisturbed.out


@pytest.mark.parametrize("step", [0, 4, 5, 10])
def test_resumed_at_any_step_weights_are_bit_equal(
    small, tmp_path, run_ranks, stop_at, whole, final_state, losses, step
):
    """With dropout: random numbers derive from the step. Step 5 is the end of an epoch, 10 comes before validation."""
    config = small.config(tmp_path / "run")
    guard = stop_at(step)
    guard.now = 0

    (stopped,) = run_ranks(config, around=lambda rank: {"guard": guard})
    (outcome,) = run_ranks(config)

    assert stopped.status == "stopped"
    assert f"emergency_epoch{stopped.position.epoch}_step{stopped.position.step}" in stopped.checkpoint
    assert step <= stopped.position.step <= step + 1
    assert outcome.status == "done"
    assert outcome.position.step == STEPS
    assert equal(final_state(config.out), final_state(whole))
    assert losses(config.out) == losses(whole)


def test_stopped_again_and_again_it_still_ends_bit_equal(small, tmp_path, run_ranks, stop_at, whole, final_state):
    config = small.config(tmp_path / "run")
    statuses = []
    for _ in range(3 * STEPS):
        guard = stop_at(-1)  # at the first boundary, whatever it is
        statuses.append(run_ranks(config, around=lambda rank, guard=guard: {"guard": guard})[0].status)
        if checkpoint.newest([RunFolder(config.out).checkpoints]).manifest.position.step == STEPS:
            break

    (outcome,) = run_ranks(config)

    assert set(statuses) == {"stopped"}
    assert outcome.status == "done"
    assert equal(final_state(config.out), final_state(whole))


def test_a_torn_newest_checkpoint_is_passed_over_and_said(small, tmp_path, run_ranks, whole, final_state):
    """Three ways to be torn, each on top of a whole older one."""
    config = small.config(tmp_path / "run")
    shutil.copytree(whole, config.out)
    folder = RunFolder(config.out)
    newest = folder.checkpoints / "epoch1_step10"
    with open(newest / checkpoint.WEIGHTS, "r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    fake = folder.checkpoints / "epoch7_step40"
    shutil.copytree(folder.checkpoints / "epoch0_step5", fake)
    (fake / checkpoint.MANIFEST).unlink()
    notes = []

    (outcome,) = run_ranks(config, around=lambda rank: {"on_note": notes.append})

    assert outcome.position.step == STEPS
    assert any("epoch7_step40 is torn: it has no manifest.json" in n for n in notes)
    assert any("epoch1_step10 is damaged" in n for n in notes)
    assert any("Going on from" in n and "epoch0_step5" in n for n in notes)
    assert equal(final_state(config.out), final_state(whole))


@pytest.mark.parametrize("torn", [False, True])
def test_a_run_that_has_to_begin_again_says_so(small, tmp_path, run_ranks, whole, torn):
    """Killed before anything was saved, or with nothing whole; a new run begins without a word."""
    config, notes = small.config(tmp_path / "run"), []
    hear = {"on_note": notes.append}
    run_ranks(small.config(tmp_path / "new", epochs=1), around=lambda rank: hear)
    assert not [n for n in notes if "beginning" in n]
    shutil.copytree(whole, config.out)
    for found in checkpoint.list_checkpoints(RunFolder(config.out).checkpoints):
        if torn:
            (found.folder / checkpoint.STATE).write_bytes(b"torn")
        else:
            checkpoint.discard(found.folder)

    run_ranks(config, around=lambda rank: hear)

    said = f"No checkpoint or snapshot {'can be used' if torn else 'yet'}: beginning again."
    assert notes.count(said) == 1
    assert said in RunFolder(config.out).log_file.read_text()


def test_records_of_steps_done_twice_count_once(small, tmp_path, run_ranks, whole, losses):
    """The run counter says which line is newer; readers see one line for each step."""
    config = small.config(tmp_path / "run")
    shutil.copytree(whole, config.out)
    folder = RunFolder(config.out)
    checkpoint.discard(folder.checkpoints / "epoch1_step10")

    run_ranks(config)

    lines = list(folder.metrics())
    assert [r["step"] for r in lines if r["split"] == "train"] == list(range(1, STEPS + 1))
    assert {r["run"] for r in lines if r["step"] > 5} == {1}
    assert losses(config.out) == losses(whole)


def test_a_checkpoint_of_another_model_names_the_keys_that_differ(small, tmp_path, run_ranks, whole):
    config = small.config(tmp_path / "run", encoder={"feedforward": 64})
    shutil.copytree(RunFolder(whole).checkpoints, RunFolder(config.out).checkpoints)

    with pytest.raises(
        checkpoint.CheckpointUnusable, match=r"linear1\.weight: \(32, 16\) in the checkpoint, \(64, 16\)"
    ):
        run_ranks(config)
