"""The worker's side of the watcher process: start it, hear it, tell it, start it again, end it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from brainenc.guard.brake import own_limit
from brainenc.guard.policy import Thresholds, Timing
from brainenc.guard.watcher_process import read_lines

log = logging.getLogger(__name__)

WAKE_SIGNAL: int = getattr(signal, "SIGURG", 0)
"""Ignored by default, so that one that comes late kills nobody; used by hardly any program."""

_PROGRAM = """
import json, sys
sys.path.insert(0, sys.argv[2])
from brainenc.guard.watcher_process import main
main(json.loads(sys.argv[1]))
"""
_ROOT = str(Path(__file__).resolve().parents[2])


@dataclass(frozen=True, kw_only=True, slots=True)
class WatcherSettings:
    """What a watcher process needs to know."""

    thresholds: Thresholds = field(default_factory=Thresholds)
    policy: dict[str, float] = field(default_factory=dict)
    """Fields of :class:`~brainenc.guard.policy.PolicyConfig` other than the thresholds."""
    timing: Timing = field(default_factory=Timing)
    uuids: Sequence[str] | None = ()
    """GPUs to look at: none by default, as others may fill those that this process does not use; None means all."""
    disks: Sequence[str] = ()
    brake: bool = True
    """Keep this process from growing while there is no time left: allocations then fail instead."""
    by_signal: bool = False
    """Wake this process's main thread by a signal; else only through the pipe."""


class Watcher:
    """A watcher process beside this one. One thread at a time may use it.

    Args:
        settings: what it needs to know.
    """

    def __init__(self, settings: WatcherSettings) -> None:
        self._settings = settings
        self._rest = b""
        self.restarts = 0
        self._own_limit = own_limit()
        self._process = self._start()

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def fileno(self) -> int:
        """To wait on until there is something to :meth:`read`."""
        assert self._process.stdout is not None
        return self._process.stdout.fileno()

    @property
    def alive(self) -> bool:
        """The process runs."""
        return self._process.poll() is None

    def read(self) -> list[dict[str, Any]]:
        """What it has said since the last call; at once. ``kind`` is started, reading, decision, overdue."""
        try:
            data = os.read(self.fileno(), 65536)
        except (BlockingIOError, ValueError):  # nothing there; or closed
            return []
        messages, self._rest = read_lines(self._rest + data)
        return list(messages)

    def tell(self, **message: Any) -> None:
        """Say something: ``timing``, ``slack``, ``inject``, ``wake_after``. A dead watcher does not hear."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError):
            os.write(self._process.stdin.fileno(), json.dumps(message).encode() + b"\n")

    def restart(self) -> None:
        """Start a new process in the place of one that died."""
        code = self._process.returncode
        self.close()
        self.restarts += 1
        log.warning(
            "The memory watcher died (exit code %s) and is started again, for the %d. time.", code, self.restarts
        )
        self._rest = b""
        self._process = self._start()

    def close(self) -> None:
        """End the process. It ends by itself when this one does."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        try:
            process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
        if self._own_limit is not None and own_limit() != self._own_limit:
            own_limit(self._own_limit)  # the watcher had the brake on

    def _start(self) -> subprocess.Popen[bytes]:
        number = WAKE_SIGNAL if self._settings.by_signal else 0
        settings = {
            "parent": os.getpid(), "signal": number, "thresholds": asdict(self._settings.thresholds),
            "policy": self._settings.policy, "timing": self._settings.timing._asdict(),
            "brake": self._settings.brake,
            "uuids": None if self._settings.uuids is None else list(self._settings.uuids),
            "disks": [str(d) for d in self._settings.disks],
        }  # fmt: skip
        # -S -s -E: no site-packages, whose start-up files cost more time and memory than everything else here.
        # Elsewhere than on Linux psutil is needed, which lies there.
        flags = ["-S", "-s", "-E"] if sys.platform == "linux" else []
        process = subprocess.Popen(
            [sys.executable, *flags, "-c", _PROGRAM, json.dumps(settings), _ROOT],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
            start_new_session=True,  # Ctrl-C and Slurm's signals go to process groups; this one ends after us
        )  # fmt: skip
        assert process.stdout is not None
        with contextlib.suppress(OSError, AttributeError):
            os.set_blocking(process.stdout.fileno(), False)
        return process
