"""A run on Ray Train: its trainer, the guard's coordinator beside it, signals, and what its workers died of. Driver."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import contextmanager
from typing import Any

from brainenc.errors import BrainencError, TrainingFailed
from brainenc.guard import banner, signals
from brainenc.metrics import Gauges
from brainenc.train import orders, prepare
from brainenc.train.config import TrainConfig, Workers
from brainenc.train.elsewhere import elsewhere, resume_command
from brainenc.train.fitting import Outcome
from brainenc.train.follow import Note, Progress, following
from brainenc.train.inputs import OpenViews
from brainenc.train.on_ray.cluster import RayThere, about_gpus, default_workers, joined, per_worker, room_without
from brainenc.train.on_ray.rank import run_rank
from brainenc.train.on_ray.scaling import elastic_trainer
from brainenc.train.run_folder import RunFolder

_LOST_AFTER = 3
"""Looks, a second apart, at a head of Ray that has ended."""


_WRITERS_PATIENCE_S = 40.0


def train_on_ray(config: TrainConfig, asked: Workers | None, views: OpenViews, progress: Progress, note: Note) -> Any:
    with joined(config, asked) as there:
        workers = asked or default_workers(config.device, there.gpus)
        if not RunFolder(config.out).metrics_file.exists():  # a run that goes on may do so with fewer
            prepare.refuse_absent_ranks(config, workers)
        each = per_worker(config.device, there.gpus)
        if text := about_gpus(config, workers, each, there):
            note(text)
        return _fitted(config, there, workers, each, views, progress, note)


def _fitted(
    config: TrainConfig, there: RayThere, workers: Workers, each: Mapping[str, float], views: OpenViews,
    progress: Progress, note: Note,
) -> Any:  # fmt: skip
    """Train on the Ray that was joined; each worker takes this much of a node."""
    folder = RunFolder(config.out)
    with _coordinator(config, workers, each, note) as coordinator:
        stopper = Stopper(folder, coordinator)
        shown = _also_metrics(progress, config.out)
        # ray.init and, in the main thread, fit install handlers that end the run on the spot: ours come after, and fit
        # runs in a thread.
        with following(folder, shown, note), signals.asked_to_stop(stopper):
            try:
                result = fit(
                    config, lambda: _trainer(config, workers, each, views, coordinator), stopper, note,
                    lost=lambda: there.lost,
                )  # fmt: skip
            except Exception as error:
                # A signal to every process at once ends the workers, or Ray, before they could answer.
                if stopper.reason and (outcome := _left_behind(config, stopper.reason)) is not None:
                    note(f"The workers could not answer any more ({_first_line(error)}).")
                    return outcome
                raise
    outcome = getattr(result, "return_value", None)
    if outcome is None:
        raise TrainingFailed(f"The workers of {config.out} ended without an outcome: {result.error}.")
    return outcome


def fit(
    config: TrainConfig, make_trainer: Callable[[], Any], stopper: Stopper, note: Note,
    lost: Callable[[], bool] = lambda: False,
) -> Any:  # fmt: skip
    """Have Ray train; it begins again by itself when workers die.

    Its controller gives up at once, whatever the budget, when Ray's memory monitor has killed one of its helpers: those
    are killed first, because Ray could restart them. Then another controller goes on from the newest checkpoint.

    Raises:
        BrainencError: what the workers died of, or the controllers, more often than the run allows.
    """
    from ray.train import ControllerError, WorkerGroupError

    tries = config.max_failures if config.max_failures >= 0 else sys.maxsize
    while True:
        try:
            return _in_thread(make_trainer().fit, lambda: bool(stopper.reason) and lost())
        except WorkerGroupError as error:
            raise _cause(error.worker_failures, config) from error
        except ControllerError as error:
            cause = _first_line(getattr(error, "controller_failure", None) or error)
            if tries <= 0 or stopper.reason:
                raise TrainingFailed(
                    f"Ray's controller of {config.out} failed: {cause}. What was saved stays: "
                    f"`{resume_command(config.out, config.address)}` goes on from the newest checkpoint."
                ) from error
            tries -= 1
            note(f"Ray's controller of this training failed ({cause}); another goes on from the newest checkpoint.")


class Stopper:
    """Tells the ranks of a signal to the driver; `fit` returns when all of them have saved and stopped.

    Two ways, of which one is enough: the coordinator, and an order in the run folder.
    """

    def __init__(self, folder: RunFolder, coordinator: Any) -> None:
        self._folder, self._coordinator = folder, coordinator
        self.reason = ""
        """Why everybody was asked to stop; empty while nobody was."""

    def __call__(self, number: int) -> None:
        self.reason = reason = f"the driver received {signals.name(number)}"
        if self._coordinator is not None:
            self._coordinator.trip("stop", reason)
        try:
            orders.give(self._folder, "stop", reason)
        except OSError as error:  # a full or read-only disk; raised here it would end the driver in place of the ranks
            banner.say(self._untold(error))

    def _untold(self, error: OSError) -> str:
        trouble = f"brainenc: the order to stop could not be written to {orders.order_file(self._folder)} ({error})"
        if self._coordinator is not None:
            return f"{trouble}; the ranks hear of it from the guard's coordinator."
        return (
            f"{trouble}, and without a guard the ranks hear of it in no other way. Make room there and send the signal "
            "again; what was saved last stays."
        )


@contextmanager
def _coordinator(config: TrainConfig, workers: Workers, each: Mapping[str, float], note: Note) -> Iterator[Any]:
    """The guard's coordinator, made before any worker so that Ray's memory monitor takes it last."""
    from brainenc.train import guarding

    if not guarding.is_guarded(config):
        yield None
        return
    from brainenc.guard.actors import ray_conflicts, start_coordinator

    guard = guarding.worker_config(config)
    for conflict in ray_conflicts(guard.policy.thresholds):
        note(conflict)
    handle = start_coordinator(
        config.out, workers.high, on_critical=guard.on_critical, dwell_s=guard.policy.dwell_s,
        resume=resume_command(config.out, config.address),
        goes_on=lambda there, leaving: room_without(leaving, there, each) >= workers.low,
    )  # fmt: skip
    try:
        yield handle
    finally:
        handle.close()


def _trainer(
    config: TrainConfig, workers: Workers, each: Mapping[str, float], views: OpenViews, coordinator: Any
) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    folder, gpu = RunFolder(config.out), "GPU" in each
    elastic = workers.low < workers.high
    number: Any = (workers.low, workers.high) if elastic else workers.low
    trainer = elastic_trainer() if elastic else TorchTrainer
    return trainer(
        run_rank,
        train_loop_config={
            "config": config.to_dict(), "views": views, "driver": (os.getpid(), socket.gethostname()),
            "coordinator": coordinator, "elsewhere": elsewhere(folder.path),
        },
        scaling_config=ScalingConfig(
            num_workers=number, use_gpu=gpu, resources_per_worker=dict(each)
        ),
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo", timeout_s=max(1800, int(config.status_timeout_s))),
        run_config=RunConfig(
            # A name of its own: Ray's record of an earlier attempt must not decide where this one begins.
            name=f"run{folder.next_run()}-{int(time.time())}",
            storage_path=str(folder.ray),
            failure_config=FailureConfig(max_failures=config.max_failures),
        ),
    )  # fmt: skip


def _left_behind(config: TrainConfig, reason: str) -> Outcome | None:
    """A safe stop of which the workers could not tell: at the newest state of theirs that verifies, if there is one."""
    from brainenc.train import checkpoint
    from brainenc.train.saver import snapshot_root, spare_root

    folder = RunFolder(config.out)
    roots = [folder.checkpoints, snapshot_root(folder, config.snapshot_dir), spare_root(folder)]
    checkpoint.wait_for_writers(roots, patience_s=_WRITERS_PATIENCE_S)  # workers elsewhere may live, and save
    found = checkpoint.newest([root for root in roots if root.is_dir()], config.id)
    if found.manifest is None:
        return None
    return Outcome(status="stopped", position=found.manifest.position, reason=reason, checkpoint=str(found.folder))


def _also_metrics(progress: Progress, run: str) -> Progress:
    """Show records as Ray metrics, too; nobody hears them where Ray runs without its dashboard."""
    from ray.util.metrics import Gauge

    gauges = Gauges(lambda name, about, tags: Gauge(name, description=about, tag_keys=tags), run=run)

    def show(record: Mapping[str, Any]) -> None:
        validation = record.get("split") == "val"  # its loss is another one
        gauges.set({name: value for name, value in record.items() if not (validation and name == "loss")})
        progress(record)

    return show


def _in_thread(call: Callable[[], Any], lost: Callable[[], bool]) -> Any:
    """Call in a thread of its own; signals are handled here meanwhile.

    Raises:
        TrainingFailed: ``lost``, three seconds in a row: who could answer the call is gone.
    """
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="fit", daemon=True).start()
    in_a_row = 0
    while not wait([future], timeout=1.0).done:
        in_a_row = in_a_row + 1 if lost() else 0
        if in_a_row == _LOST_AFTER:
            raise TrainingFailed("Ray's head has ended")
    return future.result()


def _cause(failures: Mapping[int, BaseException], config: TrainConfig) -> BrainencError:
    """The error to show of those that workers died of: one of ours that is not just the echo of another's death."""
    from brainenc.train.team import RankLost

    causes = [getattr(e, "cause", None) or e for e in failures.values()]
    ours = sorted((e for e in causes if isinstance(e, BrainencError)), key=lambda e: isinstance(e, RankLost))
    if ours and not isinstance(ours[0], RankLost):
        return ours[0]
    ranks = "; ".join(f"rank {rank}: {_first_line(error)}" for rank, error in sorted(failures.items()))
    return TrainingFailed(
        f"Training failed {config.max_failures + 1} times, the last time with {ranks}. What was saved stays: "
        f"`{resume_command(config.out, config.address)}` goes on from the newest checkpoint."
    )


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
