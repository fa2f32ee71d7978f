"""What a plain script has been told to do and has not done yet. Decides, and does nothing: no signal, no file."""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from brainenc.guard.messages import Level, Order
from brainenc.guard.policy import Escalation


class StandingOrders:
    """The orders of a script, from its watcher and from people. Each method may be interrupted by any other, as
    signal handlers do.

    Args:
        on_critical: what is done first when memory is critical.
        dwell_s: so long a shrink may take to show.
    """

    def __init__(self, on_critical: Literal["stop", "shrink"], dwell_s: float) -> None:
        self._escalation = Escalation(on_critical, dwell_s)
        self.attention = False
        """Something is the matter: look closely at every boundary."""
        self.level: Level = "ok"
        self.reason = ""
        # Two, so that neither is ever written over the other, whenever a signal comes.
        self.asked: Order | None = None
        """To stop, by a person or a scheduler of jobs."""
        self.alarm: Order | None = None
        """What memory asks for."""
        self._signals = 0
        self._overdue = False
        self._freed_at = float("-inf")

    @property
    def next(self) -> Order | None:
        """What is to be done at the next boundary."""
        return self.asked or self.alarm

    @property
    def urgent(self) -> Order | None:
        """What is to be done here and now."""
        return next((o for o in (self.asked, self.alarm) if o is not None and o.urgent), None)

    def ask(self, number: int) -> None:
        """SIGTERM, SIGINT: stop at the next boundary; twice: here.

        Raises:
            SystemExit: three times: at once, with nothing saved.
        """
        self._signals += 1
        if self._signals >= 3:
            raise SystemExit(128 + number)
        name = signal.Signals(number).name
        self.asked = Order(kind="stop", reason=f"asked to stop by {name}")
        if self._signals > 1:  # asked after that line: the second signal may come in the middle of it
            self.asked = replace(self.asked, urgent=True)
        self.attention = True

    def hear(self, message: Mapping[str, Any]) -> bool:
        """One message of the watcher; True when it must say if the next boundary takes too long to come."""
        if message["kind"] == "overdue":
            self._hear_overdue()
        return message["kind"] == "decision" and self._hear_decision(message)

    def _hear_overdue(self) -> None:
        """The boundary that was waited for has not come."""
        if self.asked is not None:
            self.asked = replace(self.asked, urgent=True)
        if self.alarm is not None and is_ram(self.alarm):
            self._overdue = True
            self.alarm = replace(self.alarm, urgent=True)

    def _hear_decision(self, message: Mapping[str, Any]) -> bool:
        self.level, self.reason = message["level"], message["reason"]
        self.attention = self.attention or self.level != "ok"
        short = self.level == "critical" and not message.get("held", False)
        if not short:
            self._escalation.calm()
        if self.level != "critical":
            self.drop_alarm()  # memory went down again before anything was done
        elif short and message["at"] >= self._freed_at:
            return self._raise_alarm(message)
        return False

    def _raise_alarm(self, message: Mapping[str, Any]) -> bool:
        kind = self._escalation.critical(time.monotonic())
        if kind is None:
            return False  # it has just shrunk: that needs a moment to show
        numbers = {k: v for k, v in message.items() if k not in ("kind", "reason", "level")}
        urgent = message["urgent"] or self._overdue
        first = self.next is None
        self.alarm = alarm = Order(kind=kind, reason=message["reason"], numbers=numbers, urgent=urgent)
        return first and is_ram(alarm)

    def drop_alarm(self) -> None:
        """Memory is no longer short."""
        self.alarm, self._overdue = None, False

    def freed(self, now: float) -> None:
        """Memory was freed: what the watcher saw before no longer counts."""
        self._freed_at = now

    def shrunk(self, now: float) -> None:
        """What the alarm asked for was done."""
        self.freed(now)
        self._escalation.shrunk(now)
        self.drop_alarm()


def is_ram(alarm: Order) -> bool:
    """About main memory, whose end nobody survives; a GPU's raises an error."""
    return bool(alarm.numbers["meter"] == "ram")
