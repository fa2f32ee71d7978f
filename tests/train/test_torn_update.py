"""An update that fails halfway, just where something is to be saved: weights half of one step are never written."""

import threading

import pytest
import torch

from brainenc.guard.messages import Order
from brainenc.train import checkpoint
from brainenc.train.saver import Saver
from brainenc.train.schedule import Clock

FINISHED = 2
"""Steps before the one whose update fails."""


@pytest.fixture
def torn(monkeypatch):
    """Has the third update of some ranks fail halfway, as when memory is refused under the brake; for ``around``."""
    plain, victims, calls, errors = torch.optim.AdamW.step, {}, {}, {}

    def step(self, closure=None):
        rank = victims.get(threading.current_thread())
        calls[rank] = calls.get(rank, 0) + 1
        if rank is None or calls[rank] != FINISHED + 1:
            return plain(self, closure)
        (group,) = self.param_groups
        whole = group["params"]
        group["params"] = whole[: len(whole) // 2]
        plain(self, closure)
        group["params"] = whole
        raise errors[rank]("refused in the middle")

    def ranks(*numbers, error=MemoryError):
        errors.update(dict.fromkeys(numbers, error))

        def take(rank: int) -> None:
            if rank in numbers:
                victims[threading.current_thread()] = rank

        return take

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    return ranks


@pytest.fixture
def always_due(monkeypatch):
    """Every step saves what its clock is for, if that is switched on."""
    monkeypatch.setattr(Clock, "due", lambda self, now: self.every_s > 0)
    monkeypatch.setattr(Saver, "busy", False)


def saved_steps(run) -> list[int]:
    """Steps of all checkpoints and snapshots, each of which must be of one step in all of its parts."""
    steps = []
    for root in (run / "checkpoints", *(run / ".snapshots").glob("*")):
        for found in checkpoint.list_checkpoints(root):
            step = checkpoint.verify(found.folder).position.step
            state = checkpoint.load_state(found.folder)["optimizer"]["state"]
            assert {float(entry["step"]) for entry in state.values()} == {step}, f"torn: {found.folder}"
            steps.append(step)
    return sorted(steps)


DUE = {
    "stop": {},
    "shrink": {},
    "checkpoint": {},
    "periodic": {"checkpoint_every_s": 1.0},
    "snapshot": {"snapshot_every_s": 1.0},
}


def guards(stop_at, due: str, ranks: int) -> list:
    """Orders that are heard in the step whose update fails."""
    return [stop_at(FINISHED if due in ("stop", "shrink", "checkpoint") else 10**9, due) for _ in range(ranks)]


@pytest.mark.parametrize("due", DUE)
def test_alone_nothing_is_saved_of_a_step_that_was_not_finished(
    small, tmp_path, run_ranks, stop_at, torn, always_due, due
):
    config = small.config(tmp_path / "run", **{"checkpoint_every_s": 0, "snapshot_every_s": 0} | DUE[due])
    (guard,) = guards(stop_at, due, 1)
    victims = torn(0)

    (outcome,) = run_ranks(config, 1, lambda rank: victims(rank) or {"guard": guard})

    assert max(saved_steps(tmp_path / "run"), default=0) <= FINISHED
    assert (outcome.status, outcome.position.step, outcome.checkpoint) == ("failed", FINISHED, "")
    said = "Rank 0 failed in the update of step 2: MemoryError: refused in the middle. The last finished step is 2, and"
    assert f"{said} nothing was saved of it: no rank's weights are whole." in str(outcome.error)
    assert [(path, step) for path, step, *_ in guard.acks] == [("", FINISHED)]


@pytest.mark.parametrize("error", [MemoryError, ValueError])
@pytest.mark.parametrize("due", [*DUE, "nothing"])
def test_a_rank_whose_update_ended_saves_the_step_instead(
    small, tmp_path, run_ranks, stop_at, torn, always_due, due, error
):
    """Rank 0, which would have written, is the one that fails. If memory was refused, as the brake does before an order
    is heard, that is a safe stop; else it is a failure, unless everybody was asked to stop anyway."""
    config = small.config(tmp_path / "run", **{"checkpoint_every_s": 0, "snapshot_every_s": 0} | DUE.get(due, {}))
    heard = guards(stop_at, due, 2)
    victims = torn(0, error=error)

    outcomes = run_ranks(config, 2, lambda rank: victims(rank) or {"guard": heard[rank]})

    status = "stopped" if due == "stop" or error is MemoryError else "failed"
    assert [(o.status, o.position.step) for o in outcomes] == [(status, FINISHED + 1)] * 2
    assert outcomes[0].position == outcomes[1].position
    assert outcomes[0].checkpoint == outcomes[1].checkpoint != ""
    assert saved_steps(tmp_path / "run")[-1] == FINISHED + 1
    assert [guard.acks[-1][:2] for guard in heard] == [(outcomes[0].checkpoint, FINISHED + 1)] * 2
    if status == "failed":
        said = "Rank 0 failed in the update after the others had gone on, of step 2: ValueError: refused in the middle"
        assert said in str(outcomes[0].error)
        assert "The last finished step is 3." in str(outcomes[0].error)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_stop_that_nobody_can_save_for_is_no_safe_stop(small, tmp_path, run_ranks, stop_at, torn, ranks):
    """The order comes when every rank's update has failed already: exit 1 and not 75, with the first error."""
    victims, heard = torn(*range(ranks)), [stop_at(10**9) for _ in range(ranks)]
    plain = torch.optim.AdamW.step

    def ordered(self, closure=None):
        try:
            return plain(self, closure)
        except MemoryError:
            for guard in heard:
                guard.step = 0
            raise

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", ordered)
        outcomes = run_ranks(
            small.config(tmp_path / "run"), ranks, lambda rank: victims(rank) or {"guard": heard[rank]}
        )

    assert [(o.status, o.position.step, o.checkpoint) for o in outcomes] == [("failed", FINISHED, "")] * ranks
    assert "MemoryError: refused in the middle" in str(outcomes[0].error)
    assert "no rank's weights are whole" in str(outcomes[0].error)


def test_what_was_saved_on_the_spot_before_the_update_failed_counts(small, tmp_path, run_ranks, stop_at, torn):
    """Short of time, the guard has the finished step saved first; then the update fails as well."""
    (guard,), victims = guards(stop_at, "stop", 1), torn(0)
    order = Order(kind="stop", reason="filling fast", urgent=True)
    guard.pending = lambda: order if guard.now == FINISHED else None

    (outcome,) = run_ranks(small.config(tmp_path / "run"), 1, lambda rank: victims(rank) or {"guard": guard})

    assert (outcome.status, outcome.position.step) == ("stopped", FINISHED)
    assert saved_steps(tmp_path / "run") == [FINISHED]
    assert outcome.checkpoint.endswith("emergency_epoch0_step2")


def test_a_rank_that_failed_goes_on_with_the_others_from_what_they_saved(
    small, tmp_path, run_ranks, stop_at, torn, losses
):
    """The same numbers as a run that nothing happened to; rank 0, which records, did not finish the step itself."""
    whole, config = (small.config(tmp_path / name, dropout=0.0) for name in ("whole", "run"))
    run_ranks(whole, 2)
    victims = torn(0)
    run_ranks(config, 2, lambda rank: victims(rank) or {"guard": stop_at(FINISHED)})

    assert {o.status for o in run_ranks(config, 2)} == {"done"}
    wanted = {step: loss for step, loss in losses(whole.out).items() if step != FINISHED + 1}
    assert losses(config.out) == pytest.approx(wanted, rel=1e-5)
