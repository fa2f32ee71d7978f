"""Orders that reach a loop by other ways than its guard: signals, and a file in the run folder.

The file is what is left of a stop when nobody but the file system is between the two sides: the driver, another
terminal or a batch system writes it, and rank 0 looks for it a few times a second. It needs no actor and no
connection, so it works when those are what failed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from brainenc import atomic
from brainenc.guard import signals
from brainenc.guard.messages import STRENGTH, Order, OrderKind, StepGuard
from brainenc.train.run_folder import RunFolder

log = logging.getLogger(__name__)
LOOK_EVERY_S = 0.25
"""A look at a local file takes microseconds, at one on a network mount milliseconds."""


class Source(Protocol):
    """Somebody who may order something."""

    def pending(self) -> Order | None:
        """What is asked for."""
        ...

    def done(self) -> None:
        """It was done: a checkpoint of it is durable."""
        ...


class FolderOrders:
    """Orders from the run folder. Rank 0, training thread.

    Args:
        folder: the run.
        clock: seconds, monotonic.
    """

    def __init__(self, folder: RunFolder, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder, self._clock = folder, clock
        self._looked = -LOOK_EVERY_S
        self._order: Order | None = None
        self._damaged = b""

    def pending(self) -> Order | None:
        """What lies in the folder."""
        now = self._clock()
        if self._order is None and now - self._looked >= LOOK_EVERY_S:
            self._looked = now
            with contextlib.suppress(OSError):  # nothing there, or a mount that does not answer at the moment
                self._order = self._read(order_file(self._folder).read_bytes())
        return self._order

    def _read(self, data: bytes) -> Order | None:
        """The order in the file; None, told once, where it holds none."""
        try:
            found = json.loads(data)
            kind, reason = found["kind"], str(found["reason"])
            if kind not in STRENGTH:
                raise ValueError(f"there is no order {kind!r}")
        except (ValueError, KeyError, TypeError) as error:
            if data != self._damaged:
                self._damaged = data
                log.warning(
                    "%s holds no order and is ignored (%s: %s). Wanted is for example "
                    '{"kind": "stop", "reason": "enough"}, the kind one of %s.',
                    order_file(self._folder), type(error).__name__, error, ", ".join(STRENGTH),
                )  # fmt: skip
            return None
        return Order(kind=kind, reason=reason)

    def done(self) -> None:
        """A stop stays until the run is started again."""
        if self._order is not None and self._order.kind != "stop":
            clear(self._folder)
            self._order = None


class SignalOrders:
    """SIGTERM and SIGINT as an order to stop, for a loop in the process that gets them.

    Args:
        heard: called once from the loop, with the reason; records it.
    """

    def __init__(self, heard: Callable[[str], None] = lambda reason: None) -> None:
        self._heard = heard
        self._order: Order | None = None
        self._told = False

    def ask(self, number: int) -> None:
        """A signal has arrived."""
        self._order = Order(kind="stop", reason=f"received {signals.name(number)}")

    def pending(self) -> Order | None:
        """The order of a signal that has arrived."""
        if self._order is not None and not self._told:
            self._told = True
            self._heard(self._order.reason)
        return self._order

    def done(self) -> None:
        """A stop stays."""


class Hearing:
    """A guard that also hears other sources. Everything else is passed on.

    Args:
        inner: the guard.
        sources: asked in this order, before the guard.
    """

    def __init__(self, inner: StepGuard, sources: Sequence[Source]) -> None:
        self._inner, self._sources = inner, tuple(sources)

    def pending(self) -> Order | None:
        """The first order of any source, else the guard's."""
        for source in self._sources:
            if (order := source.pending()) is not None:
                return order
        return self._inner.pending()

    def beat(self, *, epoch: int, step: int) -> None:
        """Passed on."""
        self._inner.beat(epoch=epoch, step=step)

    def reserve(self, n_bytes: int, what: str) -> None:
        """Passed on."""
        self._inner.reserve(n_bytes, what)

    def saved(self, *, path: str, step: int, epoch: int, error: str = "") -> None:
        """Passed on, and told to the sources."""
        for source in self._sources:
            source.done()
        self._inner.saved(path=path, step=step, epoch=epoch, error=error)

    def save_takes(self, seconds: float) -> None:
        """Passed on."""
        self._inner.save_takes(seconds)

    def computing(self) -> contextlib.AbstractContextManager[None]:
        """Passed on."""
        return self._inner.computing()

    def updating(self) -> contextlib.AbstractContextManager[None]:
        """Passed on."""
        return self._inner.updating()


def order_file(folder: RunFolder) -> Path:
    """Where an order lies."""
    return folder.path / ".order.json"


def give(folder: RunFolder, kind: OrderKind, reason: str) -> None:
    """Order ``stop``, ``shrink`` or ``checkpoint``; heard within a second or a step."""
    atomic.replace(order_file(folder), json.dumps({"kind": kind, "reason": reason, "at": time.time()}).encode())


def clear(folder: RunFolder) -> None:
    """Forget what was ordered."""
    with contextlib.suppress(FileNotFoundError):
        order_file(folder).unlink()
