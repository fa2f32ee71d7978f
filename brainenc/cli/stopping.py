"""SIGTERM to a command that could be asked to stop before its work has begun, or after it has ended."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from brainenc.guard import signals

RESUMABLE = ("extract", "train")
"""Commands that the same command line goes on with. While they work they have a handler of their own."""


class StopRequested(BaseException):
    """SIGTERM outside the work. Not an :class:`Exception`: half of it comes while libraries try imports."""


@contextmanager
def stoppable(argv: Sequence[str]) -> Iterator[None]:
    """Around one command line: SIGTERM raises :class:`StopRequested` where no handler of the work is installed."""
    command = next((word for word in argv if not word.startswith("-")), "")
    if command not in RESUMABLE:
        yield
        return
    with signals.handling(_stop, signal.SIGTERM):
        yield


def _stop(number: int, _frame: FrameType | None) -> None:
    raise StopRequested(signals.name(number))
