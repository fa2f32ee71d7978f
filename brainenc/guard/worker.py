"""The guard of one worker of a run: its watcher, a thread that listens, and what the loop asks at every step.

Ray runs training loops in a thread that no signal handler reaches. So a thread of the guard waits for the watcher's
pipe and for the coordinator, and the loop finds what they have said in an attribute. Only when memory runs out before
the step would end does that thread interrupt the loop, never in the middle of an update.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from types import TracebackType
from typing import Any, Literal, Protocol

from brainenc.endurance import Endurance
from brainenc.guard.admission import Admission
from brainenc.guard.hearing import raise_in
from brainenc.guard.messages import STRENGTH, CheckpointAck, Level, Order, OutOfTime, WorkerReport
from brainenc.guard.policy import Escalation, Meter, PolicyConfig, Timing
from brainenc.guard.probe import Probe
from brainenc.guard.updating import UpdatingFlag
from brainenc.guard.watcher import DRILL_WAITS_S, Watcher, WatcherSettings, wait_readable

log = logging.getLogger(__name__)


class Link(Protocol):
    """The way to the coordinator. Neither call blocks, neither raises when the coordinator is gone."""

    def post(self, report: WorkerReport) -> None:
        """Send a report."""
        ...

    def answers(self) -> list[Order]:
        """Orders that came back since the last call."""
        ...


class NoLink:
    """No coordinator: a worker that protects itself alone."""

    def post(self, report: WorkerReport) -> None:
        """Heard by nobody."""

    def answers(self) -> list[Order]:
        """None."""
        return []


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerGuardConfig:
    """How a worker is guarded."""

    policy: PolicyConfig = field(default_factory=PolicyConfig)
    on_critical: Literal["stop", "shrink"] = "shrink"
    heartbeat_s: float = 0.25
    timing: Timing = field(default_factory=Timing)
    """Before anything was measured."""
    brake: bool = True
    """Let allocations fail while there is no time left to reach a step boundary (Linux)."""


class WorkerGuard:
    """A :class:`~brainenc.guard.messages.StepGuard`. Made and used in the loop's thread; a context manager.

    Args:
        worker: unique in the run, e.g. ``"rank1"``.
        config: how.
        link: to the coordinator.
        role: ``"train"`` or ``"extract"``.
        relief: called by the listening thread, at most once a dwell, when memory gets short: drop what can be made
            again. It must not touch what the loop is using.
        uuids: GPUs to look at until ``slack`` names others, by NVML's name; None means all of the machine.
        slack: bytes that the GPU allocator holds without using them, by UUID of the GPUs that this process works on;
            called at step boundaries.
    """

    def __init__(
        self, worker: str, config: WorkerGuardConfig | None = None, link: Link | None = None, *,
        role: Literal["train", "extract"] = "train", relief: Sequence[Callable[[], None]] = (),
        uuids: Sequence[str] | None = (), slack: Callable[[], dict[str, int]] = dict,
    ) -> None:  # fmt: skip
        self.config = config or WorkerGuardConfig()
        self._link: Link = link or NoLink()
        self._relief, self._uuids, self._slack = tuple(relief), uuids, slack
        self._me = WorkerReport(worker=worker, seq=0, role=role, node=socket.gethostname(), pid=os.getpid())
        self._probe = Probe()
        self._admission = Admission(self.config.policy)
        self._owner = threading.get_ident()
        # Written by the loop's thread, read by the listening one.
        self._timing = self.config.timing
        self._obeyed_s = 0.0
        """From an order to durable, the last time."""
        self._position = (-1, -1)
        self._ack: CheckpointAck | None = None
        self._beat_at = self._told_at = 0.0
        self._looked_at = float("-inf")
        # Written by the listening thread.
        self._level: Level = "ok"
        self._reason, self._numbers = "", dict[str, Any]()
        self._counter = self._seq = 0
        self._relieved_at = self._spared_at = float("-inf")
        self._endurance = Endurance("The memory guard of this worker")
        self._leaving = ""
        # Written by both, under the lock.
        self._lock = threading.Lock()
        self._order: Order | None = None
        self._doubted: dict[str, Any] | None = None
        """What the watcher says of a GPU, to be looked at again at the next boundary."""
        self._done: set[str] = set()
        self._last_saved = -1
        self._escalation = Escalation(self.config.on_critical, self.config.policy.dwell_s)
        self._ordered_at = 0.0
        self._computing = self._raised = False

        self._ending = threading.Event()
        self._wake_read, self._wake_write = -1, -1
        self._flag = UpdatingFlag(-1)
        self._watcher: Watcher | None = None
        self._thread: threading.Thread | None = None

    # ---- the loop's side: microseconds

    def pending(self) -> Order | None:
        """What to do at this boundary."""
        if self._doubted is not None:
            self._look_at_gpus()
        return self._order

    def beat(self, *, epoch: int, step: int) -> None:
        """A step is finished."""
        now = time.monotonic()
        if self._beat_at:
            smoothed = self._timing.step_s + 0.2 * (now - self._beat_at - self._timing.step_s)
            self._timing = Timing(self._timing.save_s, smoothed)
        self._beat_at, self._position = now, (epoch, step)
        if now - self._told_at >= 0.5 and self._watcher is not None:
            self._told_at = now
            self._watcher.tell(timing=self._timing._asdict(), **_gpus(self._slack()))

    def reserve(self, n_bytes: int, what: str) -> None:
        """Ask before a large allocation.

        Raises:
            MemoryRefused: the critical threshold would be reached.
        """
        ram = self._probe.ram()
        self._admission.ask(n_bytes, what, Meter("ram", ram.used, ram.limit), time.monotonic())

    def saved(self, *, path: str, step: int, epoch: int, error: str = "") -> None:
        """A checkpoint is durable, or could not be made. An order to stop stays."""
        with self._lock:
            order, now = self._order, time.monotonic()
            self._ack = CheckpointAck(
                order_id=order.id if order else "", worker=self._me.worker, epoch=epoch, step=step, path=path,
                error=error,
            )  # fmt: skip
            if self._ordered_at and path:
                self._obeyed_s = now - self._ordered_at
                self._timing = Timing(self._obeyed_s, self._timing.step_s)
            self._ordered_at = 0.0
            self._last_saved = max(self._last_saved, step)
            if order is not None and order.kind != "stop":
                self._done.add(order.id)
                self._order = None
                if order.kind == "shrink":
                    self._escalation.shrunk(now)
                    self._looked_at = now
        self._wake()

    def save_takes(self, seconds: float) -> None:
        """What an alarm in time must leave room for, unless more was measured; told to the watcher with a next step."""
        self._timing = Timing(max(seconds, self._obeyed_s), self._timing.step_s)

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Around forward and backward: only inside may the listening thread interrupt."""
        arrived = False
        try:
            with self._lock:
                self._computing, self._raised = True, False
            if self._order is not None and self._order.urgent:
                raise OutOfTime(self._order)
            yield
        except OutOfTime as error:
            arrived = error.order is None  # the listening thread's; else the one just above
            raise
        finally:
            with self._lock:
                self._computing = False
                raised, self._raised = self._raised, False
            if raised and not arrived:
                _await_interruption()

    @contextlib.contextmanager
    def updating(self) -> Iterator[None]:
        """Around ``optimizer.step()``, which lies outside :meth:`computing` and is therefore not interrupted; the
        watcher's brake waits for its end."""
        self._flag.up = True
        try:
            yield
        finally:
            self._flag.up = False

    def drill(self, meter: str, fraction: float = 0.95, seconds: float = 3600.0) -> None:
        """Pretend that ``"ram"`` or ``"gpu"`` reads ``fraction``. Waits until there is a watcher to see it."""
        until = time.monotonic() + DRILL_WAITS_S
        while self._watcher is not None and not self._watcher.spoken and time.monotonic() < until:
            time.sleep(0.01)
        if self._watcher is not None:
            name = "gpu0" if meter == "gpu" else meter
            self._watcher.tell(inject={"meter": name, "fraction": fraction, "seconds": seconds})

    @property
    def watcher_pid(self) -> int:
        """Of the watcher process; 0 while there is none."""
        return self._watcher.pid if self._watcher is not None else 0

    # ---- start and end

    def __enter__(self) -> WorkerGuard:
        self._owner = threading.get_ident()
        policy = {f.name: getattr(self.config.policy, f.name) for f in fields(self.config.policy)}
        self._flag = UpdatingFlag()
        self._watcher = Watcher(
            WatcherSettings(
                thresholds=policy.pop("thresholds"), policy=policy, timing=self._timing, uuids=self._uuids,
                brake=self.config.brake, flag=self._flag,
            )
        )  # fmt: skip
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)
        self._thread = threading.Thread(target=self._listen, name="guard", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        leaving = "stopped" if self._order is not None and self._order.kind == "stop" else "done"
        self.close(leaving if error is None else f"failed: {error}")

    def close(self, leaving: str = "done") -> None:
        """End the thread and the watcher, and tell the coordinator that this worker goes."""
        self._ending.set()
        self._wake()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=5)
        watcher, self._watcher = self._watcher, None
        if watcher is not None:
            watcher.close()
        self._leaving = leaving
        with self._endurance.doing("telling the coordinator"):
            self._send()
        for fd in (self._wake_read, self._wake_write):
            if fd >= 0:
                os.close(fd)
        self._wake_read = self._wake_write = -1
        self._probe.close()
        self._flag.close()

    # ---- the listening thread

    def _listen(self) -> None:
        sent_at = float("-inf")
        while not self._ending.is_set():
            watcher = self._watcher
            if watcher is None:
                return
            changed = False
            with self._endurance.doing("waiting"):
                changed = self._wait(watcher, max(0.0, sent_at + self.config.heartbeat_s - time.monotonic()))
            with self._endurance.doing("hearing the watcher"):
                for message in watcher.read():
                    changed = self._hear(message) or changed
            if not watcher.alive and not self._ending.is_set():
                with self._endurance.doing("starting the watcher again"):
                    watcher.restart()
            self._interrupt_if_urgent()
            with self._endurance.doing("hearing the coordinator"):
                for order in self._link.answers():
                    changed = self._obey(order) or changed
            self._interrupt_if_urgent()
            if changed or time.monotonic() - sent_at >= self.config.heartbeat_s:
                sent_at = time.monotonic()
                with self._endurance.doing("telling the coordinator"):
                    self._send()

    def _wait(self, watcher: Watcher, pause: float) -> bool:
        """Until the watcher says something, the loop wakes this thread (True), or so many seconds have passed."""
        try:
            ready = wait_readable([watcher.fileno(), self._wake_read], pause)
        except (OSError, ValueError):  # there is no watcher at the moment
            self._ending.wait(min(0.1, pause))
            raise
        if self._wake_read in ready:
            os.read(self._wake_read, 4096)
        return self._wake_read in ready

    def _hear(self, message: dict[str, Any]) -> bool:
        """One message of the watcher; True when the coordinator should hear of it at once."""
        if message["kind"] == "reading":
            self._numbers = {**message["ram"], **_gpu_numbers(message["gpus"])}
        if message["kind"] != "decision":
            return False
        self._numbers = {k: v for k, v in message.items() if k not in ("kind", "reason", "level", "at")}
        before, self._reason, urgent = self._level, message["reason"], bool(message["urgent"])
        overtaken = message["at"] < self._looked_at  # seen before memory was freed
        short = message["level"] == "critical" and not message.get("held", False)
        if message["level"] != "ok" and not urgent:
            short = not self._relieved(message) and short
        with self._lock:
            if not short:
                self._escalation.calm()
            self._doubted = message if short and _can_wait(message) else None
            acts = short and not overtaken and self._doubted is None
            self._level = message["level"] if acts or message["level"] != "critical" else "warn"
            if acts:
                self._protect(urgent=urgent)
            elif message["level"] != "critical" and self._is_own(self._order):
                self._order = None  # it went down again before anything was done
        if urgent:
            self._interrupt_if_urgent()
            self._relieve()
        return self._level != before or urgent

    def _is_own(self, order: Order | None) -> bool:
        return order is not None and order.id.startswith(self._name)

    @property
    def _name(self) -> str:
        """How the orders begin that this worker gives itself."""
        return f"{self._me.worker}-{self._me.pid}-"

    def _protect(self, *, urgent: bool) -> None:
        """Decide for oneself at once; the coordinator hears of it and tells the others. Holds the lock."""
        kind = self._escalation.critical(time.monotonic())
        if kind is None:
            return
        if self._order is not None and STRENGTH[self._order.kind] >= STRENGTH[kind]:
            self._order = replace(self._order, urgent=self._order.urgent or urgent)
            return
        self._counter += 1
        name = f"{self._name}{self._counter}"
        step = self._position[1]
        self._take(Order(kind=kind, reason=self._reason, numbers=self._numbers, id=name, urgent=urgent, step=step))

    def _obey(self, order: Order) -> bool:
        """An order of the coordinator. One that was already carried out together with the other ranks is dropped."""
        with self._lock:
            current = self._order
            if order.id in self._done or (current is not None and current.id == order.id):
                return False
            if order.kind != "stop" and self._me.role == "train" and self._last_saved >= order.step >= 0:
                self._done.add(order.id)
                return False
            if current is None or STRENGTH[order.kind] > STRENGTH[current.kind]:
                self._take(order)
                return True
            if current.kind == order.kind:  # the same thing under the coordinator's name: answer to that one
                self._order = replace(order, urgent=current.urgent)
            return False

    def _take(self, order: Order) -> None:
        self._ordered_at = self._ordered_at or time.monotonic()
        self._order = order

    def _relieve(self) -> None:
        now = time.monotonic()
        if now - self._relieved_at < self.config.policy.dwell_s:
            return
        self._relieved_at = now
        for call in self._relief:
            with self._endurance.doing("freeing memory"):
                call()

    def _relieved(self, message: dict[str, Any]) -> bool:
        """Relief before alarm, then a second look: is memory no longer short? Memory that is critical once more within
        a dwell is not looked at again: then less has to be needed."""
        self._relieve()
        if message["predicted"] or message["drill"] or message["meter"] != "ram":
            return False
        if time.monotonic() - self._spared_at < self.config.policy.dwell_s:
            return False
        if self._probe.ram().fraction >= self.config.policy.thresholds.ram_warn:
            return False
        if message["level"] == "critical":
            self._spared_at = self._looked_at = time.monotonic()
        return True

    def _look_at_gpus(self) -> None:
        """At a boundary: what the watcher took for used may only be held by torch's allocator since the last one."""
        slack = self._slack()
        if slack:
            self._probe.watch_gpus(list(slack))
        short = any(gpu.fraction >= self.config.policy.thresholds.gpu_warn for gpu in self._probe.gpus(slack))
        if self._watcher is not None:
            self._watcher.tell(**_gpus(slack))
        with self._lock:
            doubted, self._doubted = self._doubted, None
            if doubted is None:
                return
            if short:
                self._level = "critical"
                self._protect(urgent=False)
            else:
                self._escalation.calm()
        self._wake()

    def _interrupt_if_urgent(self) -> None:
        """Raise in the loop when its step would end too late."""
        with self._lock:
            if self._computing and self._order is not None and self._order.urgent:
                self._computing, self._raised = False, True
                raise_in(self._owner, OutOfTime)

    def _send(self) -> None:
        self._seq += 1
        epoch, step = self._position
        report = replace(
            self._me, seq=self._seq, epoch=epoch, step=step, level=self._level, reason=self._reason,
            numbers=self._numbers, order=self._order, ack=self._ack, leaving=self._leaving,
        )  # fmt: skip
        self._link.post(report)

    def _wake(self) -> None:
        if self._wake_write >= 0:
            with contextlib.suppress(BlockingIOError):
                os.write(self._wake_write, b"\0")


def _can_wait(message: dict[str, Any]) -> bool:
    """About a GPU: when that is full an error is raised, so it is looked at again at the next boundary."""
    return message["meter"] != "ram" and not message["drill"]


def _gpus(slack: dict[str, int]) -> dict[str, Any]:
    """What the watcher must know of the GPUs in use."""
    return {"slack": slack, "uuids": list(slack)} if slack else {}


def _gpu_numbers(gpus: list[dict[str, Any]]) -> dict[str, Any]:
    return {"gpus": [{k: gpu[k] for k in ("used", "limit", "fraction")} for gpu in gpus]} if gpus else {}


def _await_interruption() -> None:
    """Let what was raised in this thread, but has not arrived yet, arrive here, where it does no harm.

    Taking it back instead would leave the interpreter's mark that something is pending. CPython 3.11 lowers that only
    when something arrives: until then every call takes a detour, and under a tracer (a debugger, coverage) none comes
    back.
    """
    with contextlib.suppress(OutOfTime):
        for _ in range(10_000):  # it comes with the first jump, unless somebody has caught it
            pass
