"""Starting a run: in this process, or on workers of Ray Train. The only file of training that knows Ray. Driver."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from brainenc.addresses import init_options, resolve
from brainenc.errors import BrainencError, TrainingFailed, UsageError
from brainenc.guard import signals
from brainenc.guard.messages import EXIT_STOPPED_SAFELY, NullGuard, StepGuard
from brainenc.metrics import Gauges
from brainenc.train import finished, orders, prepare
from brainenc.train.alone import make_drills, train_alone
from brainenc.train.config import TrainConfig, Workers
from brainenc.train.elastic import Nodes, possible_workers
from brainenc.train.elsewhere import elsewhere, on_this_node
from brainenc.train.encoders.base import RIDGE
from brainenc.train.fitting import Outcome
from brainenc.train.follow import Note, Progress, following
from brainenc.train.inputs import OpenViews, StoredViews
from brainenc.train.orders import FolderOrders, Hearing
from brainenc.train.ridge_run import run_ridge
from brainenc.train.run_folder import RunFolder

log = logging.getLogger(__name__)


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
        UsageError: no run there, a change that would make it another run, fewer epochs than it has trained, or an
            address that cannot be joined; nothing was written.
    """
    folder = RunFolder(Path(run_folder).absolute())
    config = folder.config().resumed_with({**(changes or {}), "out": str(folder.path)})
    resolve(config.address, command="train")
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
    workers = Workers.parse(config.workers) if config.workers else None
    folder = RunFolder(config.out)
    try:
        with folder.held():
            orders.clear(folder)
            if workers is not None and workers.high == 0:
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


def default_workers(device: str, gpus: int) -> Workers:
    """One for each GPU that there is, where GPUs are to be used; else 1.

    Args:
        device: what was asked for.
        gpus: of this machine, or of all nodes of the cluster that was joined.
    """
    number = max(1, gpus) if _wants_gpu(device, gpus) else 1
    return Workers(low=number, high=number)


def resume_command(config: TrainConfig) -> str:
    """What goes on with a run, where it was: the run itself does not know which Ray it is on."""
    return f"brainenc train --resume {config.out}" + (f" --address {config.address}" if config.address else "")


# ---------------------------------------------------------------------- on Ray's workers


class _Stopper:
    """Tells the ranks of a signal to the driver; `fit` returns when all of them have saved and stopped.

    Two ways, of which one is enough: the coordinator, and an order in the run folder.
    """

    def __init__(self, folder: RunFolder, coordinator: Any) -> None:
        self._folder, self._coordinator = folder, coordinator
        self.reason = ""
        """Why everybody was asked to stop; empty while nobody was."""

    def __call__(self, number: int) -> None:
        self.reason = reason = f"the driver received {signals.name(number)}"
        orders.give(self._folder, "stop", reason)
        if self._coordinator is not None:
            self._coordinator.trip("stop", reason)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Ray:
    """What the driver has to know of the Ray that it is connected to."""

    gpus: int
    """Of all nodes that are there now."""
    may_grow: bool
    """It is not this run's own: other machines may belong to it, and an autoscaler may bring more."""


@contextmanager
def _cluster(config: TrainConfig, workers: Workers | None) -> Iterator[_Ray]:
    """Ray, joined or started. One that was running in this process already is used and left alone."""
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    if workers is not None and workers.low < workers.high:
        # A lost node counts as there for a while: try with what is left soon.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "20")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Of Ray's processes, which call us in a thread: arenas of threads hold some megabytes each, and keep nothing large.
    os.environ.setdefault("MALLOC_ARENA_MAX", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        yield _Ray(gpus=_gpus_of_ray(), may_grow=True)
        return
    address = resolve(config.address, command="train")
    least = workers.high if workers is not None else _gpus_here()
    with signals.keeping():  # it installs one that ends the run on the spot
        ray.init(**init_options(address, num_cpus=max(os.cpu_count() or 1, least)))
    try:
        if address is None:
            yield _Ray(gpus=min(_gpus_of_ray(), _gpus_here()), may_grow=False)
        else:  # what torch sees here says nothing about other machines
            yield _Ray(gpus=_gpus_of_ray(), may_grow=True)
    finally:
        # How the run ended is known and saved: Ray's own handler would turn a late SIGTERM into a failure.
        with signals.handling(lambda number, frame: None):
            ray.shutdown()


def _gpus_of_ray() -> int:
    import ray

    there: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return int(there.get("GPU", 0))


def _gpus_here() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _with_ray(config: TrainConfig, asked: Workers | None, views: OpenViews, progress: Progress, note: Note) -> Any:
    with _cluster(config, asked) as there:
        workers = asked or default_workers(config.device, there.gpus)
        each = _per_worker(config.device, there.gpus)
        if text := _about_gpus(config, workers, each, there):
            note(text)
        return _fitted(config, workers, each, views, progress, note)


def _about_gpus(config: TrainConfig, workers: Workers, each: Mapping[str, float], there: _Ray) -> str:
    """What a person should know before waiting, or computing on CPUs; empty where there is nothing to say.

    Raises:
        UsageError: GPUs are asked for that will never be there.
    """
    if "GPU" in each and there.gpus < workers.low:
        if there.may_grow:
            return f"Ray has {there.gpus} GPUs now and {workers.low} are needed: training begins when they have come."
        raise UsageError(
            f"--device {config.device} with --workers {workers} needs {workers.low} GPUs, and this machine has "
            f"{there.gpus} that torch can use; `brainenc doctor` says why. On a cluster, give its --address."
        )
    if config.device == "auto" and there.gpus == 0 and there.may_grow:
        return (
            "Ray has no GPU now, so workers compute on CPUs. Where nodes with GPUs come when they are asked for, ask "
            "for them: --device cuda --workers N."
        )
    return ""


def _fitted(
    config: TrainConfig, workers: Workers, each: Mapping[str, float], views: OpenViews, progress: Progress, note: Note
) -> Any:
    """Train on the Ray that was joined; each worker takes this much of a node."""
    folder = RunFolder(config.out)
    with _coordinator(config, workers, each, note) as coordinator:
        stopper = _Stopper(folder, coordinator)
        shown = _also_metrics(progress, config.out)
        # ray.init and, in the main thread, fit install handlers that end the run on the spot: ours come after, and fit
        # runs in a thread.
        with following(folder, shown, note), signals.asked_to_stop(stopper):
            try:
                result = _fit(config, lambda: _trainer(config, workers, each, views, coordinator), stopper, note)
            except Exception as error:
                # A signal to every process at once ends the workers, or Ray, before they could answer.
                if stopper.reason and (outcome := _left_behind(config, stopper.reason)) is not None:
                    note(f"The workers were gone before they could save ({_first_line(error)}).")
                    return outcome
                raise
    outcome = getattr(result, "return_value", None)
    if outcome is None:
        raise TrainingFailed(f"The workers of {config.out} ended without an outcome: {result.error}.")
    return outcome


def _fit(config: TrainConfig, make_trainer: Callable[[], Any], stopper: _Stopper, note: Note) -> Any:
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
            return _in_thread(make_trainer().fit)
        except WorkerGroupError as error:
            raise _cause(error.worker_failures, config) from error
        except ControllerError as error:
            cause = _first_line(getattr(error, "controller_failure", None) or error)
            if tries <= 0 or stopper.reason:
                raise TrainingFailed(
                    f"Ray's controller of {config.out} failed: {cause}. What was saved stays: "
                    f"`{resume_command(config)}` goes on from the newest checkpoint."
                ) from error
            tries -= 1
            note(f"Ray's controller of this training failed ({cause}); another goes on from the newest checkpoint.")


def _left_behind(config: TrainConfig, reason: str) -> Outcome | None:
    """A safe stop of which the workers could not tell: at the newest state of theirs that verifies, if there is one."""
    from brainenc.train import checkpoint
    from brainenc.train.saver import snapshot_root, spare_root

    folder = RunFolder(config.out)
    roots = [folder.checkpoints, snapshot_root(folder, config.snapshot_dir), spare_root(folder)]
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
        resume=resume_command(config),
        goes_on=lambda there, leaving: _room_without(leaving, there, each) >= workers.low,
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


def _per_worker(device: str, gpus: int) -> dict[str, float]:
    """What a worker takes of a node."""
    return {"CPU": 1.0, **({"GPU": 1.0} if _wants_gpu(device, gpus) else {})}


def _wants_gpu(device: str, gpus: int) -> bool:
    return device.startswith("cuda") if device != "auto" else gpus > 0


def _trainer(
    config: TrainConfig, workers: Workers, each: Mapping[str, float], views: OpenViews, coordinator: Any
) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    folder, gpu = RunFolder(config.out), "GPU" in each
    elastic = workers.low < workers.high
    number: Any = (workers.low, workers.high) if elastic else workers.low
    trainer = _elastic_trainer() if elastic else TorchTrainer
    return trainer(
        _worker,
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


def _elastic_trainer() -> Any:
    """The class of Ray's trainer, but that it does not count on nodes that are being taken away.

    Ray's elastic scaling counts each node that is alive, while Ray places nothing on one that is drained: as long as
    such a node stays, a restart would ask again and again for more workers than find a place. There is no public way
    to tell it. Where another Ray has not what is needed for this, its own trainer is taken as it is.
    """
    from ray.train import torch as ray_torch

    plain: Any = ray_torch.TorchTrainer
    try:
        policy, _ = _staying_policy(), plain._initialize_and_run_controller
    except (ImportError, AttributeError) as error:
        _counts_all(error)
        return plain

    class Trainer(plain):  # type: ignore[misc]
        def _initialize_and_run_controller(self, **given: Any) -> Any:
            try:
                if not isinstance(given["scaling_policy"], policy.__base__):
                    raise TypeError(f"it scales by {type(given['scaling_policy']).__name__}")
                given["scaling_policy"] = policy(self.scaling_config)
            except (KeyError, TypeError, AttributeError) as error:
                _counts_all(error)
            return super()._initialize_and_run_controller(**given)

    return Trainer


def _counts_all(error: Exception) -> None:
    log.warning(
        "This version of Ray is built otherwise than the one that brainenc knows (%s: %s): a node that is drained and "
        "stays counts as room for workers. If training does not restart, remove the node.",
        type(error).__name__, error,
    )  # fmt: skip


_LOOK_EVERY_S = 1.0


def _staying_policy() -> Any:
    """The class of an elastic scaling policy for which nodes that are being taken away hold no workers to come.

    Made in a function, so that it travels to Ray's controller by value; Ray itself is imported late.

    Raises:
        ImportError, AttributeError: this version of Ray has no such policy.
    """
    import ray
    from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision

    from brainenc.guard.actors import draining_nodes

    for name in ("_count_possible_workers", "make_decision_for_running_worker_group"):
        getattr(ElasticScalingPolicy, name)

    class Staying(ElasticScalingPolicy):
        def __init__(self, scaling_config: Any) -> None:
            super().__init__(scaling_config)
            self._looked_at = float("-inf")
            self._leaving: frozenset[str] = frozenset()
            self._alive: Nodes = {}

        def _count_possible_workers(self, reserved: Nodes) -> int:
            self._look()
            return possible_workers(
                reserved, self._alive, self._leaving, count=super()._count_possible_workers,
                least=self.scaling_config.min_workers,
            )  # fmt: skip

        def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> Any:
            decision = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
            now = worker_group_state.num_workers
            # The time of a notice is worked in: a group that runs is not made smaller for it.
            return NoopDecision() if self._leaving and getattr(decision, "num_workers", now) < now else decision

        def _look(self) -> None:
            """Who is leaving; not more often than Ray asks for what is reserved, which it does in a loop."""
            now = time.monotonic()
            if now - self._looked_at < _LOOK_EVERY_S:
                return
            self._looked_at = now
            try:
                self._leaving = frozenset(draining_nodes())
                nodes = ray.nodes() if self._leaving else []  # type: ignore[no-untyped-call]
            except Exception:  # scaling must not end a run
                log.warning("Could not ask Ray which nodes are being taken away.", exc_info=True)
                return
            self._alive = {node["NodeID"]: node["Resources"] for node in nodes if node["Alive"]}

    return Staying


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
        f"`{resume_command(config)}` goes on from the newest checkpoint."
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
            drill=make_drills(config, guard, *given["driver"]),
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
