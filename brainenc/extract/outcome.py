"""What became of one shard: the record that a worker keeps while it computes, and what travels back."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from brainenc.extract.decode import Decoded
from brainenc.extract.plan import ShardTask
from brainenc.redact import redact

Status = Literal["sealed", "bad_images", "stopped", "failed", "quarantined"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardOutcome:
    """What became of one :class:`ShardTask`. Travels back through Ray; holds no features."""

    task: str
    status: Status
    sealed: tuple[str, ...] = ()
    """Keys whose shard this call sealed."""
    rows: int = 0
    """Images that went through the model."""
    reused: int = 0
    """Images whose rows were copied from another stimulus set."""
    bad: Mapping[str, str] = field(default_factory=dict)
    """Images that could not be read, without credentials, and why: missing rows, or what kept the shard from being
    sealed."""
    micro_batch: int = 0
    """What was aimed at in the end: the task's, or less after memory ran out; 0 if nothing was computed."""
    seconds: float = 0.0
    first_batch_at: float = 0.0
    """``time.time()`` before the first forward pass, for telling start-up from work."""
    error: Exception | None = None
    """Why it failed."""
    notes: tuple[str, ...] = ()


@dataclass(kw_only=True)
class ShardPass:
    """What is known about a shard while it is being computed. One thread."""

    task: ShardTask
    started: float = field(default_factory=time.perf_counter)
    hashes: list[str] = field(default_factory=list)
    bad: dict[str, str] = field(default_factory=dict)
    sealed: list[str] = field(default_factory=list)
    rows: int = 0
    reused: int = 0
    micro_batch: int = 0
    first_batch_at: float = 0.0
    notes: list[str] = field(default_factory=list)

    def take(self, batch: Sequence[Decoded]) -> None:
        """Remember the hashes and problems of images that were decoded."""
        self.hashes += [image.content_hash for image in batch]
        self.bad |= {redact(image.uri): redact(image.problem) for image in batch if image.problem}
        self.reused += sum(image.donation is not None for image in batch)

    def begin_batch(self) -> None:
        """A forward pass is about to begin."""
        self.first_batch_at = self.first_batch_at or time.time()

    def end_batch(self, size: int, ceiling: int | None) -> None:
        """``size`` images went through the model, where memory allows ``ceiling`` at a time."""
        self.rows += size
        self.micro_batch = min(self.task.micro_batch, ceiling or self.task.micro_batch)

    def outcome(self, status: Status, *, error: Exception | None = None) -> ShardOutcome:
        """The record as it travels."""
        return ShardOutcome(
            task=self.task.name, status=status, sealed=tuple(self.sealed), rows=self.rows, reused=self.reused,
            bad=dict(self.bad),
            micro_batch=self.micro_batch, seconds=time.perf_counter() - self.started,
            first_batch_at=self.first_batch_at, error=error, notes=tuple(self.notes),
        )  # fmt: skip
