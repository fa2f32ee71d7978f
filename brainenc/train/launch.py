"""Starting a run: in this process, or on workers of Ray Train. The only file of training that knows Ray. Driver."""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from brainenc.addresses import init_options, resolve
from brainenc.errors import BrainencError, TrainingFailed
from brainenc.guard import signals
from brainenc.guard.messages import EXIT_STOPPED_SAFELY, NullGuard, StepGuard
from brainenc.metrics import Gauges
from brainenc.train import finished, orders, prepare
from brainenc.train.alone import make_drills, train_alone
from brainenc.train.config import TrainConfig, Workers
from brainenc.train.elsewhere import elsewhere, on_this_node
from brainenc.train.encoders.base import RIDGE
from brainenc.train.follow import Note, Progress, following
from brainenc.train.inputs import OpenViews, StoredViews
from brainenc.train.orders import FolderOrders, Hearing
from brainenc.train.ridge_run import run_ridge
from brainenc.train.run_folder import RunFolder


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    """How a run ended."""

    status: str
    """``done``, ``stopped`` or ``failed``."""
    run_folder: str
    epoch: int
    step: int
    val_perf: float | None
    """The best of the run."""
    reason: str = ""
    checkpoint: str = ""
    """The emergency checkpoint, where one was written."""
    save_s: float = 0.0
    """Seconds that it took."""
    error: BrainencError | None = None

    @property
    def exit_code(self) -> int:
        """0 done, 75 stopped safely and resumable, 1 failed."""
        if self.status == "done":
            return 0
        return EXIT_STOPPED_SAFELY if self.status == "stopped" else 1


def train(
    config: TrainConfig, *, open_views: OpenViews | None = None, progress: Progress | None = None,
    note: Note | None = None,
) -> TrainResult:  # fmt: skip
    """Start a new run.

    Args:
        config: what to train; its run folder must not hold a run.
        open_views: what opens the features, for features that are not in a store; must pickle.
        progress: called with each record, in this process.
        note: called with lines for a person.

    Raises:
        BrainencError: the inputs are not usable; nothing was started.
    """
    resolve(config.address, command="train")  # refuse what cannot be joined before anything is made
    folder = RunFolder(config.out)
    note, config = note or _ignore, replace(config, id=secrets.token_hex(8))
    views = open_views or StoredViews(config)
    prepare.check(config, views, note=note)
    folder.create(config)
    prepare.save_split(config, folder)
    return _launch(config, views, progress or _ignore, note)


def resume(
    run_folder: str | Path, changes: Mapping[str, Any] | None = None, *, open_views: OpenViews | None = None,
    progress: Progress | None = None, note: Note | None = None,
) -> TrainResult:  # fmt: skip
    """Go on with a run from its newest checkpoint that verifies.

    Args:
        run_folder: of the run.
        changes: fields of the configuration that are different from here on; see ``CHANGEABLE``.
        open_views: as for :func:`train`.
        progress: as for :func:`train`.
        note: as for :func:`train`.

    Raises:
        UsageError: no run there, a change that would make it another run, or fewer epochs than it has trained.
    """
    folder = RunFolder(Path(run_folder).absolute())
    config = folder.config().resumed_with({**(changes or {}), "out": str(folder.path)})
    prepare.refuse_fewer_epochs(config)
    if not folder.split_file.exists():  # ended between the configuration and the split, which follows from it
        prepare.save_split(config, folder)
    asked, config = config, replace(config, split=str(folder.split_file))
    note = note or _ignore
    views = open_views or StoredViews(config)
    prepare.check(config, views, note=note)
    if changes:  # what is refused leaves the run as it was
        folder.update(asked)
    return _launch(config, views, progress or _ignore, note)


def _ignore(_: object) -> None:
    """Where nobody listens."""


def _launch(config: TrainConfig, views: OpenViews, progress: Progress, note: Note) -> TrainResult:
    if config.encoder.encoder == RIDGE:
        return _ridge(config, views, progress, note)
    if (end := finished.find(config)) is not None:
        note(f"{config.out} has finished all of its {config.epochs} epochs. More are asked for by --epochs.")
        return TrainResult(
            status="done", run_folder=config.out, epoch=end.epoch, step=end.step, val_perf=end.best
        )  # fmt: skip
    workers = Workers.parse(config.workers) if config.workers else default_workers()
    folder = RunFolder(config.out)
    try:
        with folder.held():
            orders.clear(folder)
            if workers.high == 0:
                outcome = train_alone(config, views, progress, note)
            else:
                outcome = _with_ray(config, workers, views, progress, note)
    except BrainencError as error:
        return _failed(config, error)
    best = outcome.position.best
    return TrainResult(
        status=outcome.status, run_folder=config.out, epoch=outcome.position.epoch, step=outcome.position.step,
        val_perf=best, reason=outcome.reason, checkpoint=outcome.checkpoint, save_s=outcome.save_s, error=outcome.error,
    )  # fmt: skip


def _ridge(config: TrainConfig, views: OpenViews, progress: Progress, note: Note) -> TrainResult:
    """The baseline: one process, no steps."""
    try:
        perf = run_ridge(config, views, progress=progress, note=note)
    except BrainencError as error:
        return _failed(config, error)
    return TrainResult(status="done", run_folder=config.out, epoch=0, step=0, val_perf=perf)


def _failed(config: TrainConfig, error: BrainencError) -> TrainResult:
    last = RunFolder(config.out).pointed("last") or {}
    return TrainResult(
        status="failed", run_folder=config.out, epoch=int(last.get("epoch", 0)), step=int(last.get("step", 0)),
        val_perf=None, reason=str(error), error=error,
    )  # fmt: skip


def default_workers() -> Workers:
    """The number of GPUs of this machine, else 1."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return Workers(low=max(1, gpus), high=max(1, gpus))


# ---------------------------------------------------------------------- on Ray's workers


class _Stopper:
    """Tells the ranks of a signal to the driver; `fit` returns when all of them have saved and stopped.

    Two ways, of which one is enough: the coordinator, and an order in the run folder.
    """

    def __init__(self, folder: RunFolder, coordinator: Any) -> None:
        self._folder, self._coordinator = folder, coordinator

    def __call__(self, number: int) -> None:
        reason = f"the driver received {signals.name(number)}"
        orders.give(self._folder, "stop", reason)
        if self._coordinator is not None:
            self._coordinator.trip("stop", reason)


@contextmanager
def _cluster(config: TrainConfig, workers: Workers) -> Iterator[Any]:
    """Ray, joined or started. One that was running in this process already is used and left alone."""
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    if workers.low < workers.high:  # a lost node counts as there for a while: try with what is left soon
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "20")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Of Ray's processes, which call us in a thread: arenas of threads hold some megabytes each, and keep nothing large.
    os.environ.setdefault("MALLOC_ARENA_MAX", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        yield ray
        return
    address = resolve(config.address, command="train")
    with signals.keeping():  # it installs one that ends the run on the spot
        ray.init(**init_options(address, num_cpus=max(os.cpu_count() or 1, workers.high)))
    try:
        yield ray
    finally:
        # How the run ended is known and saved: Ray's own handler would turn a late SIGTERM into a failure.
        with signals.handling(lambda number, frame: None):
            ray.shutdown()


def _with_ray(config: TrainConfig, workers: Workers, views: OpenViews, progress: Progress, note: Note) -> Any:
    folder = RunFolder(config.out)
    with _cluster(config, workers), _coordinator(config, workers, note) as coordinator:
        from ray.train import WorkerGroupError

        trainer = _trainer(config, workers, views, coordinator)
        # ray.init and, in the main thread, fit install handlers that end the run on the spot: ours come after, and fit
        # runs in a thread.
        shown = _also_metrics(progress, config.out)
        with following(folder, shown, note), signals.asked_to_stop(_Stopper(folder, coordinator)):
            try:
                result = _in_thread(trainer.fit)
            except WorkerGroupError as error:
                raise _cause(error.worker_failures, config) from error
    outcome = getattr(result, "return_value", None)
    if outcome is None:
        raise TrainingFailed(f"The workers of {config.out} ended without an outcome: {result.error}.")
    return outcome


def _also_metrics(progress: Progress, run: str) -> Progress:
    """Show records as Ray metrics, too; nobody hears them where Ray runs without its dashboard."""
    from ray.util.metrics import Gauge

    gauges = Gauges(lambda name, about, tags: Gauge(name, description=about, tag_keys=tags), run=run)

    def show(record: Mapping[str, Any]) -> None:
        validation = record.get("split") == "val"  # its loss is another one
        gauges.set({name: value for name, value in record.items() if not (validation and name == "loss")})
        progress(record)

    return show


@contextmanager
def _coordinator(config: TrainConfig, workers: Workers, note: Note) -> Iterator[Any]:
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
        resume=f"brainenc train --resume {config.out}",
        goes_on=lambda there, leaving: _room_without(leaving, there, _per_worker(config)) >= workers.low,
    )  # fmt: skip
    try:
        yield handle
    finally:
        handle.close()


def _room_without(leaving: Collection[str], workers: Mapping[str, int], each: Mapping[str, float]) -> int:
    """Workers that the nodes which stay can hold: those of this run that are there, and what is free."""
    from ray._private.state import available_resources_per_node

    free: dict[str, dict[str, float]] = available_resources_per_node()  # type: ignore[no-untyped-call]
    return sum(
        workers.get(node, 0) + int(min(there.get(name, 0.0) // wanted for name, wanted in each.items()))
        for node, there in free.items()
        if node not in leaving
    )


def _per_worker(config: TrainConfig) -> dict[str, float]:
    """What a worker takes of a node."""
    return {"CPU": 1.0, **({"GPU": 1.0} if _wants_gpu(config) else {})}


def _trainer(config: TrainConfig, workers: Workers, views: OpenViews, coordinator: Any) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    each, folder = _per_worker(config), RunFolder(config.out)
    gpu = "GPU" in each
    number: Any = workers.low if workers.low == workers.high else (workers.low, workers.high)
    return TorchTrainer(
        _worker,
        train_loop_config={
            "config": config.to_dict(), "views": views, "driver_pid": os.getpid(), "coordinator": coordinator,
            "elsewhere": elsewhere(folder.path),
        },
        scaling_config=ScalingConfig(
            num_workers=number, use_gpu=gpu, resources_per_worker=each
        ),
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo", timeout_s=max(1800, int(config.status_timeout_s))),
        run_config=RunConfig(
            # A name of its own: Ray's record of an earlier attempt must not decide where this one begins.
            name=f"run{folder.next_run()}-{int(time.time())}",
            storage_path=str(folder.ray),
            failure_config=FailureConfig(max_failures=config.max_failures),
        ),
    )  # fmt: skip


def _in_thread(call: Callable[[], Any]) -> Any:
    """Call in a thread of its own; signals are handled here meanwhile."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="fit", daemon=True).start()
    return future.result()


def _wants_gpu(config: TrainConfig) -> bool:
    if config.device != "auto":
        return config.device.startswith("cuda")
    import ray

    there: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return there.get("GPU", 0) > 0


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
        f"`brainenc train --resume {config.out}` goes on from the newest checkpoint."
    )


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


def _worker(given: dict[str, Any]) -> Any:
    """The training function of one Ray Train worker; in its training thread."""
    import ray.train
    import ray.train.torch
    import torch

    from brainenc.train.team import Distributed
    from brainenc.train.worker import Relief, Surroundings, work

    config, context, relief = TrainConfig.from_dict(given["config"]), ray.train.get_context(), Relief()
    team = Distributed(timeout_s=config.status_timeout_s, local_rank=context.get_local_rank())
    gpu = torch.cuda.is_available() and config.device != "cpu"
    with (
        on_this_node(given["elsewhere"], sends=context.get_local_rank() == 0) as here,
        _rank_guard(config, given["coordinator"], team.rank, gpu=gpu, relief=relief) as guard,
    ):
        if here is not None:
            config = replace(config, out=str(here), split=str(RunFolder(here).split_file))
        folder = RunFolder(config.out)
        around = Surroundings(
            team=team, device=ray.train.torch.get_device() if gpu else torch.device("cpu"), open_views=given["views"],
            guard=Hearing(guard, [FolderOrders(folder)] if team.rank == 0 else []), relief=relief,
            threads=config.threads or max(1, _cores() // context.get_local_world_size()),
            drill=make_drills(config, guard, given["driver_pid"]),
        )  # fmt: skip
        return work(config, around)


@contextmanager
def _rank_guard(
    config: TrainConfig, coordinator: Any, rank: int, *, gpu: bool, relief: Callable[[], None]
) -> Iterator[StepGuard]:
    if coordinator is None:
        yield NullGuard()
        return
    from brainenc.guard.actors import worker_guard
    from brainenc.train import guarding

    with worker_guard(
        coordinator, rank, config=guarding.worker_config(config), with_gpu=gpu, relief=(relief,)
    ) as guard:
        yield guard


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
