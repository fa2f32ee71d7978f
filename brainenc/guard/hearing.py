"""How a plain script hears its watcher and those who ask it to stop: by signals in the main thread, else by a thread.

A Python signal handler runs in the main thread between two of its instructions: whatever that thread was allocating
stands still while the handler works, which is why a save on the spot wins races that a save in a thread loses.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from brainenc.endurance import Endurance
from brainenc.guard import signals
from brainenc.guard.messages import OutOfTime
from brainenc.guard.watcher import WAKE_SIGNAL, Watcher, WatcherSettings, wait_readable


class Hearing:
    """A watcher, and the two ways to be woken by it. Runs in the script's process.

    Args:
        settings: of the watcher; how it wakes is decided here.
        heard: called with every message; in the main thread, or in the listening thread where there is no signal.
        act: called after messages that came unasked. In the main thread it may save and raise; in the listening
            thread it returns True when the script must be interrupted.
        stop: called in the main thread for SIGTERM and SIGINT with the signal's number.
    """

    def __init__(
        self, settings: Callable[[bool], WatcherSettings], *, heard: Callable[[dict[str, Any]], None],
        act: Callable[[], bool], stop: Callable[[int], None],
    ) -> None:  # fmt: skip
        self._heard, self._act, self._stop = heard, act, stop
        self._owner, self._pid = threading.get_ident(), os.getpid()
        self._undo: list[Callable[[], None]] = []
        self._inside = self._again = False
        self._endurance = Endurance("The memory guard")
        main = signals.in_main_thread()
        self.by_signal = main and bool(WAKE_SIGNAL)
        if self.by_signal:
            self._undo.append(signals.take(WAKE_SIGNAL, self._on_wake))
        for number in signals.STOP_SIGNALS if main else ():
            self._undo.append(signals.take(number, self._on_stop))
        self._watcher: Watcher | None = None
        try:
            self._watcher = Watcher(settings(self.by_signal))
        except BaseException:
            self.close()  # nobody else could give the signals back
            raise
        self._thread: threading.Thread | None = None
        if not self.by_signal:
            self._thread = threading.Thread(target=self._listen, name="memory-guard", daemon=True)
            self._thread.start()

    def listen(self) -> None:
        """Take what has been said since the last time; starts a watcher again that died or hangs."""
        if self._thread is None:
            self._read()
            if self._watcher is not None and not self._watcher.alive:
                with self._endurance.doing("starting the watcher again"):
                    self._watcher.restart()

    def tell(self, **message: Any) -> None:
        """Say something to the watcher."""
        if self._watcher is not None:
            self._watcher.tell(**message)

    def wait_for_watcher(self, patience_s: float) -> None:
        """Until it has said its first word, or so many seconds have passed."""
        until = time.monotonic() + patience_s
        while self._watcher is not None and not self._watcher.spoken and time.monotonic() < until:
            self.listen()
            time.sleep(0.01)

    @property
    def watcher_pid(self) -> int:
        """Of the watcher process; 0 after :meth:`close`."""
        return self._watcher.pid if self._watcher is not None else 0

    def close(self) -> None:
        """End the watcher, then give the signals back: in this order no wake-up finds another's handler."""
        if os.getpid() != self._pid:
            return  # a forked child: nothing of this is its own
        watcher, self._watcher = self._watcher, None
        if watcher is not None:
            watcher.close()
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()

    def _read(self) -> None:
        """Messages to ``heard``. A signal that comes while reading is not lost, and does not read in between."""
        if self._inside:
            self._again = True
            return
        self._inside = True
        try:
            while True:
                self._again = False
                for message in self._watcher.read() if self._watcher is not None else ():
                    self._heard(message)
                if not self._again:
                    return
        finally:
            self._inside = False

    def _on_wake(self, _number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return
        if self._inside:  # listen() is at it: it reads again
            self._again = True
            return
        self._read()
        self._act()

    def _on_stop(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() == self._pid:
            self._stop(number)
        elif number != signal.SIGINT:  # a forked child (a loader worker): as if it had never inherited this handler
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        # Ctrl-C goes to the whole group: its children stay until the script has saved and ends them itself.

    def _listen(self) -> None:
        """The thread where no signal can be had; interrupts the training thread once, when ``act`` says so."""
        interrupted = False
        while (watcher := self._watcher) is not None:
            with self._endurance.doing("waiting for the watcher"):
                self._wait(watcher)
            with self._endurance.doing("hearing the watcher"):
                self._read()
            if not watcher.alive and self._watcher is not None:
                with self._endurance.doing("starting the watcher again"):
                    watcher.restart()
            with self._endurance.doing("acting"):
                if not interrupted and self._act():
                    interrupted = True
                    raise_in(self._owner, OutOfTime)

    def _wait(self, watcher: Watcher) -> None:
        try:
            if os.name != "nt":  # there, reading waits by itself
                wait_readable([watcher.fileno()], 0.2)
        except (OSError, ValueError):
            if self._watcher is not None:  # else it was closed while we waited
                time.sleep(0.2)
                raise


def raise_in(thread: int, kind: type[BaseException]) -> None:
    """Raise in another thread, at its next instruction; code inside a C call ends that first."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(kind))
