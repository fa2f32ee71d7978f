"""The driver's account of one run: what came back, what was committed, and how it ends. No Ray."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from brainenc.errors import BadImages, ExtractionFailed, StoppedSafely
from brainenc.extract.attempts import LedgerState, explain_deaths
from brainenc.extract.config import ExtractConfig, ExtractSummary
from brainenc.extract.outcome import ShardOutcome
from brainenc.extract.plan import ShardTask, Wanted
from brainenc.featurestore.collection import Collection
from brainenc.redact import redact
from brainenc.units import format_bytes


@dataclass(kw_only=True)
class Run:
    """Takes in outcomes, commits now and then, and turns it all into a summary or an error. Driver, main thread."""

    config: ExtractConfig
    tasks: Sequence[ShardTask]
    wanted: Sequence[Wanted]
    collections: Mapping[str, Collection]
    started: float = field(default_factory=time.perf_counter)
    outcomes: list[ShardOutcome] = field(default_factory=list)
    ledger: LedgerState | None = None
    started_ray: bool = False
    stop_reason: str = ""
    """Why no more is begun: a signal, the guard, an error that every shard would meet."""
    ray_error: str = ""
    """Why Ray gave up, if it did."""
    interrupted: bool = False
    """Ctrl-C rather than a polite signal."""
    incidents: list[str] = field(default_factory=list)
    """Accounts of what the guard did."""
    _committed: float = field(default_factory=time.monotonic)
    _uncommitted: set[str] = field(default_factory=set)
    _first_batch_at: float = 0.0
    _last_outcome_at: float = 0.0

    @property
    def images_total(self) -> int:
        """Images that this run has to compute."""
        return sum(task.n_rows for task in self.tasks)

    @property
    def shards_sealed(self) -> int:
        """Shards sealed by this run, counted per collection."""
        return sum(len(outcome.sealed) for outcome in self.outcomes)

    @property
    def shards_total(self) -> int:
        """Shards that this run has to seal, counted per collection."""
        return sum(len(task.features) for task in self.tasks)

    def take(self, outcome: ShardOutcome) -> None:
        """Note what became of a shard; commit if it is time."""
        self.outcomes.append(outcome)
        self._last_outcome_at = time.time()
        if outcome.first_batch_at:
            self._first_batch_at = min(self._first_batch_at or outcome.first_batch_at, outcome.first_batch_at)
        self._uncommitted |= set(outcome.sealed)
        if outcome.status == "stopped" and outcome.notes:
            self.stop_reason = self.stop_reason or outcome.notes[-1].removeprefix("stopped: ")
        if outcome.error is not None:
            self.stop_reason = self.stop_reason or f"shard {outcome.task} failed"
        if time.monotonic() - self._committed >= self.config.commit_every_s:
            self.commit(self._uncommitted)

    def forget(self, lost: Sequence[ShardTask], tried: Sequence[ShardTask]) -> None:
        """Shards that were sealed, and are gone with the disk they were on, are to be done again.

        Args:
            lost: what is left to do now.
            tried: what was done in this round.
        """
        gone = {(task.stimuli, task.shard) for task in lost}
        names = {task.name for task in (*self.tasks, *tried) if (task.stimuli, task.shard) in gone}
        self.outcomes = [o for o in self.outcomes if o.task not in names or o.status != "sealed"]

    def commit(self, keys: Sequence[str] | set[str]) -> None:
        """Make what is sealed visible to readers."""
        for key in sorted(keys):
            self.collections[key].commit()
        self._uncommitted.clear()
        self._committed = time.monotonic()

    def finish(self) -> ExtractSummary:
        """Commit all that is sealed, also by runs that died before they could, and say how it went.

        Raises:
            StoppedSafely, KeyboardInterrupt, BadImages, ExtractionFailed, NoSpace: work is left undone.
        """
        self.commit(set(self.collections))
        self._raise_first_error()
        if self.interrupted:
            raise KeyboardInterrupt
        undone = [o for o in self.outcomes if o.status != "sealed"]
        done = len(self.outcomes) - len(undone)
        left = len(self.tasks) - done
        if left and self.ray_error:
            raise ExtractionFailed(
                f"Ray gave up ({self.ray_error}), with {left} of {len(self.tasks)} shards "
                f"undone. {explain_deaths(self.ledger.deaths if self.ledger else ())} What was sealed stays; the same "
                "command goes on."
            )
        if left and self.ledger is not None and "died" in self.ledger.stop:
            raise ExtractionFailed(
                f"{self.ledger.stop.capitalize()}, so the run was ended with {left} of {len(self.tasks)} shards "
                f"undone. {explain_deaths(self.ledger.deaths)} What was sealed stays; the same command goes on."
            )
        quarantined = [o.task for o in undone if o.status == "quarantined"]
        if quarantined:
            deaths = self.ledger.deaths if self.ledger else ()
            raise ExtractionFailed(
                f"{len(quarantined)} shard(s) killed their worker {self.config.max_attempts} times each and were left "
                f"out: {', '.join(quarantined[:5])}. {explain_deaths(deaths)} The other shards are sealed; the same "
                "command tries these again."
            )
        bad = {uri: why for o in undone if o.status == "bad_images" for uri, why in o.bad.items()}
        if bad:
            raise BadImages(
                bad,
                "All other shards are sealed. Mend or remove these images, or use --on-bad-image null to leave their "
                "rows empty; then the same command goes on.",
            )
        if left:
            raise StoppedSafely(
                f"Stopped safely ({self.stop_reason or 'asked to'}) with {done} of {len(self.tasks)} shards done; what "
                "was sealed stays, and the same command goes on from there."
            )
        return self._summary()

    def _raise_first_error(self) -> None:
        error = next((o.error for o in self.outcomes if o.error is not None), None)
        if error is not None:
            raise error

    def _summary(self) -> ExtractSummary:
        rows = sum(o.rows for o in self.outcomes)
        working = self._last_outcome_at - self._first_batch_at if rows else 0.0
        notes = tuple(note for o in self.outcomes for note in o.notes)
        ledger = self.ledger
        return ExtractSummary(
            store=redact(self.config.store),
            keys=tuple(w.key for w in self.wanted),
            images=rows,
            reused=sum(o.reused for o in self.outcomes),
            shards_sealed=self.shards_sealed,
            shards_before=sum(len(w.sealed) for w in self.wanted),
            missing={uri: why for o in self.outcomes for uri, why in o.bad.items()},
            retries=len(ledger.deaths) if ledger else 0,
            micro_batch=min((o.micro_batch for o in self.outcomes if o.micro_batch), default=0),
            started_ray=self.started_ray,
            startup_s=self._startup_s(working),
            seconds=time.perf_counter() - self.started,
            images_per_s=rows / working if working > 0 else 0.0,
            peak_worker_bytes=ledger.peak_bytes if ledger else 0,
            warnings=tuple(map(redact, notes + self._warnings())),
        )

    def _startup_s(self, working: float) -> float:
        return max(0.0, time.perf_counter() - self.started - working) if working else 0.0

    def _warnings(self) -> tuple[str, ...]:
        found = tuple(f"the guard acted: {path}" for path in self.incidents)
        if self.ledger is None or not self.ledger.deaths:
            return found
        peak = format_bytes(self.ledger.peak_bytes)
        return (f"{len(self.ledger.deaths)} worker(s) died and were replaced; the largest had {peak}", *found)
