"""The coordinator of one run: hears every worker, orders the emergency checkpoint, collects answers, keeps the account.

A plain class: time is passed in, nothing is read or sent. It runs in an actor beside the driver (``actors.py``), or in
the training process itself when there is one worker. Reports are states, not events: any of them may be lost, late or
heard twice, and a new coordinator that knows nothing learns what is going on from the next ones.

A tick looks at every worker. A report looks at its own only, and asks for a tick when one would change something: a
thousand workers that report once a second would else be a million looks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from brainenc.guard.incident import Incident
from brainenc.guard.messages import STRENGTH, CheckpointAck, Order, OrderKind, WorkerReport
from brainenc.guard.policy import RANK

Record = Callable[[dict[str, Any]], None]
_GONE_S = 30.0
"""A worker that was silent for so long is on no node any more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CoordinatorConfig:
    """How a run is coordinated. Seconds."""

    on_critical: Literal["stop", "shrink"] = "shrink"
    silent_after_s: float = 3.0
    """A worker that was not heard for so long is not waited for."""
    deadline_s: float = 60.0
    """An incident is over by then, whatever is missing."""
    dwell_s: float = 5.0
    """Still critical so long after a shrink means stop."""
    reading_every_s: float = 5.0
    """Of each worker, one reading in so many seconds is kept in the record."""


@dataclass(slots=True)
class _Known:
    report: WorkerReport
    heard_at: float
    recorded_at: float = float("-inf")
    silent: bool = False
    """It was noticed that nothing comes any more."""


class Coordinator:
    """The state machine: watching, collecting (an order is out), stopped.

    Args:
        config: how.
        record: takes each line for ``guard.jsonl``.
        first_incident: number of the first incident; a restarted coordinator goes on counting.
    """

    def __init__(
        self, config: CoordinatorConfig | None = None, record: Record = lambda line: None, first_incident: int = 1
    ) -> None:
        self.config = config or CoordinatorConfig()
        self._record, self._number = record, first_incident
        self._workers: dict[str, _Known] = {}
        self._due: dict[str, float] = {}
        """When those were heard whose silence would be news, the longest ago first."""
        self._awaited: set[str] | None = None
        """Who has still to answer in the open incident; None: to be looked up by the next tick."""
        self._scopes: set[str] = set()
        """Of the causes of the last incident."""
        self.incidents: list[Incident] = []
        self._done: set[str] = set()
        self._shrunk_at: dict[str, float] = {}
        self._final: Order | None = None
        self._later: Order | None = None
        """Asked for while a stronger or equal order was out, or until one came: for the end of that incident, if it has
        saved nothing so new."""

    # ---- what comes in

    def report(self, report: WorkerReport, now: float) -> Order | None:
        """Hear a worker; returns what it should be doing, None when nothing."""
        known = self._workers.get(report.worker)
        if known is not None and _same_life(known.report, report) and report.seq <= known.report.seq:
            return self._answer(known.report)  # overtaken by a later one
        self._hear(report, known, now)
        if report.order is not None and report.order.id not in self._done:
            self._adopt(report.order, report, now)
        elif report.level == "critical" and not report.leaving:
            self._critical(report, now)
        if report.ack is not None:
            self._acknowledge(report.ack, report.role, now)
        self._forget_shrink(report, now)
        if self._would_change(report.worker, now):
            self.tick(now)
        return self._answer(report)

    def trip(self, kind: OrderKind, reason: str, now: float, numbers: dict[str, Any] | None = None) -> Order:
        """Somebody else asks: a signal to the driver, a drain notice, a person, a time limit.

        Returns:
            The order that is out now: this one, or one that is no weaker; then this one is carried out after it, unless
            what that saves is new enough.
        """
        if self._final is not None and kind != "stop":
            return self._final  # all are to save and to stop: a worker that comes now must not be told less
        step = max((k.report.step for k in self._workers.values() if k.report.role == "train"), default=-1)
        order = Order(kind=kind, reason=reason, numbers=numbers or {}, id=f"c{self._number}-{kind}", step=step)
        out = self._raise(order, now).order
        if out.id != order.id:
            self._postpone(order)
        return out

    def tick(self, now: float) -> None:
        """Let time pass: notice the silent, close what is complete or overdue."""
        for name, known in self._workers.items():
            if not known.silent and not known.report.leaving and self._is_silent(known, now):
                known.silent = True
                self._due.pop(name, None)
                self._record({"kind": "silent", "at": now, "worker": name, "heard_at": known.heard_at})
        while (incident := self.open_incident) is not None:
            self._awaited = {name for name in self._workers if self._awaits(name, incident, now)}
            if self._awaited and now < incident.deadline_at:
                return
            self._close(incident, now, late=now >= incident.deadline_at)
            self._do_later(incident, now)

    def finish(self, now: float) -> None:
        """The run is over: whatever has not been answered will not be."""
        self.tick(now)
        if self.open_incident is not None:
            self._close(self.open_incident, now, late=False)

    # ---- what is known

    @property
    def open_incident(self) -> Incident | None:
        """The one that is going on."""
        last = self.incidents[-1] if self.incidents else None
        return last if last is not None and last.outcome == "open" else None

    @property
    def state(self) -> Literal["watching", "collecting", "stopped"]:
        """What the coordinator is doing."""
        if self.open_incident is not None:
            return "collecting"
        return "stopped" if self._final is not None else "watching"

    def worst(self) -> dict[str, float]:
        """``guard_level`` (0 ok, 1 warn, 2 critical) and ``memory_fraction`` of the worker that is worst off."""
        there = [known.report for known in self._workers.values() if not known.report.leaving]
        fractions = [r.numbers["used"] / r.numbers["limit"] for r in there if r.numbers.get("limit")]
        level = max((RANK[r.level] for r in there), default=0)
        return {"guard_level": float(level)} | ({"memory_fraction": max(fractions)} if fractions else {})

    def places(self, now: float) -> dict[str, int]:
        """The cluster's name of each node -> workers that were heard from there lately."""
        there = [
            known.report.place
            for known in self._workers.values()
            if not known.report.leaving and now - known.heard_at < _GONE_S
        ]
        return {place: there.count(place) for place in there if place}

    def status(self, now: float) -> dict[str, Any]:
        """Everything for ``brainenc guard status`` and ``watch``."""
        return {
            "state": self.state,
            "workers": {
                name: {
                    "role": k.report.role, "node": k.report.node, "pid": k.report.pid, "epoch": k.report.epoch,
                    "step": k.report.step, "level": k.report.level, "silent_s": round(now - k.heard_at, 3),
                    "leaving": k.report.leaving, "numbers": dict(k.report.numbers),
                }
                for name, k in sorted(self._workers.items())
            },
            "incidents": [incident.to_dict() for incident in self.incidents],
        }  # fmt: skip

    # ---- inside

    def _hear(self, report: WorkerReport, known: _Known | None, now: float) -> None:
        recorded = known.recorded_at if known else float("-inf")
        changed = known is None or known.report.level != report.level or known.report.leaving != report.leaving
        changed = changed or (known is not None and known.silent)
        if changed or now - recorded >= self.config.reading_every_s:
            recorded = now
            kind = "warning" if changed and report.level != "ok" else "reading"
            self._record({
                "kind": kind, "at": now, "worker": report.worker, "role": report.role, "node": report.node,
                "pid": report.pid, "epoch": report.epoch, "step": report.step, "level": report.level,
                "reason": report.reason, "leaving": report.leaving, "numbers": dict(report.numbers),
            })  # fmt: skip
        self._workers[report.worker] = _Known(report, now, recorded)
        self._due.pop(report.worker, None)  # to its end
        if not report.leaving:
            self._due[report.worker] = now

    def _would_change(self, worker: str, now: float) -> bool:
        """Whether a tick would do anything, now that this worker was heard."""
        longest = next(iter(self._due.values()), now)
        if now - longest >= self.config.silent_after_s:
            return True
        incident = self.open_incident
        if incident is None or self._awaited is None:
            return incident is not None
        if self._awaits(worker, incident, now):
            self._awaited.add(worker)
        else:
            self._awaited.discard(worker)
        return not self._awaited or now >= incident.deadline_at

    def _awaits(self, name: str, incident: Incident, now: float) -> bool:
        """Whether this worker has still to answer; one that is gone is put on the incident's list of the dead."""
        known = self._workers[name]
        if name in incident.acks or not self._concerns(incident, known.report) or self._replaced(known, incident):
            return False
        if known.report.leaving or self._is_silent(known, now):
            if name not in incident.dead:
                incident.dead.append(name)
            return False
        if name in incident.dead:
            incident.dead.remove(name)  # it was only slow
        return True

    def _critical(self, report: WorkerReport, now: float) -> None:
        incident = self.open_incident
        if incident is not None:
            self._blame(incident, report, now)
            return
        if self._final is not None:
            return
        kind = self._escalated(report, now)
        if kind is not None:
            order = Order(
                kind=kind, reason=report.reason, numbers=report.numbers, id=f"c{self._number}-{kind}", step=report.step
            )
            self._blame(self._raise(order, now), report, now)

    def _blame(self, incident: Incident, report: WorkerReport, now: float) -> None:
        """One more cause. The first makes it the incident of fewer workers, a training rank that of all ranks; one more
        extraction actor concerns itself, and its own report is looked at anyway."""
        incident.add_cause(report, now)
        if _scope(report) not in self._scopes:
            if not self._scopes or report.role == "train":
                self._awaited = None
            self._scopes.add(_scope(report))

    def _escalated(self, report: WorkerReport, now: float) -> OrderKind | None:
        """Shrink first; still critical one dwell later means stop; in between, wait."""
        shrunk = self._shrunk_at.get(_scope(report))
        if self.config.on_critical == "stop":
            return "stop"
        if shrunk is None:
            return "shrink"
        return "stop" if now - shrunk >= self.config.dwell_s else None

    def _forget_shrink(self, report: WorkerReport, now: float) -> None:
        """The shrink has helped: if memory gets short again one day, shrinking is tried again."""
        scope = _scope(report)
        shrunk = self._shrunk_at.get(scope)
        if shrunk is None or now - shrunk < self.config.dwell_s or report.level == "critical":
            return
        if all(k.report.level != "critical" for k in self._workers.values() if _scope(k.report) == scope):
            del self._shrunk_at[scope]

    def _adopt(self, order: Order, report: WorkerReport, now: float) -> None:
        """A worker obeys an order of its own, or one of a coordinator that died: it becomes everybody's."""
        if self._final is not None:  # all are stopping already, this one too as soon as it hears its answer
            self._done.add(order.id)
            return
        incident = self._raise(order, now)
        if order.id.startswith(f"{report.worker}-") or report.level == "critical" or report.role == "extract":
            self._blame(incident, report, now)  # others carry out what somebody else has asked for: they are no cause

    def _raise(self, order: Order, now: float) -> Incident:
        """Open an incident with this order, or make the open one stronger."""
        order = replace(order, urgent=False)  # only the one in trouble is short of time
        incident = self.open_incident
        if incident is not None:
            if STRENGTH[order.kind] > STRENGTH[incident.order.kind]:
                self._done.add(incident.order.id)
                self._postpone(incident.order)
                incident.order = order
                incident.merged.clear()
                incident.acks.clear()  # what was saved for the weaker order is older than what the stop will save
                self._awaited = None
                self._record(_order_line(incident, now))
            elif order.id != incident.order.id:
                self._done.add(order.id)  # not to be adopted again when this incident is over
                if order.kind == incident.order.kind:
                    incident.merged.add(order.id)
            return incident
        incident = Incident(number=self._number, order=order, opened_at=now, deadline_at=now + self.config.deadline_s)
        self._number += 1
        self.incidents.append(incident)
        self._awaited = None
        self._scopes.clear()
        if order.kind == "stop":
            self._final = order
        self._record(_order_line(incident, now))
        return incident

    def _acknowledge(self, ack: CheckpointAck, role: str, now: float) -> None:
        if not self.incidents or any(incident.acks.get(ack.worker) == ack for incident in self.incidents):
            return  # answers are repeated until the run ends
        incident = self.incidents[-1]
        mine = ack.order_id == incident.order.id or ack.order_id in incident.merged
        together = ack.step >= incident.order.step and ack.order_id not in self._done  # on another rank's word
        if not mine and not together:
            return  # the answer to an earlier order
        if not ack.ok and ack.worker in incident.acks and incident.acks[ack.worker].ok:
            return  # one checkpoint is durable; that another attempt failed takes nothing away
        incident.acks[ack.worker], incident.roles[ack.worker] = ack, role
        if ack.worker in incident.dead:
            incident.dead.remove(ack.worker)
        self._record({
            "kind": "ack", "at": now, "incident": incident.number, "worker": ack.worker, "order": ack.order_id,
            "epoch": ack.epoch, "step": ack.step, "path": ack.path, "error": ack.error,
        })  # fmt: skip
        if incident.outcome in ("failed", "timed out") and ack.ok:  # late, and still good news
            incident.close("saved", now)
            self._record({"kind": "incident", "at": now, "late": True, **incident.to_dict()})

    def _close(self, incident: Incident, now: float, *, late: bool) -> None:
        outcome: Literal["saved", "failed", "timed out"] = "timed out" if late else "failed"
        incident.close("saved" if incident.best else outcome, now)
        self._done.add(incident.order.id)
        if incident.order.kind == "stop":
            self._final = incident.order
        elif incident.order.kind == "shrink":
            for known in self._workers.values():
                if self._concerns(incident, known.report):
                    self._shrunk_at[_scope(known.report)] = now
        self._record({"kind": "incident", "at": now, **incident.to_dict()})

    def _postpone(self, order: Order) -> None:
        """Another order is out. Of two that wait, the stronger or newer is kept, with the newer step."""
        both = [order] if self._later is None else [self._later, order]
        kept = max(both, key=lambda one: (STRENGTH[one.kind], one.step))
        self._later = replace(kept, step=max(one.step for one in both))

    def _do_later(self, incident: Incident, now: float) -> None:
        """What was asked for during this incident, which is over: done with, if a step so new was saved in it."""
        later, self._later = self._later, None
        if later is None or self._final is not None or (incident.best and incident.best.step >= later.step):
            return
        self._done.discard(later.id)
        self._raise(later, now)

    def _is_silent(self, known: _Known, now: float) -> bool:
        return now - known.heard_at >= self.config.silent_after_s

    def _replaced(self, known: _Known, incident: Incident) -> bool:
        """An extraction actor that died before all this: another one goes on in its place, under a name of its own."""
        return known.report.role == "extract" and self._is_silent(known, incident.opened_at)

    def _concerns(self, incident: Incident, report: WorkerReport) -> bool:
        """A stop is everybody's. A shrink is that of all training ranks together, or of one extraction actor."""
        return incident.order.kind == "stop" or not self._scopes or _scope(report) in self._scopes

    def _answer(self, report: WorkerReport) -> Order | None:
        incident = self.open_incident
        if incident is not None and self._concerns(incident, report):
            return None if report.worker in incident.acks and incident.order.kind != "stop" else incident.order
        return self._final


def _same_life(one: WorkerReport, other: WorkerReport) -> bool:
    """A worker that was started again counts its reports from the beginning."""
    return (one.node, one.pid) == (other.node, other.pid)


def _scope(report: WorkerReport) -> str:
    return "train" if report.role == "train" else report.worker


def _order_line(incident: Incident, now: float) -> dict[str, Any]:
    order = incident.order
    return {
        "kind": "order", "at": now, "incident": incident.number, "order": order.id, "do": order.kind,
        "reason": order.reason, "step": order.step, "numbers": dict(order.numbers),
    }  # fmt: skip
