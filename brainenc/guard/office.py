"""The coordinator with a clock and a record: ``guard.jsonl`` and an account of every incident, in the run folder.

Plain class; ``actors.py`` makes an actor of it, and a run of one process has it in that process.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from brainenc import atomic, records
from brainenc.endurance import Endurance
from brainenc.guard.coordinator import Coordinator, CoordinatorConfig
from brainenc.guard.incident import account
from brainenc.guard.messages import Order, OrderKind, WorkerReport


class Office:
    """What an actor or a thread calls; several threads may.

    Args:
        run_folder: where ``guard.jsonl`` lies.
        config: of the coordinator.
        resume: the command that goes on from here, for the account.
        clock: seconds since 1970.
        successor: of one that died in this run; else this is where the run begins.
    """

    def __init__(
        self, run_folder: str | Path, config: CoordinatorConfig | None = None, resume: str = "",
        clock: Callable[[], float] = time.time, successor: bool = False,
    ) -> None:  # fmt: skip
        self._folder, self._clock, self._resume = Path(run_folder), clock, resume
        self._lock = threading.Lock()
        path = self._folder / "guard.jsonl"
        first = 1 + max(_incidents(path), default=0)
        self._lines = records.JsonLines(path)
        self._endurance = Endurance("The guard's coordinator")
        self._coordinator = Coordinator(config, self._record, first_incident=first)
        self._write(kind="coordinator", at=clock(), first_incident=first, successor=successor)

    def report(self, report: WorkerReport) -> Order | None:
        """Hear a worker; returns what it should do."""
        with self._lock:
            return self._coordinator.report(report, self._clock())

    def trip(self, kind: OrderKind, reason: str, numbers: dict[str, Any] | None = None) -> Order:
        """Somebody asks for an order: a signal, a drain notice, a person."""
        with self._lock:
            return self._coordinator.trip(kind, reason, self._clock(), numbers)

    def tick(self) -> str:
        """Let time pass; returns the state."""
        with self._lock:
            self._coordinator.tick(self._clock())
            return self._coordinator.state

    def worst(self) -> dict[str, float]:
        """The state of the worker that is worst off, for metrics."""
        with self._lock:
            return self._coordinator.worst()

    def places(self) -> dict[str, int]:
        """Where the workers are."""
        with self._lock:
            return self._coordinator.places(self._clock())

    def status(self) -> dict[str, Any]:
        """What is known of every worker, and all incidents."""
        with self._lock:
            return self._coordinator.status(self._clock())

    def close(self) -> None:
        """The run is over: say so, and flush the record."""
        with self._lock:
            self._coordinator.finish(self._clock())
        self._write(kind="closed", at=self._clock())
        with self._endurance.doing("closing its record"):
            self._lines.close()

    def _record(self, line: Mapping[str, Any]) -> None:
        self._write(**line)
        if line["kind"] == "incident":
            text = account(line, self._resume) + "\n"
            with self._endurance.doing("writing the account of an incident"):
                atomic.replace(self._folder / f"incident-{line['number']}.txt", text.encode())

    def _write(self, **line: Any) -> None:
        """A disk that is full or read-only costs the record: workers must hear their orders all the same."""
        with self._endurance.doing(f"writing its record {self._lines.path}"):
            self._lines.write(**line)


def _incidents(path: Path) -> list[int]:
    """Numbers of those that an earlier coordinator of this run has opened."""
    if not path.exists():
        return []
    lines = [line for line in records.read(path) if line.get("kind") in ("order", "incident")]
    numbers = [line.get("incident", line.get("number")) for line in lines]
    return [number for number in numbers if isinstance(number, int)]  # others wrote what is none


class LocalLink:
    """The way to a coordinator in the same process."""

    def __init__(self, office: Office) -> None:
        self._office = office
        self._answers: list[Order] = []

    def post(self, report: WorkerReport) -> None:
        """Told at once."""
        answer = self._office.report(report)
        if answer is not None:
            self._answers.append(answer)

    def answers(self) -> list[Order]:
        """What came back."""
        found, self._answers = self._answers, []
        return found
