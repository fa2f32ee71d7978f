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


def take(number: int, handler: Handler, *, restart: bool = False) -> Callable[[], None]:
    """Install a handler; returns what puts the earlier one back. Main thread.

    Args:
        number: of the signal.
        handler: for it.
        restart: system calls that it interrupts go on, for libraries that know no EINTR; a wait for a lock then ends
            no sooner for it.
    """
    before = signal.signal(number, handler)
    if restart and hasattr(signal, "siginterrupt"):
        signal.siginterrupt(number, False)

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
