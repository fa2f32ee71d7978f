"""What a fit is given and what it gives back: settings, hooks, outcome. Values and seams, no logic."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from brainenc.errors import BrainencError
from brainenc.guard.messages import NullGuard, StepGuard
from brainenc.train.checkpoint import Position

Floats = npt.NDArray[np.float64]


class Drill(Protocol):
    """Faults on purpose."""

    def at(self, *, step: int, rank: int) -> None:
        """Called before the local work of each step; may raise, signal, or do nothing."""
        ...


class NoDrill:
    """No faults."""

    def at(self, *, step: int, rank: int) -> None:
        """Nothing happens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FitSettings:
    """How long, how fast, and what is written down."""

    epochs: int
    learning_rate: float
    lr_drop: int
    lr_gamma: float
    log_every: int = 1
    snapshot_every_s: float = 20.0
    checkpoint_every_s: float = 300.0
    stop_when_short: bool = False
    """A step that runs out of memory stops the run (``--on-critical stop``); else micro-batches are halved."""
    config: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    random: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Hooks:
    """What a fit talks to besides the other ranks; the defaults talk to nobody."""

    guard: StepGuard = field(default_factory=NullGuard)
    record: Callable[[Mapping[str, Any]], None] = lambda fields: None
    """Rank 0: one object for ``metrics.jsonl`` and trackers."""
    note: Callable[[str], None] = lambda text: None
    """A line for a person."""
    scored: Callable[[Floats, Floats, Position], None] = lambda lh, rh, position: None
    """Rank 0: r of each vertex, after a validation that is the best so far."""
    drill: Drill = field(default_factory=NoDrill)
    clock: Callable[[], float] = time.monotonic


Status = Literal["done", "stopped", "failed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How a fit ended, the same on every rank."""

    status: Status
    position: Position
    reason: str = ""
    checkpoint: str = ""
    """The emergency checkpoint, where one was written."""
    save_s: float = 0.0
    """Seconds from the verdict to the durable emergency checkpoint."""
    error: BrainencError | None = None
