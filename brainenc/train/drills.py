"""Faults on purpose, on a healthy run: ``oom@step=40,rank=1``, as a fire drill exercises the way out.

``oom`` raises out-of-memory in a rank's forward, ``kill`` is SIGKILL to a rank, ``sigterm`` SIGTERM to the driver, and
``ram=0.95`` and ``gpu=0.95`` make a rank's guard believe that so much is used. Each happens once in the life of a run.
"""

from __future__ import annotations

import os
import re
import signal
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch

from brainenc import atomic
from brainenc.errors import UsageError
from brainenc.guard.messages import StepGuard

Fault = Literal["oom", "kill", "sigterm", "ram", "gpu"]
FAULTS: tuple[Fault, ...] = ("oom", "kill", "sigterm", "ram", "gpu")

_FORM = re.compile(r"(?P<fault>[a-z]+)(=(?P<value>[0-9.]+))?@step=(?P<step>\d+)(,rank=(?P<rank>\d+))?")


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """One fault: what, when, to whom."""

    fault: Fault
    step: int
    """Happens in the step that follows this many finished ones."""
    rank: int = 0
    value: float = 0.95

    @classmethod
    def parse(cls, text: str) -> Planned:
        """``"ram=0.95@step=40,rank=1"``.

        Raises:
            UsageError: of another form, or no such fault.
        """
        match = _FORM.fullmatch(text)
        if match is None or match["fault"] not in FAULTS:
            raise UsageError(
                f"--drill {text!r} is no drill; write FAULT@step=S,rank=R with one of {', '.join(FAULTS)}, for example "
                "ram=0.95@step=40,rank=1."
            )
        return cls(
            fault=cast("Fault", match["fault"]), step=int(match["step"]), rank=int(match["rank"] or 0),
            value=float(match["value"] or 0.95),
        )  # fmt: skip


class Drills:
    """The planned faults of one rank. Training thread.

    Args:
        planned: all of the run.
        marks: folder where a fault that happened leaves its mark, so that a restarted run does not repeat it.
        guard: of this rank; one with a ``drill`` method can be made to believe in pressure.
        driver_pid: who gets ``sigterm``.
        driver_host: the machine that this number is of.
    """

    def __init__(
        self, planned: Sequence[Planned], *, marks: Path, guard: StepGuard, driver_pid: int, driver_host: str
    ) -> None:
        self._planned, self._marks, self._guard = planned, marks, guard
        self._driver, self._host = driver_pid, driver_host

    def at(self, *, step: int, rank: int) -> None:
        """Called before the local work of each step."""
        for number, fault in enumerate(self._planned):
            if fault.step == step and fault.rank == rank and self._first_time(number):
                self._do(fault)

    def _first_time(self, number: int) -> bool:
        atomic.make_dirs(self._marks)
        return atomic.write_new(self._marks / f"drill-{number}", b"")

    def _do(self, planned: Planned) -> None:
        if planned.fault == "oom":
            raise torch.OutOfMemoryError(f"out of memory, as the drill at step {planned.step} wanted")
        if planned.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if planned.fault == "sigterm":
            if self._host != socket.gethostname():  # there the number is a stranger's
                raise UsageError(
                    f"The drill sigterm@step={planned.step},rank={planned.rank} is for the driver, which runs on "
                    f"{self._host}, and this rank on {socket.gethostname()}: name a rank that runs there."
                )
            os.kill(self._driver, signal.SIGTERM)
            return
        pretend = getattr(self._guard, "drill", None)
        if pretend is None:
            raise UsageError(f"A drill of {planned.fault} needs the guard, which this run has switched off.")
        pretend(planned.fault, planned.value)
