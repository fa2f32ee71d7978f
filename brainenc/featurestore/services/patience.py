"""How long and how often a remote place is asked again.

Clients bring retries of their own (gcsfs waits 1, 2, 4, 8, 16 s, some 33 s a request) that have no deadline over all
and do not retry everything that passes by itself. What is here goes around them: a time limit for each try, backoff
with jitter between tries, and a deadline for the whole call.
"""

from __future__ import annotations

import contextlib
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from brainenc.errors import TransferFailed
from brainenc.redact import redact

log = logging.getLogger(__name__)
T = TypeVar("T")

_QUICK_RATE = 1e7  # bytes a second, below which a transfer is worth a word
_TOLD_EVERY_S = 30.0  # for all calls of a process together
_told = [-_TOLD_EVERY_S]

_ANSWERED = (FileNotFoundError, FileExistsError)
_CLIENTS = {"aiohttp", "aiobotocore", "botocore", "fsspec", "gcsfs", "google", "requests", "urllib3", "s3fs"}
_PASSING_STATUS = {408, 409, 425, 429, 500, 502, 503, 504}
_HOPELESS = {"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError", "ParamValidationError"}
_DAMAGED = ("doesn't match calculated", "BadDigest", "XAmzContent", "ChecksumMismatch")


@dataclass(frozen=True, kw_only=True, slots=True)
class Patience:
    """Time limits of a remote place, in seconds."""

    deadline_s: float = 180.0
    """For one call, with all its tries."""
    try_s: float = 75.0
    """For one try; more is given for bodies, at `slowest_rate`."""
    slowest_rate: float = 1e6
    """Bytes a second below which a transfer counts as stuck."""
    connect_s: float = 10.0
    """Until a connection stands."""
    silence_s: float = 30.0
    """Without a byte: a server that hangs is dropped after this and asked again."""
    first_wait_s: float = 0.25
    """Before the second try; doubles from there, with jitter."""
    longest_wait_s: float = 20.0
    """Between two tries."""
    notice_s: float = 4.0
    """Without an answer, after which the user is told that we wait and try again."""
    clock: Callable[[], float] = time.monotonic
    """Injected by tests."""
    sleep: Callable[[float], None] = time.sleep
    """Injected by tests."""

    def limit(self, n_bytes: int = 0) -> float:
        """Seconds that one try may take with a body of ``n_bytes``."""
        return self.try_s + n_bytes / self.slowest_rate

    def call(self, what: str, action: Callable[[float], T], *, n_bytes: int = 0) -> T:
        """Run ``action(time_limit)`` until it answers.

        Args:
            what: for the message, e.g. ``"reading gs://lab/x"``.
            action: raises what the client raises; must be safe to repeat.
            n_bytes: size of the body, which lengthens the limits.

        Raises:
            TransferFailed: no answer before the deadline, or an error that another try would not mend.
            OSError: ``FileNotFoundError``, ``FileExistsError``: answers, passed on.
        """
        with self.noticed(what, n_bytes) as failures:
            return self._call(what, action, n_bytes, failures)

    @contextlib.contextmanager
    def noticed(self, what: str, n_bytes: int = 0) -> Iterator[list[str]]:
        """Say so while the body takes long: what hangs must not be silent for minutes.

        Yields:
            a list to put the reasons of failed tries into; the last is told.
        """
        failures: list[str] = []
        after = self.notice_s + n_bytes / _QUICK_RATE
        timer = threading.Timer(after, _tell, (what, after, self.deadline_s + n_bytes / self.slowest_rate, failures))
        timer.daemon = True
        timer.start()
        try:
            yield failures
        finally:
            timer.cancel()

    def _call(self, what: str, action: Callable[[float], T], n_bytes: int, failures: list[str]) -> T:
        started, wait, tries = self.clock(), self.first_wait_s, 0
        deadline = started + self.deadline_s + n_bytes / self.slowest_rate
        while True:
            tries += 1
            try:
                return action(max(0.1, min(self.limit(n_bytes), deadline - self.clock())))
            except _ANSWERED:
                raise
            except Exception as error:
                pause = wait * (0.5 + random.random())
                if not is_foreign(error):
                    raise
                if not is_passing(error) or self.clock() + pause >= deadline:
                    raise _failed(what, error, tries, self.clock() - started) from None
                failures.append(_detail(error))
            self.sleep(pause)
            wait = min(2 * wait, self.longest_wait_s)


def _tell(what: str, after_s: float, deadline_s: float, failures: list[str]) -> None:
    if time.monotonic() - _told[0] >= _TOLD_EVERY_S:
        _told[0] = time.monotonic()
        why = f" ({failures[-1]})" if failures else ""
        log.warning("%s: no answer for %.0f s%s; trying again, for up to %.0f s in all.",
                    what, after_s, why, deadline_s)  # fmt: skip


def is_foreign(error: BaseException) -> bool:
    """Whether an error came from the network or its clients, and is none of our own mistakes."""
    known = isinstance(error, OSError | EOFError | TimeoutError)
    return known or type(error).__module__.split(".")[0] in _CLIENTS or str(error).startswith("Bad Request")


def is_passing(error: BaseException) -> bool:
    """Whether another try may succeed where this error came up."""
    if type(error).__name__ in _HOPELESS or isinstance(error, PermissionError):
        return False
    text = str(error)
    if any(word in text for word in _DAMAGED):  # the bytes were damaged on their way up; the server refused them
        return True
    if text.startswith(("Forbidden", "Bad Request")):  # gcsfs's words for 403 and 400
        return False
    status = _status(error)
    return status is None or status in _PASSING_STATUS


def _status(error: BaseException) -> int | None:
    """The HTTP status in an error of gcsfs, aiohttp or botocore (which s3fs hangs on as the cause)."""
    for candidate in (error, error.__cause__):
        answer = getattr(candidate, "response", None)
        if isinstance(answer, dict):
            return int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)) or None
        for name in ("code", "status"):
            value = getattr(candidate, name, None)
            if str(value).isdigit():
                return int(str(value))
    return None


def _detail(error: BaseException) -> str:
    return redact(f"{type(error).__name__}: {error}".rstrip(": "))


def _failed(what: str, error: BaseException, tries: int, seconds: float) -> TransferFailed:
    # Without the original as its cause: a traceback would print it, and clients quote addresses with keys in them.
    detail = _detail(error)
    again = (
        "the same command goes on where it stopped" if is_passing(error) else "check the address and the permissions"
    )
    return TransferFailed(
        f"{what} failed after {tries} {'try' if tries == 1 else 'tries'} in {seconds:.0f} s ({detail}); {again}."
    )
