"""Several ranks do what one does, and hear of one another's trouble at the same step."""

import threading
from contextlib import contextmanager

import pytest
import torch

from brainenc.errors import LossNotFinite, TrainingFailed
from brainenc.guard.messages import NullGuard, Order, OutOfTime
from brainenc.train.team import RankLost


class At:
    """Raises once, at a step, on a rank."""

    def __init__(self, error: Exception, *, step: int, rank: int, times: int = 1) -> None:
        self.error, self.step, self.rank, self.left = error, step, rank, times

    def at(self, *, step: int, rank: int) -> None:
        if step == self.step and rank == self.rank and self.left:
            self.left -= 1
            raise self.error


def out_of_memory() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB (on purpose)")


@pytest.fixture(scope="session")
def reference(small, tmp_path_factory):
    """Twenty steps of one worker without dropout."""
    return small.config(tmp_path_factory.mktemp("reference") / "run", dropout=0.0, epochs=4)


@pytest.fixture
def alone(reference, run_ranks, losses):
    from pathlib import Path

    if not Path(reference.out, "config.yaml").exists():
        run_ranks(reference)
    return losses(reference.out)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_together_have_the_loss_of_one(small, tmp_path, run_ranks, losses, alone, ranks):
    """Twenty steps, the same global batch; with three ranks, shares differ in size."""
    config = small.config(tmp_path / "run", dropout=0.0, epochs=4)

    outcomes = run_ranks(config, ranks)

    assert len(alone) == 20
    assert losses(config.out) == pytest.approx(alone, rel=1e-5)
    assert len({o.position for o in outcomes}) == 1


def test_more_ranks_than_samples_leave_some_without_work(small, tmp_path, run_ranks, losses):
    one, many = (small.config(tmp_path / name, dropout=0.0, epochs=1, batch_size=3) for name in ("one", "many"))

    run_ranks(one)
    outcomes = run_ranks(many, 4)

    assert [o.status for o in outcomes] == ["done"] * 4
    assert losses(many.out) == pytest.approx(losses(one.out), rel=1e-5)


def test_resumed_on_other_numbers_of_ranks_the_order_of_samples_is_the_same(
    small, tmp_path, run_ranks, stop_at, losses, alone
):
    """2, then 1, then 4: the losses are those of a run that was never touched."""
    config = small.config(tmp_path / "run", dropout=0.0, epochs=4)

    for ranks, stop in ((2, 7), (1, 12)):
        guards = [stop_at(stop) for _ in range(ranks)]
        outcomes = run_ranks(config, ranks, lambda rank, guards=guards: {"guard": guards[rank]})
        assert {o.status for o in outcomes} == {"stopped"}
    outcomes = run_ranks(config, 4)

    assert {o.status for o in outcomes} == {"done"}
    assert losses(config.out) == pytest.approx(alone, rel=1e-5)


def test_out_of_memory_on_one_rank_halves_the_micro_batch_of_all(small, tmp_path, run_ranks, losses, alone):
    config = small.config(tmp_path / "run", dropout=0.0, epochs=4)
    notes = []

    outcomes = run_ranks(
        config, 2, lambda rank: {"drill": At(out_of_memory(), step=3, rank=1), "on_note": notes.append}
    )

    assert [(o.status, o.position.micro_batch) for o in outcomes] == [("done", 2)] * 2
    assert any("Rank 1 ran out of memory at step 3: micro-batches of 2" in n for n in notes)
    assert losses(config.out) == pytest.approx(alone, rel=1e-5)


def test_out_of_memory_stops_a_run_that_was_told_to_stop(small, tmp_path, run_ranks, losses, alone):
    """``--on-critical stop``: saved by all at the same step, and the same numbers after a resume."""
    config = small.config(tmp_path / "run", dropout=0.0, epochs=4, guard={"enabled": False, "on_critical": "stop"})

    outcomes = run_ranks(config, 2, lambda rank: {"drill": At(out_of_memory(), step=3, rank=1)})

    assert [(o.status, o.position.step) for o in outcomes] == [("stopped", 3)] * 2
    assert all("out of memory" in o.reason and o.checkpoint for o in outcomes)
    assert run_ranks(config, 2)[0].status == "done"
    assert losses(config.out) == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_out_of_memory_inside_the_model_is_heard_by_all(small, tmp_path, run_ranks, losses, alone, where):
    """Raised by a hook in the middle of one rank's forward or backward, for the fourth batch, twice."""
    config = small.config(tmp_path / "run", dropout=0.0, epochs=4)
    calls = []

    def fail(_module, _args, output):
        if threading.current_thread() is not victim[0] or not torch.is_grad_enabled():
            return
        calls.append(1)
        if len(calls) in (40, 60):
            if where == "forward":
                raise out_of_memory()
            tensor = output[0] if isinstance(output, tuple) else output
            tensor.register_hook(lambda grad: raise_(out_of_memory()))

    victim = []

    def around(rank: int) -> dict:
        if rank == 1:
            victim.append(threading.current_thread())
        return {}

    handle = torch.nn.modules.module.register_module_forward_hook(fail)
    try:
        outcomes = run_ranks(config, 2, around)
    finally:
        handle.remove()

    assert [(o.status, o.position.micro_batch) for o in outcomes] == [("done", 1)] * 2
    assert losses(config.out) == pytest.approx(alone, rel=1e-5)


def raise_(error: Exception) -> None:
    raise error


def test_out_of_memory_with_single_samples_saves_and_fails(small, tmp_path, run_ranks):
    config = small.config(tmp_path / "run", dropout=0.0, micro_batch=1)

    outcomes = run_ranks(config, 2, lambda rank: {"drill": At(out_of_memory(), step=3, rank=1)})

    assert [(o.status, o.position.step) for o in outcomes] == [("failed", 3)] * 2
    assert "Rank 1 ran out of memory with one sample at a time" in str(outcomes[0].error)
    assert outcomes[0].checkpoint.endswith("emergency_epoch0_step3")


def test_an_order_to_one_rank_stops_all_at_the_same_step(small, tmp_path, run_ranks, stop_at):
    config = small.config(tmp_path / "run")
    guards = [stop_at(10**9), stop_at(4)]

    outcomes = run_ranks(config, 2, lambda rank: {"guard": guards[rank]})

    assert {(o.status, o.position.step, o.reason) for o in outcomes} == {("stopped", 5, "asked at step 4")}
    assert guards[0].acks == guards[1].acks == [(outcomes[0].checkpoint, 5, 0, "")]


@pytest.mark.parametrize(("kind", "micro_batch"), [("shrink", 2), ("checkpoint", 4)])
def test_an_order_to_shrink_or_to_save_goes_on(small, tmp_path, run_ranks, stop_at, losses, alone, kind, micro_batch):
    config = small.config(tmp_path / "run", dropout=0.0, epochs=4)
    guards = [stop_at(4, kind), stop_at(10**9)]

    outcomes = run_ranks(config, 2, lambda rank: {"guard": guards[rank]})

    assert [(o.status, o.position.micro_batch or 4) for o in outcomes] == [("done", micro_batch)] * 2
    assert guards[0].acks[0][1:] == (5, 0, "")
    assert losses(config.out) == pytest.approx(alone, rel=1e-5)


def test_a_failure_before_go_stops_all_and_names_rank_and_cause(small, tmp_path, run_ranks):
    config = small.config(tmp_path / "run")

    outcomes = run_ranks(config, 2, lambda rank: {"drill": At(OSError("disk gone"), step=3, rank=1)})

    assert [(o.status, o.position.step) for o in outcomes] == [("failed", 3)] * 2
    assert isinstance(outcomes[0].error, TrainingFailed)
    assert "Rank 1 failed in its own part of step 3: OSError: disk gone" in str(outcomes[0].error)


def test_a_failure_after_go_is_told_at_the_next_step_and_that_copy_does_not_count(
    small, tmp_path, run_ranks, monkeypatch
):
    """Rank 0 breaks in its update: rank 1 writes the checkpoint."""
    config = small.config(tmp_path / "run", dropout=0.0)
    victim = []

    def around(rank: int) -> dict:
        if rank == 0:
            victim.append(threading.current_thread())
        return {}

    plain, calls = torch.optim.AdamW.step, []

    def broken(self, closure=None):
        if threading.current_thread() is victim[0]:
            calls.append(1)
            if len(calls) == 3:
                raise RuntimeError("update failed on purpose")
        return plain(self, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", broken)
    outcomes = run_ranks(config, 2, around)

    assert [(o.status, o.position.step) for o in outcomes] == [("failed", 3)] * 2
    assert "Rank 0 failed in the update after the others had gone on" in str(outcomes[0].error)
    assert outcomes[0].checkpoint == outcomes[1].checkpoint != ""


def test_a_loss_that_is_not_finite_names_the_step_and_the_samples(small, tmp_path, run_ranks, monkeypatch):
    config = small.config(tmp_path / "run")
    from brainenc.train.data import Batch

    plain = Batch.part

    def poisoned(self, first, last):
        features, lh, rh = plain(self, first, last)
        return features, lh * (float("nan") if self.step == 2 else 1.0), rh

    monkeypatch.setattr(Batch, "part", poisoned)
    (outcome,) = run_ranks(config)

    assert isinstance(outcome.error, LossNotFinite)
    assert (outcome.status, outcome.position.step) == ("failed", 2)
    assert "the loss of step 2 is nan on the samples nsd-" in str(outcome.error)


def test_a_rank_that_vanishes_is_noticed_and_the_last_step_is_saved(small, tmp_path, run_ranks):
    """The survivor does not hang; what it had finished lies in the run's checkpoints."""
    config = small.config(tmp_path / "run")

    class Vanishes(BaseException):
        pass

    with pytest.raises((Vanishes, RankLost)):
        run_ranks(config, 2, lambda rank: {"drill": At(Vanishes(), step=3, rank=1)})

    assert (tmp_path / "run" / "checkpoints" / "emergency_epoch0_step3" / "manifest.json").exists()


@pytest.mark.parametrize(("kind", "status"), [("stop", "stopped"), ("shrink", "done")])
def test_when_time_is_shorter_than_a_step_a_rank_saves_first_and_tells_then(
    small, tmp_path, run_ranks, stop_at, losses, alone, kind, status
):
    """The guard interrupts rank 1 in its forward: the last finished step lies on disk before the ranks meet again."""
    config = small.config(tmp_path / "run", dropout=0.0, epochs=4)
    guards = [stop_at(10**9), stop_at(10**9, kind)]
    emergency = tmp_path / "run" / "checkpoints" / "emergency_epoch0_step3"
    order = Order(kind=kind, reason="filling at 13 GB/s", urgent=True)
    was_there = []

    @contextmanager
    def interrupted():
        yield
        if guards[1].now == 3 and not guards[1].acks:
            guards[1].pending = lambda: None if kind == "shrink" and guards[1].acks else order
            raise OutOfTime

    guards[1].computing = interrupted
    plain = guards[1].saved

    def saved(**fields):
        was_there.append((emergency / "manifest.json").exists())
        plain(**fields)

    guards[1].saved = saved
    outcomes = run_ranks(config, 2, lambda rank: {"guard": guards[rank]})

    assert {o.status for o in outcomes} == {status}
    assert was_there[0], "saved before the other rank was asked"
    if kind == "stop":
        assert {(o.position.step, o.reason) for o in outcomes} == {(3, "filling at 13 GB/s")}
    else:
        assert {o.position.micro_batch for o in outcomes} == {2}
        assert losses(config.out) == pytest.approx(alone, rel=1e-5)


class Timed(NullGuard):
    """Keeps what it is told about the time that checkpoints take."""

    def __init__(self):
        self.seconds = []

    def save_takes(self, seconds):
        self.seconds.append(seconds)


def test_every_rank_hears_what_to_expect_of_a_checkpoint_and_the_writer_what_it_took(small, tmp_path, run_ranks):
    guards = [Timed(), Timed()]

    run_ranks(small.config(tmp_path / "run", checkpoint_every_s=0.001), 2, lambda rank: {"guard": guards[rank]})

    assert guards[0].seconds[0] == guards[1].seconds[0] > 0.1  # rank 0 measures its disk for all
    assert len(guards[0].seconds) > 1
    assert all(0 < seconds < guards[0].seconds[0] for seconds in guards[0].seconds[1:])  # 70 kB: far below the margin
    assert len(guards[1].seconds) == 1
