"""The figures of extractions in a file, beside the guard's record: also where nobody listens to Ray's metrics."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from brainenc.extract.config import ExtractProgress
from brainenc.records import JsonLines

EVERY_S = 5.0
MOST_BYTES = 4 << 20
"""A day of one extraction; the file then begins anew, and the one before it is kept until the next time."""


class Figures:
    """Appends to ``metrics.jsonl``. Driver only; one thread at a time. No run waits for it or fails for it.

    Args:
        folder: where the file lies; made if absent.
        every_s: seconds between two lines; what comes sooner is passed over.
        most_bytes: of the file, and of the one before it (``metrics.1.jsonl``).
        clock: seconds since 1970.
    """

    def __init__(
        self, folder: Path, *, every_s: float = EVERY_S, most_bytes: int = MOST_BYTES,
        clock: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        self.path = folder / "metrics.jsonl"
        self._every_s, self._most_bytes, self._clock = every_s, most_bytes, clock
        self._began = self._written = clock()
        self._last: ExtractProgress | None = None

    def take(self, shown: ExtractProgress) -> None:
        """Note the figures of this moment; write them if it is time."""
        self._last = shown
        if self._clock() - self._written >= self._every_s:
            self._write()

    def close(self) -> None:
        """Write the last ones, if they are not written yet."""
        self._write()

    def _write(self) -> None:
        if self._last is None:
            return
        figures = asdict(self._last)
        figures.pop("note")  # of one moment; the account of what happened is the guard's
        self._written = self._clock()
        self._last = None
        with contextlib.suppress(OSError):  # a full disk, or a home folder that cannot be written
            self._begin_anew_if_full()
            lines = JsonLines(self.path)
            try:
                lines.write(kind="extraction", at=self._written, began=self._began, **figures)
            finally:
                lines.close(flush=False)  # worth no wait for the disk

    def _begin_anew_if_full(self) -> None:
        if self.path.exists() and self.path.stat().st_size >= self._most_bytes:
            self.path.replace(self.path.with_name("metrics.1.jsonl"))
