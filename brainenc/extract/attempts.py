"""Counts how often shards are tried, so that a worker that keeps dying ends the run instead of retrying for ever.

Ray starts a dead worker again and gives it the same shard, without end. Whoever takes a shard therefore asks the
:class:`AttemptLedger` first, a plain class that lives in one process beside the driver (``pipeline.py`` makes it a
Ray actor): a shard that was begun too often without an end is left out, and when workers die on whatever they are
given the run is stopped. It also keeps the last memory reading of each worker, which is all that is left of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from brainenc.units import format_bytes

Permit = Literal["go", "quarantined", "stop"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What a worker knows of itself: sent every half second, and before memory is asked for."""

    worker: str
    rows: int = 0
    """Images done since the worker started."""
    micro_batch: int = 0
    loaded_bytes: int = 0
    """Anonymous memory with the model loaded, before the first batch."""
    used_bytes: int = 0
    peak_bytes: int = 0
    machine_used_bytes: int = 0
    limit_bytes: int = 0
    gpu_fraction: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Death:
    """A shard that was begun and never ended: its worker died."""

    task: str
    attempt: int
    last: Reading | None


@dataclass(kw_only=True, slots=True)
class _Attempt:
    tries: int = 0
    worker: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class LedgerState:
    """A copy of the ledger, for the driver's progress line and for errors."""

    readings: dict[str, Reading]
    deaths: tuple[Death, ...]
    active: int
    """Tasks that a worker holds now."""
    rows: int
    """Images done by all workers, dead ones included."""
    stop: str
    """Why the run is being stopped; empty while it goes on."""

    @property
    def used_bytes(self) -> int:
        """Memory of the workers that are alive."""
        return sum(r.used_bytes for r in self.readings.values())

    @property
    def peak_bytes(self) -> int:
        """Largest worker ever seen, dead ones included."""
        lasts = [d.last for d in self.deaths if d.last is not None]
        return max((r.peak_bytes for r in [*self.readings.values(), *lasts]), default=0)


@dataclass(kw_only=True)
class AttemptLedger:
    """Who holds which shard, how often each was tried, and what each worker last said.

    Args:
        max_attempts: a shard whose workers died this often is left out.
        max_deaths: deaths in a row, without one shard finished in between, that stop the run.
    """

    max_attempts: int = 3
    max_deaths: int = 4
    _attempts: dict[str, _Attempt] = field(default_factory=dict)
    _readings: dict[str, Reading] = field(default_factory=dict)
    _deaths: list[Death] = field(default_factory=list)
    _deaths_in_a_row: int = 0
    _rows_of_the_dead: int = 0
    _stop: str = ""

    def begin(self, task: str, worker: str) -> Permit:
        """May ``worker`` take ``task``? Called before anything that could kill it."""
        attempt = self._attempts.setdefault(task, _Attempt())
        if attempt.worker is not None and attempt.worker != worker:
            self._died(task, attempt)
        if self._deaths_in_a_row >= self.max_deaths and not self._stop:
            self._stop = f"{self._deaths_in_a_row} workers died one after another"
        if self._stop:
            return "stop"
        if attempt.tries >= self.max_attempts:
            return "quarantined"
        attempt.tries += 1
        attempt.worker = worker
        return "go"

    def _died(self, task: str, attempt: _Attempt) -> None:
        assert attempt.worker is not None
        last = self._readings.pop(attempt.worker, None)
        self._rows_of_the_dead += last.rows if last else 0
        self._deaths.append(Death(task=task, attempt=attempt.tries, last=last))
        self._deaths_in_a_row += 1
        attempt.worker = None

    def end(self, task: str, *, sealed: bool) -> None:
        """The worker came back from ``task`` alive; ``sealed``: the workers are plainly able to do their work."""
        self._attempts.pop(task, None)
        if sealed:
            self._deaths_in_a_row = 0

    def report(self, reading: Reading) -> str:
        """Keep a worker's reading; the answer is why to stop, or empty."""
        self._readings[reading.worker] = reading
        return self._stop

    def stop(self, reason: str) -> None:
        """From now on nothing new is begun, and whoever is at work ends at its next micro-batch."""
        self._stop = self._stop or reason

    def state(self) -> LedgerState:
        """A copy of what is known now."""
        return LedgerState(
            readings=dict(self._readings),
            deaths=tuple(replace(d) for d in self._deaths),
            active=sum(a.worker is not None for a in self._attempts.values()),
            rows=self._rows_of_the_dead + sum(r.rows for r in self._readings.values()),
            stop=self._stop,
        )


def explain_deaths(deaths: tuple[Death, ...], *, memory_fraction: float = 0.9) -> str:
    """What killed the workers, as far as their last readings tell, and a batch size that would fit."""
    readings = [d.last for d in deaths if d.last is not None]
    if not readings:
        return "None of them lived long enough to measure its memory: loading the backbone may already be too much."
    last = max(readings, key=lambda r: r.peak_bytes)
    text = f"The largest worker had {format_bytes(last.peak_bytes)} of anonymous memory at its peak"
    if last.limit_bytes:
        text += f"; the machine's limit is {format_bytes(last.limit_bytes)}"
    text += f"; the micro-batch was {last.micro_batch}."
    if last.limit_bytes and last.machine_used_bytes < memory_fraction * last.limit_bytes and last.peak_bytes:
        headroom = last.limit_bytes - last.machine_used_bytes
        text += f" {format_bytes(headroom)} were free when it was last heard of."
    fits = fitting_batch(last, memory_fraction=memory_fraction)
    if last.micro_batch > 1:
        text += f" If memory is what killed it, --batch-size {fits} would fit."
    return text


def fitting_batch(last: Reading, *, memory_fraction: float = 0.9) -> int:
    """A micro-batch that would fit, from what one image was seen to take; at most half of what failed."""
    half = max(1, last.micro_batch // 2)
    an_image = (last.peak_bytes - last.loaded_bytes) / max(1, last.micro_batch)
    if an_image <= 0 or not last.limit_bytes:
        return half
    others = max(0, last.machine_used_bytes - last.used_bytes)
    room = memory_fraction * last.limit_bytes - others - last.loaded_bytes
    return max(1, min(half, int(room / an_image)))
