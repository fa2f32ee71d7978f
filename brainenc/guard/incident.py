"""The account of one incident: who, what, when, with which numbers, where the checkpoint lies, how to resume."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from brainenc.guard.messages import CheckpointAck, Order, WorkerReport

Outcome = Literal["open", "saved", "failed", "timed out"]


@dataclass(slots=True, kw_only=True)
class Incident:
    """One incident, from its first cause to its outcome. Written by the coordinator alone."""

    number: int
    order: Order
    opened_at: float
    """Seconds since 1970, as all times here."""
    deadline_at: float
    causes: list[dict[str, Any]] = field(default_factory=list)
    """Everybody who asked for it, in order: time, worker, node, reason, numbers, last finished step."""
    acks: dict[str, CheckpointAck] = field(default_factory=dict)
    roles: dict[str, str] = field(default_factory=dict)
    """Of those who answered: ``"train"`` or ``"extract"``."""
    merged: set[str] = field(default_factory=set)
    """Names of other orders to do the same, which workers gave themselves meanwhile: an answer to one is an answer."""
    dead: list[str] = field(default_factory=list)
    """Workers that fell silent before they answered."""
    outcome: Outcome = "open"
    closed_at: float = 0.0

    def add_cause(self, report: WorkerReport, now: float) -> None:
        """One more worker is in trouble."""
        if all(cause["worker"] != report.worker for cause in self.causes):
            self.causes.append({
                "at": now, "worker": report.worker, "role": report.role, "node": report.node, "pid": report.pid,
                "step": report.step, "epoch": report.epoch, "reason": report.reason or self.order.reason,
                "numbers": dict(report.numbers),
            })  # fmt: skip

    @property
    def best(self) -> CheckpointAck | None:
        """The acknowledged checkpoint of the newest step."""
        return max((ack for ack in self.acks.values() if ack.ok), key=lambda ack: ack.step, default=None)

    @property
    def done_again(self) -> int:
        """Steps of training that were done when the order came, and are not in the checkpoint: of workers that were
        started again meanwhile, or that saved on the spot what another one had gone beyond."""
        best = self.best
        if best is None or self.roles.get(best.worker, "train") != "train":
            return 0
        return max(0, self.order.step - best.step)

    def close(self, outcome: Outcome, now: float) -> None:
        """It is over."""
        self.outcome, self.closed_at = outcome, now

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        best = self.best
        return {
            "number": self.number, "outcome": self.outcome, "order": self.order.to_dict(), "opened_at": self.opened_at,
            "closed_at": self.closed_at or None, "causes": self.causes, "dead": self.dead,
            "acks": {
                name: {
                    "role": self.roles.get(name, "train"), "step": a.step, "epoch": a.epoch, "path": a.path,
                    "error": a.error,
                }
                for name, a in sorted(self.acks.items())
            },
            "checkpoint": best.path if best else None, "step": best.step if best else None,
            "done_again": self.done_again,
        }  # fmt: skip


def whole(incident: Mapping[str, Any]) -> dict[str, Any]:
    """An incident's line of a record with all of its fields: what it lacks, or has of another kind, is unknown."""
    order = _fields(incident.get("order"), kind="?", reason="?")
    causes = incident.get("causes")
    acks = incident.get("acks")
    return {
        **_fields(incident, number=0, outcome="?", opened_at=0.0),
        "closed_at": _fields(incident, closed_at=0.0)["closed_at"] or None,
        "order": order,
        "causes": [
            _fields(cause, at=0.0, worker="?", node="", step=-1, reason="?")
            for cause in (causes if isinstance(causes, list) else [])
        ],
        "dead": [str(name) for name in incident["dead"]] if isinstance(incident.get("dead"), list) else [],
        "acks": {
            str(name): _fields(ack, step=-1, path="", error="")
            for name, ack in (acks.items() if isinstance(acks, Mapping) else ())
        },
        "checkpoint": _fields(incident, checkpoint="")["checkpoint"] or None,
        "step": incident.get("step"),
    }


def _fields(found: Any, **unknown: Any) -> dict[str, Any]:
    """What was found, with these fields: of this kind, or this value."""
    given = dict(found) if isinstance(found, Mapping) else {}
    for name, value in unknown.items():
        kind = int | float if isinstance(value, int | float) else type(value)
        if not isinstance(given.get(name), kind):
            given[name] = value
    return given


def account(incident: Mapping[str, Any], resume: str = "", *, gone: bool = False) -> str:
    """The incident as a person reads it.

    Args:
        incident: from :meth:`Incident.to_dict`, as it lies in ``guard.jsonl``.
        resume: the command that goes on from here.
        gone: the checkpoint was there, and is not any more.
    """
    order = incident["order"]
    opened = incident["opened_at"]
    lines = [
        f"Incident {incident['number']} at {_clock(opened)}: ordered to {order['kind']} because {order['reason']}."
    ]
    for cause in incident["causes"]:
        where = f" on {cause['node']}" if cause["node"] else ""
        lines.append(f"  {_clock(cause['at'])} {cause['worker']}{where} after {_progress(cause)}: {cause['reason']}")
    lines += [f"  {name}, {_progress(ack)}: {_answer(ack, order)}" for name, ack in incident["acks"].items()]
    lines += [f"  {name} fell silent before it answered" for name in incident["dead"]]
    took = f" after {incident['closed_at'] - opened:.2f} s" if incident["closed_at"] else ""
    again = incident.get("done_again", 0)  # not in records of earlier versions
    older = ", but only an older step" if again else ""
    lines.append(f"Outcome: {incident['outcome']}{took}{older}.")
    if incident["checkpoint"] and not any(_extracts(ack) for ack in incident["acks"].values()):
        lines.append(
            f"The checkpoint of step {incident['step']} lies in {incident['checkpoint']}"
            + (" (no longer there)." if gone else ". Of emergency checkpoints only the newest stays.")
        )
        if again:
            lines.append(
                f"The order came after step {order['step']}: what was done from step {incident['step']} to "
                f"{order['step']} is done again."
            )
    if resume:
        lines.append(f"To go on: {resume}")
    return "\n".join(lines)


def _extracts(told: Mapping[str, Any]) -> bool:
    return told.get("role") == "extract"


def _answer(ack: Mapping[str, Any], order: Mapping[str, Any]) -> str:
    if not ack["path"] or ack["error"]:
        return f"not saved: {ack['error']}"
    if not _extracts(ack):
        return f"durable at {ack['path']}"
    done = "halved its micro-batch" if order["kind"] == "shrink" else "stopped"
    return f"{done}; what is sealed is durable in {ack['path']}"


def _progress(told: Mapping[str, Any]) -> str:
    """Training counts steps, an extraction actor the images that it has done since it was started."""
    return f"{max(0, told['step'])} images" if _extracts(told) else f"step {told['step']}"


def _clock(at: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(at)) + f".{int(at % 1 * 1000):03d}"
