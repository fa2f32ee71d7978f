"""A worker: takes shards one after another, asks the ledger first, and says how much memory it has.

A plain class; ``pipeline.py`` puts it into Ray's actors. The backbone is loaded when the first shard is taken, so that
a worker that dies of loading it is counted like any other.
"""

from __future__ import annotations

import contextlib
import os
import threading
import traceback
from dataclasses import replace
from typing import Protocol

from brainenc.errors import BrainencError, ExtractionFailed
from brainenc.extract.attempts import Permit, Reading
from brainenc.extract.config import ExtractJob
from brainenc.extract.devices import device_fraction
from brainenc.extract.extractor import Extractor
from brainenc.extract.outcome import ShardOutcome
from brainenc.extract.plan import ShardTask
from brainenc.guard.messages import NullGuard, StepGuard
from brainenc.guard.probe import Probe, anonymous_bytes
from brainenc.guard.worker import Link, WorkerGuard, WorkerGuardConfig
from brainenc.redact import redact

SAMPLE_S = 0.1
REPORT_S = 1.0
HEARTBEAT_S = 1.0
"""To the guard's coordinator, while all is calm. Each report costs the machine about half a percent of a core when sent
twice a second, and extraction wants both cores of a small one; what changes is told at once all the same."""


class Ledger(Protocol):
    """What a worker asks of :class:`~brainenc.extract.attempts.AttemptLedger`, wherever that lives."""

    def begin(self, task: str, worker: str) -> Permit:
        """May I take it?"""
        ...

    def end(self, task: str, *, sealed: bool) -> None:
        """I came back from it alive."""
        ...

    def report(self, reading: Reading) -> str:
        """What I know of myself; the answer is why to stop, or empty."""
        ...

    def tell(self, reading: Reading) -> None:
        """The same without waiting for the answer."""
        ...


class Worker:
    """Runs in a process of its own; one thread calls it, another one samples memory and talks to the ledger.

    Args:
        job: what is the same for all shards.
        ledger: asked before every shard.
        name: unique among workers, also among restarts of the same actor.
        link: to the guard's coordinator, which hears of memory that gets short; None: there is none.
    """

    def __init__(self, job: ExtractJob, ledger: Ledger, *, name: str, link: Link | None = None) -> None:
        self._job, self._ledger, self._link = job, ledger, link
        self.guard: StepGuard = NullGuard()
        self._at_work, self._answered = False, ""
        self._open = contextlib.ExitStack()
        self._extractor: Extractor | None = None
        self._stop = threading.Event()
        self._closing = threading.Event()
        self._probe = Probe()
        self._reading = Reading(worker=name)
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def __call__(self, task: ShardTask) -> ShardOutcome:
        """Do one shard, if the ledger agrees."""
        self._start_sampling()
        permit = self._ledger.begin(task.name, self._reading.worker)
        if permit != "go":
            return ShardOutcome(task=task.name, status="stopped" if permit == "stop" else "quarantined")
        self._at_work = True
        try:
            outcome = self._extract(task)
        finally:
            self._at_work = False
        if self._extractor is not None:
            with self._lock:
                self._reading = replace(self._reading, rows=self._extractor.rows_done)
        self._ledger.tell(self._sample())
        self._ledger.end(task.name, sealed=outcome.status == "sealed")
        return outcome

    @property
    def stopping(self) -> bool:
        """It was told to stop: what is at work ends at the next micro-batch."""
        return self._stop.is_set()

    def close(self) -> None:
        """End the threads."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join()
        self._open.close()

    def _extract(self, task: ShardTask) -> ShardOutcome:
        try:
            if self._extractor is None:
                self.guard = self._guarded()
                self._extractor = Extractor(
                    self._job, guard=self.guard, should_stop=self._stop.is_set, on_batch=self._before_batch
                )
                self._open.callback(self._extractor.close)
                with self._lock:
                    self._reading = replace(self._reading, loaded_bytes=anonymous_bytes(os.getpid()))
        except Exception as error:  # a backbone that does not load fails every shard; the driver decides
            text = "".join(traceback.format_exception(error))
            portable = (
                error if isinstance(error, BrainencError) else ExtractionFailed(f"No worker could start.\n{text}")
            )
            return ShardOutcome(task=task.name, status="failed", error=portable)
        return self._extractor.extract(task)

    def _guarded(self) -> StepGuard:
        """Host memory that gets short halves this worker's micro-batch, and if need be stops the run."""
        if not self._job.guard:
            return NullGuard()
        config = WorkerGuardConfig(on_critical="shrink", heartbeat_s=HEARTBEAT_S)
        guard = WorkerGuard(self._reading.worker, config, self._link, role="extract", uuids=())
        return self._open.enter_context(guard)

    def _answer_while_idle(self) -> None:
        """A worker between two shards has stopped already: it holds nothing unsealed. To shrink waits for the next."""
        order = self.guard.pending()
        if order is not None and order.kind == "stop" and order.id != self._answered and not self._at_work:
            self._answered = order.id
            self.guard.saved(path=redact(self._job.store), step=self._reading.rows, epoch=0)

    def _before_batch(self, rows: int, micro_batch: int) -> None:
        """Told before each pass: if it is this worker's last, the ledger knows how large it was."""
        with self._lock:
            changed = micro_batch != self._reading.micro_batch
            self._reading = replace(self._reading, rows=rows, micro_batch=micro_batch)
        if changed:
            self._ledger.tell(self._sample())

    def _sample(self) -> Reading:
        used, machine = anonymous_bytes(os.getpid()), self._probe.ram()
        with self._lock:
            self._reading = replace(
                self._reading, used_bytes=used, peak_bytes=max(used, self._reading.peak_bytes),
                machine_used_bytes=machine.used, limit_bytes=machine.limit,
                gpu_fraction=device_fraction(self._job.device) if self._extractor else None,
            )  # fmt: skip
            return self._reading

    def _start_sampling(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="reporter", daemon=True)
            self._thread.start()

    def _watch(self) -> None:
        """Sample often, report seldom; learn from the answer when to stop."""
        ticks = max(1, round(REPORT_S / SAMPLE_S))
        tick = 0
        while not self._closing.wait(SAMPLE_S):
            reading = self._sample()
            self._answer_while_idle()
            tick += 1
            if tick % ticks == 0 and self._asked_to_stop(reading):
                self._stop.set()

    def _asked_to_stop(self, reading: Reading) -> bool:
        try:
            return bool(self._ledger.report(reading))
        except Exception:  # the ledger is gone, and the driver with it or soon: nobody would count what we do
            return not self._closing.is_set()
