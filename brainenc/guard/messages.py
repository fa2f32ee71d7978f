"""What guards, loops and the coordinator say to one another. Values only: no clock, no thread, no Ray.

A worker's :class:`WorkerReport` is its whole state and is sent again and again, and the coordinator's answer is
everything that the worker should know: a lost message costs one heartbeat and nothing else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

EXIT_STOPPED_SAFELY = 75
"""``EX_TEMPFAIL``: saved, stopped, and resumable by the same command."""

STRENGTH: dict[str, int] = {"checkpoint": 0, "shrink": 1, "stop": 2}
"""Of two orders the stronger counts."""

OrderKind = Literal["stop", "shrink", "checkpoint"]
Level = Literal["ok", "warn", "critical"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """What a loop is asked to do at its next step boundary."""

    kind: OrderKind
    """``stop``: save, end with exit code 75; ``shrink``: save, halve the micro-batch, go on; ``checkpoint``: save."""
    reason: str
    """One sentence for a person."""
    numbers: Mapping[str, Any] = field(default_factory=dict)
    """What the decision was made from: used and limit in bytes, fraction, rate in bytes/s, seconds left ..."""
    id: str = ""
    """Names the order in acknowledgements; of two orders with one id, the second is the first again."""
    urgent: bool = False
    """Time is shorter than a step: save the last finished step where you are."""
    step: int = -1
    """Last finished step of whoever asked: an order to shrink or to checkpoint is done with once a later or equal step
    was saved, so that ranks which have acted together on one's word do not act again on the coordinator's."""

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {**asdict(self), "numbers": dict(self.numbers)}


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointAck:
    """One worker's answer to an order: durable at ``path``, or why not."""

    order_id: str
    worker: str
    epoch: int
    step: int
    path: str = ""
    """Where it lies, empty when nothing could be saved."""
    error: str = ""
    """Why it could not be saved; empty when it was."""

    @property
    def ok(self) -> bool:
        """The checkpoint is durable."""
        return bool(self.path) and not self.error


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerReport:
    """A worker's whole state at one moment, as the coordinator hears it."""

    worker: str
    """Unique in the run: ``"rank1"``, ``"extract-0"``."""
    seq: int
    """Grows with every report; an older one that arrives late is dropped."""
    role: Literal["train", "extract"] = "train"
    node: str = ""
    place: str = ""
    """The node as the cluster calls it; empty without one."""
    pid: int = 0
    epoch: int = -1
    step: int = -1
    """Last finished step; -1 before the first."""
    level: Level = "ok"
    reason: str = ""
    numbers: Mapping[str, Any] = field(default_factory=dict)
    order: Order | None = None
    """The order this worker is obeying, its own or the coordinator's: a new coordinator learns it from here."""
    ack: CheckpointAck | None = None
    """Answer to the last order, repeated until the run ends: a lost one is heard the next time."""
    leaving: str = ""
    """Why the worker goes (``"done"``, ``"stopped"``, ``"failed: ..."``); empty while it works."""


class OutOfTime(BaseException):
    """Raised in the training thread when memory runs out before the step would end.

    Not an :class:`Exception`, so that no loop swallows it by accident: whoever catches it saves the last finished
    step, acknowledges through ``guard.saved`` and returns. Raised only inside ``guard.computing()``.

    Args:
        order: what to do and why.
    """

    def __init__(self, order: Order | None = None) -> None:
        super().__init__(order)
        self.order = order

    def __str__(self) -> str:
        return self.order.reason if self.order else "memory runs out before this step would end"


class StepGuard(Protocol):
    """All that a loop needs from a guard. Every call is made in the loop's own thread.

    The loop asks ``pending()`` at every step boundary, obeys, and says ``saved(...)`` when the checkpoint is durable;
    an order to shrink or to checkpoint is then done with, an order to stop stays.
    """

    def pending(self) -> Order | None:
        """What watcher, coordinator or a signal have asked for; microseconds."""
        ...

    def beat(self, *, epoch: int, step: int) -> None:
        """``step`` is finished. Microseconds."""
        ...

    def reserve(self, n_bytes: int, what: str) -> None:
        """Ask before a large allocation.

        Raises:
            MemoryRefused: it would not fit below the critical threshold.
        """
        ...

    def saved(self, *, path: str, step: int, epoch: int, error: str = "") -> None:
        """A checkpoint is durable at ``path``; or, with ``error``, could not be saved."""
        ...

    def save_takes(self, seconds: float) -> None:
        """So long a checkpoint takes until it is durable, by what was measured or is to be expected."""
        ...

    def computing(self) -> contextlib.AbstractContextManager[None]:
        """Around the work that can be broken off without harm (forward, backward): only inside it is
        :class:`OutOfTime` raised, and never after it was left."""
        ...

    def updating(self) -> contextlib.AbstractContextManager[None]:
        """Around ``optimizer.step()``: nobody saves on the spot while inside."""
        ...


class NullGuard:
    """Guards nothing: for runs without a guard, and for tests."""

    def pending(self) -> Order | None:
        """Nothing, ever."""
        return None

    def beat(self, *, epoch: int, step: int) -> None:
        """Heard by nobody."""

    def reserve(self, n_bytes: int, what: str) -> None:
        """Always granted."""

    def saved(self, *, path: str, step: int, epoch: int, error: str = "") -> None:
        """Heard by nobody."""

    def save_takes(self, seconds: float) -> None:
        """Heard by nobody."""

    def computing(self) -> contextlib.AbstractContextManager[None]:
        """Never interrupted."""
        return contextlib.nullcontext()

    def updating(self) -> contextlib.AbstractContextManager[None]:
        """Nothing to hold back."""
        return contextlib.nullcontext()
