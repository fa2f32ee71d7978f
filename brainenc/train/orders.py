"""Orders that lie in the run folder: what is left of a stop when nobody but the file system is between the two sides.

The driver, another terminal or a batch system writes the file; rank 0 looks for it a few times a second. It needs no
actor and no connection, so it works when those are what failed.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path

from brainenc import atomic
from brainenc.guard.messages import Order, StepGuard
from brainenc.train.run_folder import RunFolder

LOOK_EVERY_S = 0.25
"""A look at a local file takes microseconds, at one on a network mount milliseconds."""


def order_file(folder: RunFolder) -> Path:
    """Where an order lies."""
    return folder.path / ".order.json"


def give(folder: RunFolder, kind: str, reason: str) -> None:
    """Order ``stop``, ``shrink`` or ``checkpoint``; heard within a second or a step."""
    atomic.replace(order_file(folder), json.dumps({"kind": kind, "reason": reason, "at": time.time()}).encode())


def clear(folder: RunFolder) -> None:
    """Forget what was ordered."""
    with contextlib.suppress(FileNotFoundError):
        order_file(folder).unlink()


class WithOrders:
    """A guard that also hears orders from the run folder. Rank 0, training thread.

    Args:
        inner: the guard that everything else is passed on to.
        folder: the run.
        clock: seconds, monotonic.
    """

    def __init__(self, inner: StepGuard, folder: RunFolder, clock: Callable[[], float] = time.monotonic) -> None:
        self._inner, self._file, self._folder, self._clock = inner, order_file(folder), folder, clock
        self._looked = -LOOK_EVERY_S
        self._order: Order | None = None

    def pending(self) -> Order | None:
        """What the inner guard says, else what lies in the run folder."""
        return self._inner.pending() or self._found()

    def _found(self) -> Order | None:
        now = self._clock()
        if self._order is None and now - self._looked >= LOOK_EVERY_S:
            self._looked = now
            with contextlib.suppress(OSError, ValueError, KeyError):
                found = json.loads(self._file.read_bytes())
                self._order = Order(kind=found["kind"], reason=str(found["reason"]))
        return self._order

    def beat(self, *, epoch: int, step: int) -> None:
        """Passed on."""
        self._inner.beat(epoch=epoch, step=step)

    def reserve(self, n_bytes: int, what: str) -> None:
        """Passed on."""
        self._inner.reserve(n_bytes, what)

    def saved(self, *, path: str, step: int, epoch: int, error: str = "") -> None:
        """Passed on; an order from the folder is done with, and a stop stays until the run is started again."""
        if self._order is not None and self._order.kind != "stop":
            clear(self._folder)
            self._order = None
        self._inner.saved(path=path, step=step, epoch=epoch, error=error)

    def computing(self) -> contextlib.AbstractContextManager[None]:
        """Passed on."""
        return self._inner.computing()

    def updating(self) -> contextlib.AbstractContextManager[None]:
        """Passed on."""
        return self._inner.updating()
