"""What happens when: the learning rate by epoch, and rank 0's decisions by clock. Pure; time is handed in."""

from __future__ import annotations

from dataclasses import dataclass, field

_COST_SHARE = 0.005
"""Largest share of the training time that rolling snapshots may take."""


def learning_rate(base: float, epoch: int, *, drop: int, gamma: float) -> float:
    """``base * gamma ** (epoch // drop)``: the published StepLR, which steps once an epoch."""
    return base * gamma ** (epoch // drop)


@dataclass(kw_only=True, slots=True)
class Clock:
    """When something that costs time is due again. Rank 0 only; its answer travels in the status word.

    Args:
        every_s: wanted time between two; 0: never.
        longest_s: what the interval may grow to when each one is dear.
    """

    every_s: float
    longest_s: float | None = None
    _last: float = field(default=0.0, init=False)
    _cost_s: float = field(default=0.0, init=False)

    def start(self, now: float) -> None:
        """Count from ``now``."""
        self._last = now

    def due(self, now: float) -> bool:
        """Whether the interval is over."""
        return self.every_s > 0 and now - self._last >= self.interval_s

    def done(self, now: float, cost_s: float) -> None:
        """One was made, which held training up for ``cost_s``."""
        self._last, self._cost_s = now, cost_s

    @property
    def interval_s(self) -> float:
        """The wanted time, or longer where the cost would be more than half a percent of it."""
        wanted = max(self.every_s, self._cost_s / _COST_SHARE)
        return wanted if self.longest_s is None else min(wanted, max(self.every_s, self.longest_s))
