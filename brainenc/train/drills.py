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

PRETENDED = ("ram", "gpu")
"""Those that a guard is made to believe, and which want a fraction."""

_FORM = re.compile(r"(?P<fault>[a-z]+)(=(?P<value>[^@]*))?(?P<place>@step=(?P<step>\d+)(,rank=(?P<rank>\d+))?)?")


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
        fault = cast("Fault", match["fault"])
        value = _fraction(text, match["value"]) if fault in PRETENDED else 0.0
        if fault not in PRETENDED and match["value"] is not None:
            raise UsageError(f"--drill {text!r}: {fault} takes no number; write for example {fault}@step=40.")
        if match["place"] is None:
            raise UsageError(
                f"--drill {text!r} does not say when: @step= is missing. Write for example {text}@step=40, or "
                f"{text}@step=40,rank=1."
            )
        return cls(fault=fault, step=int(match["step"]), rank=int(match["rank"] or 0), value=value)

    @property
    def text(self) -> str:
        """As it is written on a command line."""
        value = f"={self.value:g}" if self.fault in PRETENDED else ""
        return f"{self.fault}{value}@step={self.step},rank={self.rank}"

    def happened(self, marks: Path) -> bool:
        """Whether it left its mark in this folder."""
        return (marks / self.text).exists()


def _fraction(text: str, given: str | None) -> float:
    """What is to be believed: above 0, at most 1."""
    fault = text.partition("=")[0].partition("@")[0]
    right = f"Write for example {fault}=0.95@step=40."
    if given is None:
        raise UsageError(f"--drill {text!r} does not say how much memory is to seem used: a fraction. {right}")
    try:
        value = float(given)
    except ValueError:
        raise UsageError(f"--drill {text!r}: {given!r} is no number; wanted is a fraction. {right}") from None
    if 2 <= value <= 100:
        raise UsageError(f"--drill {text!r}: {given} looks like percent; wanted is a fraction: {value / 100:g}.")
    if not 0 < value <= 1:
        raise UsageError(f"--drill {text!r}: {given} is no fraction, which is above 0 and at most 1. {right}")
    return value


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
        for fault in self._planned:
            if fault.step == step and fault.rank == rank and self._first_time(fault):
                self._do(fault)

    def _first_time(self, fault: Planned) -> bool:
        atomic.make_dirs(self._marks)
        return atomic.write_new(self._marks / fault.text, b"")

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
