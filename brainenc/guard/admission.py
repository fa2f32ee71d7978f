"""May so many bytes be allocated? Asked before large allocations, because polling loses against 14 GB/s. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from brainenc.errors import MemoryRefused
from brainenc.guard.policy import Meter, PolicyConfig, free_below


@dataclass(frozen=True, slots=True)
class _Granted:
    at: float
    n_bytes: int
    used_before: int


class Admission:
    """Grants reservations of one process. What was granted but is not used yet counts: pages come when touched.

    Args:
        config: whose critical threshold may not be reached.
        remember_s: after so long a reservation has become memory, or never will.
    """

    def __init__(self, config: PolicyConfig, remember_s: float = 30.0) -> None:
        self._config, self._remember_s = config, remember_s
        self._granted: list[_Granted] = []

    def ask(self, n_bytes: int, what: str, meter: Meter, now: float) -> None:
        """Grant, or refuse.

        Args:
            n_bytes: how much.
            what: for whom, for the message.
            meter: memory as it is now.
            now: seconds, monotonic.

        Raises:
            MemoryRefused: the critical threshold would be reached.
        """
        free = max(0, free_below(meter, self._config) - self.outstanding(meter.used, now))
        if n_bytes > free:
            raise MemoryRefused(n_bytes, free, what)
        self._granted.append(_Granted(now, n_bytes, meter.used))

    def outstanding(self, used: int, now: float) -> int:
        """Bytes that were granted and have not shown up in ``used`` yet."""
        self._granted = [g for g in self._granted if now - g.at < self._remember_s]
        if not self._granted:
            return 0
        return max(0, sum(g.n_bytes for g in self._granted) - max(0, used - self._granted[0].used_before))
