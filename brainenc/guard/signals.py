"""Signal handlers: taken for a while, given back afterwards. The one place where the package installs any.

Python delivers signals to the main thread alone; elsewhere all of this does nothing.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
"""What asks a process to end: Slurm, `ray job stop`, `kill`; and Ctrl-C."""

Handler = Callable[[int, FrameType | None], None]


def in_main_thread() -> bool:
    """May this thread install handlers?"""
    return threading.current_thread() is threading.main_thread()


def take(number: int, handler: Handler) -> Callable[[], None]:
    """Install a handler; returns what puts the earlier one back. Main thread.

    System calls that it interrupts are not restarted by the system, as with any handler of Python's: a wait for a lock
    (``queue.get()``, ``join()``) would else never let the handler run.
    """
    before = signal.signal(number, handler)

    def undo() -> None:  # None: installed from C, by something that Python cannot give back
        signal.signal(number, signal.SIG_DFL if before is None else before)

    return undo


@contextmanager
def handling(handler: Handler, *numbers: int) -> Iterator[None]:
    """Handle signals (SIGTERM and SIGINT unless others are named) while inside, where this is the main thread."""
    undo = [take(number, handler) for number in numbers or STOP_SIGNALS] if in_main_thread() else []
    try:
        yield
    finally:
        for put_back in undo:
            put_back()


@contextmanager
def deaf_to_children() -> Iterator[None]:
    """While inside, nothing is raised because a child has died: torch's handler does for a loader's worker, wherever
    the main thread is, also in the middle of a save."""
    numbers = [signal.SIGCHLD] if hasattr(signal, "SIGCHLD") and in_main_thread() else []
    undo = [take(number, lambda *_: None) for number in numbers]
    try:
        yield
    finally:
        for put_back in undo:
            put_back()


@contextmanager
def asked_to_stop(ask: Callable[[int], None]) -> Iterator[None]:
    """SIGTERM and SIGINT call ``ask`` with their number while inside; a SIGINT after any of them ends at once.

    Raises:
        KeyboardInterrupt: by that second one.
    """
    asked: list[int] = []

    def handler(number: int, _frame: FrameType | None) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)
        ask(number)

    with handling(handler):
        yield


@contextmanager
def keeping() -> Iterator[None]:
    """Put back the handlers of SIGTERM and SIGINT that something inside replaces: ``ray.init`` does."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items() if in_main_thread() else ():
            if handler is not None:
                signal.signal(number, handler)


def name(number: int) -> str:
    """``"SIGTERM"``."""
    return signal.Signals(number).name
