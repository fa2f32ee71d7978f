"""Extraction over Ray Data: the only file of this package that knows Ray.

The driver plans what is missing, Ray Data hands one shard at a time to a pool of actors, and only receipts come back:
pixels and features never enter Ray's object store. What counts as done is what the store says, never what Ray says,
so that any process may die at any moment and the same command goes on.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext
from ray.util.annotations import RayDeprecationWarning
from ray.util.metrics import Gauge
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from brainenc import allocator
from brainenc.addresses import init_options, resolve
from brainenc.errors import BrainencError, ExtractionFailed
from brainenc.extract.attempts import AttemptLedger, LedgerState
from brainenc.extract.config import ExtractConfig, ExtractJob, ExtractProgress
from brainenc.extract.figures import Figures
from brainenc.extract.guard_record import guard_folder
from brainenc.extract.machines import Machines, Node
from brainenc.extract.measure import Measured, measure, settle_micro_batch
from brainenc.extract.node_store import collect
from brainenc.extract.outcome import ShardOutcome
from brainenc.extract.plan import ShardTask, Wanted
from brainenc.extract.prepare import Survey, looked_again
from brainenc.extract.progress import Meter
from brainenc.extract.run import Run
from brainenc.extract.scratch import scratch_folder
from brainenc.extract.worker import Worker
from brainenc.guard import signals
from brainenc.guard.actors import CoordinatorAddress, RayLink, draining_nodes, start_coordinator
from brainenc.metrics import Gauges
from brainenc.redact import redact

_NODE_GONE = (
    ray.exceptions.NodeDiedError, ray.exceptions.TaskUnschedulableError, ray.exceptions.WorkerCrashedError,
    ray.exceptions.LocalRayletDiedError, ray.exceptions.ObjectLostError, ray.exceptions.RaySystemError,
)  # fmt: skip
TICK_S = 1.0
"""How often the driver looks at the ledger."""


@contextlib.contextmanager
def joined(address: str) -> Iterator[ClusterSite]:
    """That cluster, left at the end; the one that this process has joined already is used as it is. Driver only."""
    with contextlib.nullcontext() if ray.is_initialized() else _connected(init_options(address)):
        yield ClusterSite()


class ClusterSite:
    """The nodes of the cluster that this process has joined: a :class:`~brainenc.extract.site.Site`."""

    @property
    def machines(self) -> Machines:
        """The nodes that are there now."""
        return _machines()

    def settle_micro_batch(self, job: ExtractJob, image_shape: tuple[int, int], features: Sequence[str]) -> int:
        """On a node that could hold an actor: the driver's own machine may have no GPU, or another one."""
        return int(self._elsewhere(settle_micro_batch, job, job, image_shape, tuple(features)))

    def measure(self, job: ExtractJob, wanted: Sequence[Wanted], uris: Sequence[str], actors: int) -> Measured:
        """One actor on one node; as many of them are as many times as fast."""
        one: Measured = self._elsewhere(measure, job, job, tuple(wanted), tuple(uris))
        return replace(one, seconds_per_image=one.seconds_per_image / actors)

    def _elsewhere(self, work: Callable[..., Any], job: ExtractJob, *arguments: Any) -> Any:
        task: Any = ray.remote(max_retries=0)(work)
        resources = self.machines.resources(job.device, 1, job.threads)
        try:
            return ray.get(task.options(**resources).remote(*arguments))
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except ray.exceptions.RayError as error:
            raise ExtractionFailed(f"Measuring on the cluster failed: {error}") from error


def _machines() -> Machines:
    found: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    leaving = draining_nodes()
    there = [node["Resources"] for node in found if node["Alive"] and node["NodeID"] not in leaving]
    return Machines(tuple(Node(each.get("CPU", 0.0), each.get("GPU", 0.0)) for each in there), cluster=True)


def drive(run: Run, found: Survey, progress: Callable[[ExtractProgress], None] | None = None) -> None:
    """Have a cluster do what is left. Ray is started, and stopped again if it was started here. Driver only."""
    with _signals(run), _ray(run.config, found):
        if not run.stop_reason:
            _drive_all(run, found, progress)


def _drive_all(run: Run, found: Survey, progress: Callable[[ExtractProgress], None] | None) -> None:
    """Once; where shards lie on the nodes first, until all of them have been moved or there is a reason to stop."""
    if found.config.node_store is None:
        _drive(run, found, progress)
        return
    _collect(found)  # what a run that was killed has left
    found = looked_again(found, run.collections)
    run.tasks, run.wanted = found.tasks, found.wanted
    for _ in range(found.config.max_attempts):
        todo = found.tasks
        if not todo or run.stop_reason or run.ray_error:
            return
        _drive(run, found, progress)
        error = _collect(found)
        found = looked_again(found, run.collections)
        run.forget(found.tasks, todo)
        if error is not None and found.tasks:
            raise error
    run.ray_error = run.ray_error or f"nodes were lost {found.config.max_attempts} times with what was on their disks"


def _collect(found: Survey) -> BrainencError | None:
    """Have every node move its shards into the store; why one could not. A lost node takes what it had with it."""
    config = found.config
    task: Any = ray.remote(num_cpus=0, max_retries=0)(collect)
    here = [node["NodeID"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    answers = [
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
            config.node_store, config.store, config.stage
        )
        for node in here
    ]
    errors: list[BrainencError | None] = []
    for answer in answers:
        with contextlib.suppress(*_NODE_GONE):
            errors.append(ray.get(answer).error)
    return next((error for error in errors if error is not None), None)


def _drive(run: Run, found: Survey, progress: Callable[[ExtractProgress], None] | None) -> None:
    """Feed the tasks to the actors and take in what comes back."""
    ledger = start_ledger(run.config.max_attempts, found.actors)
    run.started_ray = True
    with _coordinator(run, found) as coordinator, _Ticker(run, ledger, progress, _no_gpu(found)):
        try:
            for outcome in _outcomes(found.tasks, found, ledger, coordinator):
                run.take(outcome)
                if run.stop_reason:
                    ray.get(ledger.stop.remote(run.stop_reason))
                    if ray.get(ledger.state.remote()).active == 0:
                        break  # nobody is at work any more, and nobody begins
        except ray.exceptions.RayError as error:
            run.ray_error = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"


def start_ledger(max_attempts: int, actors: int) -> Any:
    """The ledger, beside the driver: with any other node the run would be lost. Driver only.

    Never restarted, and older than the workers: Ray's memory monitor then kills it last.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(AttemptLedger)
    placed = actor.options(num_cpus=0, max_restarts=0, scheduling_strategy=here)
    return placed.remote(max_attempts=max_attempts, max_deaths=max_attempts + actors)


def _no_gpu(found: Survey) -> str:
    """What a cluster that could have GPUs is told, when it has none."""
    config = found.config
    if config.device != "auto" or found.device != "cpu" or resolve(config.address, command="extract") is None:
        return ""
    return (
        "no node of the cluster has a GPU now, so the work is done on CPUs; where nodes with GPUs come when they are "
        "asked for, ask for them: --device cuda --actors N"
    )


@contextlib.contextmanager
def _coordinator(run: Run, found: Survey) -> Iterator[CoordinatorAddress | None]:
    """Who hears the guards of all actors, and writes down what happened; no run waits for it or fails for it."""
    folder = guard_folder(run.config.store)
    if not run.config.guard or not _made(folder):
        yield None
        return
    handle = start_coordinator(
        folder, min(found.actors, len(run.tasks)), resume="the same command again", label=redact(run.config.store),
        goes_on=lambda workers, leaving: True,  # a node that leaves costs the shards in hand, which others do again
    )  # fmt: skip
    try:
        yield handle.address
    finally:
        run.incidents += [f"{folder}/incident-{i['number']}.txt" for i in handle.status().get("incidents", ())]
        handle.close()


def _made(folder: Path) -> bool:
    """Not where the home folder cannot be written: each actor still guards itself."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def _outcomes(
    tasks: Sequence[ShardTask], found: Survey, ledger: Any, coordinator: CoordinatorAddress | None
) -> Iterator[ShardOutcome]:
    with DataContext.current(_data_context()):
        # Without prefetching, a receipt is seen 0.1 s after its shard is sealed; with it, one shard late.
        for batch in _dataset(tasks, found, (ledger, coordinator)).iter_batches(
            batch_size=None, prefetch_batches=0, batch_format="numpy"
        ):
            yield from map(pickle.loads, batch["outcome"])


def _dataset(tasks: Sequence[ShardTask], found: Survey, beside: tuple[Any, ...]) -> ray.data.Dataset:
    """One small row a shard, through the actors."""
    rows = [{"task": pickle.dumps(task)} for task in tasks]
    actors = min(found.actors, len(rows))
    resources: dict[str, Any] = _machines().resources(found.device, actors, found.threads)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RayDeprecationWarning)  # of max_restarts, for which Ray has no other name yet
        return ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            _Actor,
            batch_size=1,
            batch_format="numpy",
            compute=ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=1),
            fn_constructor_args=(pickle.dumps(found.job), *beside),
            # Without end by default; bounded so that a worker that dies before it can ask the ledger ends the run, too.
            max_restarts=8 * found.config.max_attempts,
            **resources,
        )


class _Actor:
    """What Ray Data calls in each actor: unpacks a task, packs the outcome."""

    def __init__(self, job: bytes, ledger: Any, coordinator: CoordinatorAddress | None) -> None:
        link, work = RayLink(coordinator) if coordinator else None, pickle.loads(job)
        if work.device == "cpu":
            allocator.keep_freed_memory()  # this process is for nothing else
        self._worker = Worker(work, _RemoteLedger(ledger), name=_actor_name(), link=link)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        (packed,) = batch["task"]  # one row, one shard, one call
        outcome = np.empty(1, object)
        outcome[0] = pickle.dumps(self._worker(pickle.loads(packed)))
        return {"outcome": outcome}


class _RemoteLedger:
    """The ledger as a worker sees it: plain calls to the actor beside the driver."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def begin(self, task: str, worker: str) -> Any:
        return ray.get(self._actor.begin.remote(task, worker))

    def end(self, task: str, *, sealed: bool) -> None:
        ray.get(self._actor.end.remote(task, sealed=sealed))

    def report(self, reading: Any) -> str:
        return str(ray.get(self._actor.report.remote(reading)))

    def tell(self, reading: Any) -> None:
        """Like `report`, without waiting: before a pass that may be the worker's last."""
        self._actor.report.remote(reading)


def _actor_name() -> str:
    context = ray.get_runtime_context()
    return f"{context.get_node_id()[:8]}:{os.getpid()}"


@contextlib.contextmanager
def _ray(config: ExtractConfig, found: Survey) -> Iterator[None]:
    """The cluster asked for, else one of our own, gone afterwards; one that this process has is used as it is."""
    address = resolve(config.address, command="extract")
    if ray.is_initialized():
        yield
        return
    with contextlib.ExitStack() as stack:
        scratch = None if address else str(stack.enter_context(scratch_folder()))
        cpus = found.actors * found.threads + 1
        with _connected(init_options(address, num_cpus=cpus, temp_dir=scratch)):
            yield


@contextlib.contextmanager
def _connected(options: dict[str, Any]) -> Iterator[None]:
    """Ray, as ``ray.init`` takes these options; left at the end."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Of Ray's processes, which call us in a thread: arenas of threads hold some megabytes each, and keep nothing large.
    os.environ.setdefault("MALLOC_ARENA_MAX", "1")
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it narrates its plans; its log files still have them
    with signals.keeping():  # Ray's own ends the process on the spot, whatever was sealed and is not committed yet
        ray.init(**options)
    try:
        yield
    finally:
        _let_ray_data_end()
        ray.shutdown()


def _let_ray_data_end(seconds: float = 60.0) -> None:
    """Wait for Ray Data's threads in this process.

    It waits two seconds for them itself, too short on a busy machine; one that calls Ray after its shutdown ends the
    process on the spot, with whatever it was about to say.
    """
    deadline = time.monotonic() + seconds
    for thread in threading.enumerate():
        if thread.name.startswith(("StreamingExecutor-", "ray-data-")):
            thread.join(max(0.0, deadline - time.monotonic()))


@contextlib.contextmanager
def _signals(run: Run) -> Iterator[None]:
    """The first SIGTERM or Ctrl-C ends the run at the next micro-batch; a second Ctrl-C ends it on the spot."""

    def stop(number: int, _frame: Any) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            run.interrupted = True
        run.stop_reason = run.stop_reason or signals.name(number)

    with signals.handling(stop):
        yield


class _Ticker:
    """A thread beside the driver's loop, which sees nothing between two receipts: progress out, orders to stop in."""

    def __init__(
        self, run: Run, ledger: Any, progress: Callable[[ExtractProgress], None] | None, note: str = ""
    ) -> None:
        self._run, self._ledger, self._progress = run, ledger, progress
        self._meter = Meter(run.images_total, run.shards_total, note=note)
        self._gauges = Gauges(
            lambda name, about, tags: Gauge(name, description=about, tag_keys=tags), run=run.config.store
        )
        self._figures = Figures(guard_folder(run.config.store))
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._tick, name="progress", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        self._look()
        self._figures.close()

    def _tick(self) -> None:
        while not self._end.wait(TICK_S):
            self._look()

    def _look(self) -> None:
        try:
            if self._run.stop_reason:
                ray.get(self._ledger.stop.remote(self._run.stop_reason), timeout=10)
            state: LedgerState = ray.get(self._ledger.state.remote(), timeout=10)
        except ray.exceptions.RayError:  # gone with its node, or Ray is going down: the loop hears of it by itself
            return
        self._run.ledger = state
        shown = self._meter.read(state, self._run.shards_sealed)
        self._gauges.set(asdict(shown))
        self._figures.take(shown)
        if self._progress is not None:
            self._progress(shown)


def _data_context() -> DataContext:
    """Ray Data's settings for this run: silent, unordered, patient."""
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = None  # never split a task
    context.execution_options.preserve_order = False
    context.execution_no_progress_timeout_s = -1  # a shard may take hours on a CPU
    return context
