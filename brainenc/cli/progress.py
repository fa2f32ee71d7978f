"""Progress of a command: one live line on a terminal, a plain line now and then in a log, objects with ``--json``."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from brainenc.redact import redact
from brainenc.units import format_seconds

LIVE_S = 0.1
"""Shortest time between two redraws of the live line."""
LOG_S = 15.0
"""Shortest time between two lines in a log: an overnight job should leave pages, not megabytes."""
QUICK_S = 2.0
"""What is done sooner leaves no line in a log: its result says it all."""
SETTLED_S = 5.0
"""A rate is one that was watched for so long after the first progress, which waits for everything to start ..."""
SETTLED_SHARE = 0.1
"""... or over this share of the work, whatever it waited for."""


class Progress:
    """Shows how far a command is. Driver only; cheap enough to call for every step.

    Args:
        label: what is being done, e.g. ``"extract"``.
        json_lines: print one object a report instead of text.
        stream: where to; standard error by default, so that results on standard output stay clean.
        clock: seconds, monotonic; a fake one in tests.
    """

    def __init__(
        self,
        label: str,
        *,
        json_lines: bool = False,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._label, self._json, self._clock = label, json_lines, clock
        self._stream = sys.stderr if stream is None else stream
        self._live = self._stream.isatty() and not json_lines
        self._every = LIVE_S if self._live else LOG_S
        self._started = clock()
        self._shown = -float("inf") if self._live or json_lines else self._started - LOG_S + QUICK_S
        self._behind = False
        self._width = 0
        self._first: tuple[float, float] | None = None
        self._moved: tuple[float, float] | None = None
        self._last: tuple[float, float | None, dict[str, Any]] | None = None

    def update(
        self, done: float, total: float | None = None, *, text: Mapping[str, Any] | None = None, **figures: Any
    ) -> None:
        """Say how far it is: ``done`` of ``total``, and figures to show beside it, in this order.

        Args:
            done: how much is done.
            total: of how much, where that is known.
            text: what people read instead of the figures, which programs read.
            figures: numbers; in ``--json`` under these names.
        """
        if not self._json and text is not None:
            figures = dict(text)
        self._last = (done, total, figures)
        now = self._clock()
        if self._first is None or done < self._first[1]:
            self._first, self._moved = (now, done), None
        elif self._moved is None and done > self._first[1]:
            self._moved = now, done
        finished = total is not None and done >= total and (self._live or self._json or now - self._started >= QUICK_S)
        self._behind = now - self._shown < self._every and not finished
        if not self._behind:
            self._shown = now
            self._write(done, total, figures)

    def note(self, text: str) -> None:
        """A line that stays; without credentials."""
        text = redact(text)
        self._clear()
        self._print(json.dumps({"command": self._label, "note": text}) if self._json else text)

    def close(self) -> None:
        """Show the last figures, if they were not shown yet, and end the live line."""
        slow = self._live or self._json or self._clock() - self._started >= QUICK_S
        if self._last is not None and self._behind and slow:
            self._write(*self._last)
        if self._last is not None and self._live:
            self._stream.write("\n")
            self._stream.flush()
        self._behind = False
        self._last, self._width = None, 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, done: float, total: float | None, figures: dict[str, Any]) -> None:
        elapsed = self._clock() - self._started
        if self._json:
            record = {"command": self._label, "done": done, "total": total, "seconds": round(elapsed, 3), **figures}
            self._print(json.dumps(record, default=str))
            return
        line = self._text(done, total, figures, elapsed)
        if self._live:
            self._stream.write("\r" + line.ljust(self._width))
            self._stream.flush()
            self._width = len(line)
        else:
            self._print(line)

    def _text(self, done: float, total: float | None, figures: dict[str, Any], elapsed: float) -> str:
        parts = [f"{self._label}: {done:g}" if total is None else f"{self._label}: {done:g}/{total:g}"]
        if total and done < total:
            parts += [f"{format_seconds((total - done) / rate)} left" for rate in self._rate(done, total)]
        elif total and done >= total:
            parts.append(f"took {format_seconds(elapsed)}")
        return ", ".join(parts + [f"{name.replace('_', ' ')} {_short(value)}" for name, value in figures.items()])

    def _rate(self, done: float, total: float) -> list[float]:
        """Units a second; nothing while that is not known. What was done before this run does not count."""
        assert self._first is not None
        if self._moved is not None and done > self._moved[1] and self._clock() - self._moved[0] >= SETTLED_S:
            since, before = self._moved
        elif done - self._first[1] >= SETTLED_SHARE * (total - self._first[1]):
            since, before = self._first
        else:
            return []
        return [(done - before) / (self._clock() - since)] if self._clock() > since and done > before else []

    def _clear(self) -> None:
        if self._live and self._width:
            self._stream.write("\r" + " " * self._width + "\r")
            self._width = 0

    def _print(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
