"""The brake: keeps a process from growing while its checkpoint is written. Linux; elsewhere it does nothing.

Whoever leaks goes on leaking while the checkpoint is written, in another thread or in C code that holds the
interpreter, and saving takes a second where memory lasts half of one. So when time gets short the watcher process
lowers the worker's soft ``RLIMIT_DATA`` from outside to what it has now and a margin: new allocations fail with a
``MemoryError`` that Python can handle, instead of a kill that nobody can. What was allocated stays, also if it was not
touched yet: one huge array made before the brake is not held (ask ``reserve`` before making it).

Standard library only: the watcher process imports this.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

from brainenc.guard.policy import Decision, Meter

MARGIN = 64 << 20
"""What saving may allocate, besides the largest tensor."""
_LEAST = 8 << 20
_WAITS_UNTIL, _WAITS_S = 0.97, 0.1
"""An update of the weights is waited for while less than this fraction is used and more than these seconds are left:
an allocation that fails in the middle of it leaves weights of no step, and nothing to save."""


class Brake:
    """Holds one process. Lives in the watcher process.

    Args:
        pid: whom.
        hold_s: at least so long: under the brake growth looks as if it had stopped.
        extra: bytes of the largest tensor that saving copies (on a GPU), else 0.
    """

    def __init__(self, pid: int, hold_s: float, extra: int = 0) -> None:
        self._pid, self._hold_s, self.extra = pid, hold_s, extra
        self._before: tuple[int, int] | None = None
        self._since = 0.0

    @property
    def on(self) -> bool:
        """The process is held."""
        return self._before is not None

    @property
    def releases_at(self) -> float:
        """The earliest time at which it may be released; never while it is off."""
        return self._since + self._hold_s if self.on else float("inf")

    def adjust(self, decision: Decision, ram: Meter, now: float, *, updating: bool = False) -> bool:
        """Hold when there is no time to reach a boundary, release when memory is no longer critical.

        Args:
            decision: what was made of the last look.
            ram: what it saw of main memory.
            now: seconds.
            updating: the process is overwriting its weights, which is worth waiting for.

        Returns:
            True if it has just been put on.
        """
        short = (
            decision.meter == "ram" and decision.level == "critical" and (decision.urgent or decision.fraction >= 0.94)
        )
        if updating and decision.fraction < _WAITS_UNTIL and decision.seconds_left > _WAITS_S:
            short = False
            if self.on:  # it was put on an instant before the update began: whoever leaks would take what that needs
                self.release()
        if short and not self.on:
            self._since = now
            return self._hold(max(0, ram.limit - ram.used))
        if self.on and decision.level != "critical" and now - self._since >= self._hold_s:
            self.release()
        return False

    def release(self) -> None:
        """Give the process its old limit back."""
        before, self._before = self._before, None
        if before is not None:
            _limit(self._pid, before)

    def _hold(self, room: int) -> bool:
        has = data_bytes(self._pid)
        before = _limit(self._pid, None)
        if has == 0 or before is None:
            return False
        margin = max(_LEAST, min(MARGIN + self.extra, room // 2))
        if _limit(self._pid, (has + margin, before[1])) is None:
            return False
        self._before = before
        return True


def data_bytes(pid: int) -> int:
    """Private writable memory of a process, mapped or touched: what ``RLIMIT_DATA`` is compared with. 0 if unknown."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmData:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def _limit(pid: int, new: tuple[int, int] | None) -> tuple[int, int] | None:
    """Read, or set and read, a process's ``RLIMIT_DATA``; None where that cannot be done."""
    if sys.platform != "linux":
        return None
    import resource

    with contextlib.suppress(OSError, ValueError):  # gone; or not ours
        if new is None:
            return resource.prlimit(pid, resource.RLIMIT_DATA)
        return resource.prlimit(pid, resource.RLIMIT_DATA, new)
    return None


def own_limit(new: tuple[int, int] | None = None) -> tuple[int, int] | None:
    """This process's own limit, for the worker to remember at its start and to restore if the watcher died braking."""
    return _limit(0, new)
