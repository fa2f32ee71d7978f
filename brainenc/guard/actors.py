"""The guard's edge to Ray: the coordinator as an actor beside the driver, and a worker's way to it. The only such file.

The actor takes no CPU, is never restarted by Ray and is made before the workers: Ray's memory monitor kills restartable
and young processes first, so that it goes last. When it dies all the same, a thread of the driver makes another under
the same name; workers find it by that name, and it learns from their reports.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.util.metrics import Gauge
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from brainenc.endurance import Endurance
from brainenc.guard import signals
from brainenc.guard.conflicts import Surroundings, conflicts
from brainenc.guard.coordinator import CoordinatorConfig
from brainenc.guard.departures import Departures
from brainenc.guard.messages import Order, OrderKind, WorkerReport
from brainenc.guard.office import Office
from brainenc.guard.policy import Thresholds
from brainenc.guard.probe import take_reading
from brainenc.guard.worker import WorkerGuard, WorkerGuardConfig
from brainenc.metrics import Gauges

log = logging.getLogger(__name__)
_ANSWER_S = 5.0
_LOOK_EVERY_S = 0.5

GoesOn = Callable[[Mapping[str, int], Collection[str]], bool]
"""(node -> workers of the run on it, nodes that leave) -> whether the run can go on on what stays."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CoordinatorAddress:
    """Where workers find the coordinator of their run. Small; goes through Ray's pickling."""

    name: str
    namespace: str


class CoordinatorHandle:
    """The driver's side: makes the actor, keeps it alive, passes on what is asked for. Pickles as its address.

    Args:
        run_folder: where ``guard.jsonl`` lies.
        config: of the coordinator.
        resume: the command that goes on from here.
        goes_on: asked when nodes are about to be taken away; by default nothing goes on without them.
        label: of the run in metrics; None: the folder.
    """

    def __init__(
        self, run_folder: str | Path, config: CoordinatorConfig | None = None, resume: str = "",
        goes_on: GoesOn = lambda workers, leaving: False, label: str | None = None,
    ) -> None:  # fmt: skip
        self._folder, self._config, self._resume = Path(run_folder).absolute(), config or CoordinatorConfig(), resume
        digest = hashlib.sha256(str(self._folder).encode()).hexdigest()[:12]
        context = ray.get_runtime_context()
        self.address = CoordinatorAddress(name=f"brainenc-guard-{digest}-{os.getpid()}", namespace=context.namespace)
        self._node = context.get_node_id()
        self._departures, self._goes_on = Departures(self._node), goes_on
        self._lock = threading.Lock()
        self.restarts = 0
        self._actor = self._make()
        self._gauges = Gauges(ray_gauge, run=label or str(run_folder))
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="guard-coordinator", daemon=True)
        self._thread.start()

    def trip(self, kind: OrderKind, reason: str, numbers: dict[str, Any] | None = None) -> None:
        """Order something: for signals, drain notices, time limits. Does not wait."""
        with contextlib.suppress(RayError):
            self._actor.trip.remote(kind, reason, numbers)

    def status(self) -> dict[str, Any]:
        """What is known of every worker, and all incidents; empty while there is no coordinator."""
        try:
            found: dict[str, Any] = ray.get(self._actor.status.remote(), timeout=_ANSWER_S)
        except (RayError, GetTimeoutError):
            return {}
        return found

    def close(self) -> None:
        """End the actor; what it has recorded is flushed."""
        self._ending.set()
        self._thread.join(timeout=_ANSWER_S)
        with contextlib.suppress(RayError, GetTimeoutError):
            ray.get(self._actor.close.remote(), timeout=_ANSWER_S)
            ray.kill(self._actor)

    def __reduce__(self) -> tuple[Callable[[str, str], CoordinatorAddress], tuple[str, str]]:
        return _address, (self.address.name, self.address.namespace)

    def _make(self) -> Any:
        actor = ray.remote(Office).options(
            name=self.address.name, namespace=self.address.namespace, num_cpus=0, max_restarts=0, max_task_retries=0,
            get_if_exists=True, scheduling_strategy=NodeAffinitySchedulingStrategy(self._node, soft=True),
        )  # fmt: skip
        return actor.remote(str(self._folder), self._config, self._resume, successor=self.restarts > 0)

    def _keep(self) -> None:
        """Thread: let the coordinator's time pass, and replace it when it is dead."""
        endurance = Endurance("The keeper of the guard's coordinator")
        while not self._ending.wait(_LOOK_EVERY_S):
            with endurance.doing("a look at it"):
                self._look()

    def _look(self) -> None:
        try:
            ray.get(self._actor.tick.remote(), timeout=_ANSWER_S)
            self._gauges.set(ray.get(self._actor.worst.remote(), timeout=_ANSWER_S))
            self._look_for_departures()
        except RayActorError:
            if self._ending.is_set():
                return
            self.restarts += 1
            log.warning("The guard's coordinator died; workers protect themselves, a new one takes over.")
            with contextlib.suppress(RayError, ValueError):
                self._actor = self._make()
        except (RayError, GetTimeoutError):
            return  # busy, or Ray is going down

    def _look_for_departures(self) -> None:
        """Nodes that Ray says are being drained: a preemption notice, an autoscaler, `ray drain-node`, a SIGTERM."""
        draining = draining_nodes()
        workers = ray.get(self._actor.places.remote(), timeout=_ANSWER_S) if draining else {}
        goes_on = bool(draining) and self._goes_on(workers, draining.keys())
        advice = self._departures.look(draining, workers, time.time(), goes_on=goes_on)
        if advice is not None:
            log.warning("%s: %s.", advice.reason[:1].upper() + advice.reason[1:], advice.kind)
            self.trip(advice.kind, advice.reason, {"nodes": list(advice.nodes)})


def draining_nodes() -> dict[str, float]:
    """Node -> when it goes, in seconds since 1970; 0 where nobody said."""
    from ray._private.state import state  # Ray Train asks the same way; there is no public one

    found: dict[str, int] = state.get_draining_nodes()
    return {node: milliseconds / 1000 for node, milliseconds in found.items()}


def ray_gauge(name: str, description: str, tag_keys: tuple[str, ...]) -> Gauge:
    """A gauge on Ray's metrics port."""
    return Gauge(name, description=description, tag_keys=tag_keys)


def _address(name: str, namespace: str) -> CoordinatorAddress:
    return CoordinatorAddress(name=name, namespace=namespace)


class RayLink:
    """A worker's way to the coordinator: posts without waiting, finds a new coordinator when the old one is dead.

    Used by the worker's listening thread alone.

    Args:
        address: where the coordinator is.
    """

    def __init__(self, address: CoordinatorAddress) -> None:
        self._address = address
        self._place = ray.get_runtime_context().get_node_id()
        self._actor: Any = None
        self._waiting: list[Any] = []
        self._searching: threading.Thread | None = None
        self._search()

    def post(self, report: WorkerReport) -> None:
        """Send, unless four reports are still unanswered: the next one says the same and more."""
        if self._actor is None:
            self._search()
        elif len(self._waiting) < 4 or report.leaving:
            self._waiting.append(self._actor.report.remote(replace(report, place=self._place)))
            if report.leaving:  # the last words: worth a moment
                ray.wait(self._waiting[-1:], timeout=1.0)

    def answers(self) -> list[Order]:
        """Orders that have come back."""
        if not self._waiting:
            return []
        ready, self._waiting = ray.wait(self._waiting, num_returns=len(self._waiting), timeout=0)
        found = []
        for answer in ready:
            try:
                order = ray.get(answer)
            except RayActorError:
                self._actor, self._waiting = None, []
                self._search()
                break
            except RayError:
                continue
            if order is not None:
                found.append(order)
        return found

    def _search(self) -> None:
        """In a thread of its own: asking for a name may block when Ray is in trouble, and memory must be watched."""
        if self._searching is not None and self._searching.is_alive():
            return
        self._searching = threading.Thread(target=self._find, name="guard-search", daemon=True)
        self._searching.start()

    def _find(self) -> None:
        with contextlib.suppress(RayError, ValueError):  # not there yet
            self._actor = ray.get_actor(self._address.name, namespace=self._address.namespace)
            return
        time.sleep(0.2)


def start_coordinator(
    run_folder: str | Path, n_workers: int = 0, *, on_critical: Literal["stop", "shrink"] = "shrink",
    dwell_s: float = 5.0, deadline_s: float = 60.0, resume: str = "",
    goes_on: GoesOn = lambda workers, leaving: False, label: str | None = None,
) -> CoordinatorHandle:  # fmt: skip
    """Make the coordinator of a run. In the driver, after ``ray.init`` and before any worker is made.

    Args:
        run_folder: where ``guard.jsonl`` and the accounts of incidents go.
        n_workers: how many will report; recorded.
        on_critical: what is ordered first.
        dwell_s: still critical so long after a shrink means stop.
        deadline_s: an incident is over by then.
        resume: the command that goes on from here.
        goes_on: see :class:`CoordinatorHandle`.
        label: see there.
    """
    config = CoordinatorConfig(on_critical=on_critical, dwell_s=dwell_s, deadline_s=deadline_s)
    handle = CoordinatorHandle(run_folder, config, resume, goes_on, label)
    log.info("The guard's coordinator %s waits for %d workers.", handle.address.name, n_workers)
    return handle


def worker_guard(
    coordinator: CoordinatorHandle | CoordinatorAddress, rank: int | str, *,
    config: WorkerGuardConfig | None = None, role: Literal["train", "extract"] = "train",
    relief: Sequence[Callable[[], None]] = (), with_gpu: bool = False,
) -> WorkerGuard:  # fmt: skip
    """The guard of one worker: enter it in the loop's thread.

    Args:
        coordinator: of the run; arrives in workers as its address.
        rank: of a training worker; or any name that is unique in the run.
        config: thresholds and the rest.
        role: ``"train"`` ranks act together, ``"extract"`` actors each for itself.
        relief: see :class:`~brainenc.guard.worker.WorkerGuard`.
        with_gpu: watch the GPUs that torch has in this process.
    """
    address = coordinator.address if isinstance(coordinator, CoordinatorHandle) else coordinator
    name = f"rank{rank}" if isinstance(rank, int) else rank
    if not with_gpu:
        return WorkerGuard(name, config, RayLink(address), role=role, relief=relief)
    from brainenc.guard import pytorch

    return WorkerGuard(
        name, config, RayLink(address), role=role, relief=relief, uuids=pytorch.gpu_uuids(), slack=pytorch.gpu_slack
    )


@contextlib.contextmanager
def trip_on_signals(coordinator: CoordinatorHandle) -> Iterator[None]:
    """In the driver's main thread, after ``ray.init``: SIGTERM and SIGINT become an order to checkpoint and stop.

    A second SIGINT ends at once.
    """
    with signals.asked_to_stop(lambda number: coordinator.trip("stop", f"the driver received {signals.name(number)}")):
        yield


def ray_conflicts(thresholds: Thresholds, state_bytes: int = 0) -> list[str]:
    """What would keep the guard from acting before Ray: a sentence each. After ``ray.init``."""
    reading = take_reading()
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    nodes = max(1, len(ray.nodes()))  # type: ignore[no-untyped-call]
    around = Surroundings(
        limit=reading.ram.limit, ray_threshold=ray_threshold(), state_bytes=state_bytes,
        object_store=int(resources.get("object_store_memory", 0) / nodes),
        shm=reading.shm.total if reading.shm else 0,
    )  # fmt: skip
    return conflicts(thresholds, around)


def ray_threshold() -> float | None:
    """The fraction of a node's memory at which Ray kills; None where its monitor is off."""
    if os.environ.get("RAY_memory_monitor_refresh_ms") == "0":  # noqa: SIM112 - spelt so by Ray
        return None
    return float(os.environ.get("RAY_memory_usage_threshold", "0.95"))  # noqa: SIM112
