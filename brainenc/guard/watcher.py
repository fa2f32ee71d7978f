"""The worker's side of the watcher process: start it, hear it, tell it, start it again, end it."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from brainenc.guard.brake import own_limit
from brainenc.guard.policy import Thresholds, Timing
from brainenc.guard.updating import UpdatingFlag
from brainenc.guard.watcher_process import read_lines

log = logging.getLogger(__name__)

WAKE_SIGNAL: int = getattr(signal, "SIGURG", 0)
"""Ignored by default, so that one that comes late kills nobody; used by hardly any program."""

SILENT_S = 5.0
"""A watcher says what it reads once a second: one that was not heard for so long hangs."""
STARTING_S = 60.0
"""So long the first word may take: Python's own files may lie on a slow network mount."""
DRILL_WAITS_S = 20.0
"""A drill waits so long for a watcher that is still starting: a short run would be over before anybody has seen it."""
_AGAIN_S = 1.0
_PASSES = {"wake_after", "inject", "unbrake"}
"""What is said of the next moments only."""

_PROGRAM = """
import json, sys
sys.path.append(sys.argv[2])
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
    brake: bool = True
    """Keep this process from growing while there is no time left: allocations then fail instead."""
    by_signal: bool = False
    """Wake this process's main thread by a signal; else only through the pipe."""
    flag: UpdatingFlag | None = None
    """Up while the weights are being overwritten: the brake waits for that."""


class Watcher:
    """A watcher process beside this one. One thread at a time may use it.

    Args:
        settings: what it needs to know.
    """

    def __init__(self, settings: WatcherSettings) -> None:
        self._settings = settings
        self._rest = b""
        self.restarts = 0
        self._heard_at, self._spoken = time.monotonic(), False
        self._tried_at = float("-inf")
        self._left: list[subprocess.Popen[bytes]] = []
        """Killed, but not gone yet: what waits for a dead disk cannot even be killed."""
        self._own_limit = own_limit()
        self._told: dict[str, Any] = {}
        """What still holds of what it was told: one that is started again must hear it as well."""
        self._drills: dict[str, tuple[float, float]] = {}
        """Meter -> the fraction that it is to read, and until when."""
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
        """The process runs, and was heard lately: to be asked after :meth:`read`."""
        silent = time.monotonic() - self._heard_at
        return self._process.poll() is None and silent < (SILENT_S if self._spoken else STARTING_S)

    @property
    def spoken(self) -> bool:
        """It has started and said so: to be asked after :meth:`read`."""
        return self._spoken

    def read(self) -> list[dict[str, Any]]:
        """What it has said since the last call; at once. ``kind`` is started, reading, decision, overdue."""
        try:
            data = os.read(self.fileno(), 65536)
        except (BlockingIOError, ValueError):  # nothing there; or closed
            return []
        if data:
            self._heard_at, self._spoken = time.monotonic(), True
        messages, self._rest = read_lines(self._rest + data)
        return list(messages)

    def tell(self, **message: Any) -> None:
        """Say something: ``timing``, ``slack``, ``uuids``, ``inject``, ``wake_after``, ``unbrake``. A watcher that is
        dead, or hangs and has its pipe full, does not hear; nobody waits for it. One that is started in its place does.
        """
        self._told |= {key: value for key, value in message.items() if key not in _PASSES}
        if "inject" in message:
            drill = message["inject"]
            self._drills[drill["meter"]] = (drill["fraction"], time.monotonic() + drill["seconds"])
        self._write(message)

    def _write(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError):  # shorter than a pipe's atomic write: written whole, or not
            os.write(self._process.stdin.fileno(), json.dumps(message).encode() + b"\n")

    def restart(self) -> None:
        """Start a new process in the place of one that died or hangs; at most once a second.

        Raises:
            OSError: it could not be started; to be tried again.
        """
        if (now := time.monotonic()) - self._tried_at < _AGAIN_S:
            return
        self._tried_at = now
        code = self._process.poll()
        self._end(patience_s=0.0)
        self.restarts += 1
        log.warning(
            "The memory watcher %s and is started again (start %d).",
            f"died (exit code {code})" if code is not None else "was not heard any more", self.restarts + 1,
        )  # fmt: skip
        self._rest = b""
        self._process = self._start()
        self._heard_at, self._spoken = now, False
        self._write(self._told)
        for meter, (fraction, until) in self._drills.items():
            self._write({"inject": {"meter": meter, "fraction": fraction, "seconds": max(0.0, until - now)}})

    def close(self) -> None:
        """End the process. It ends by itself when this one does."""
        self._end(patience_s=2.0)

    def _end(self, patience_s: float) -> None:
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        if not _ended(process, patience_s):
            process.kill()
            if not _ended(process, patience_s):
                self._left.append(process)
        self._left = [left for left in self._left if left.poll() is None]
        process.stdout.close()
        if self._own_limit is not None and own_limit() != self._own_limit:
            own_limit(self._own_limit)  # the watcher had the brake on

    def _start(self) -> subprocess.Popen[bytes]:
        number = WAKE_SIGNAL if self._settings.by_signal else 0
        flag = self._settings.flag.fd if self._settings.flag is not None else -1
        settings = {
            "parent": os.getpid(), "signal": number, "thresholds": asdict(self._settings.thresholds),
            "policy": self._settings.policy, "timing": self._settings.timing._asdict(),
            "brake": self._settings.brake,
            "uuids": None if self._settings.uuids is None else list(self._settings.uuids), "flag": flag,
        }  # fmt: skip
        # -P: the script's folder may hold a `signal.py` of the user's own. -S -s -E: no site-packages, whose start-up
        # files cost more time and memory than everything else here; elsewhere than on Linux psutil is needed, which
        # lies there.
        flags = ["-P", "-S", "-s", "-E"] if sys.platform == "linux" else ["-P"]
        process = subprocess.Popen(
            [sys.executable, *flags, "-c", _PROGRAM, json.dumps(settings), _ROOT],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
            pass_fds=[flag] if flag >= 0 else [],
            start_new_session=True,  # Ctrl-C and Slurm's signals go to process groups; this one ends after us
        )  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError, AttributeError):  # on Windows they stay blocking
                os.set_blocking(pipe.fileno(), False)
        return process


def _ended(process: subprocess.Popen[bytes], patience_s: float) -> bool:
    """Whether it has, after waiting for it at most so long."""
    try:
        process.wait(timeout=patience_s)
    except subprocess.TimeoutExpired:
        return False
    return True


def wait_readable(fds: Sequence[int], pause_s: float) -> set[int]:
    """Those of ``fds`` that can be read from, after at most so long. A process may have more than 1024 files open,
    which is where ``select`` ends.

    Raises:
        OSError, ValueError: one of them is not open.
    """
    if not hasattr(select, "poll"):
        return set(select.select(fds, [], [], pause_s)[0])
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    found = dict(poll.poll(max(0, round(pause_s * 1000))))
    if any(events & select.POLLNVAL for events in found.values()):
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    return set(found)
