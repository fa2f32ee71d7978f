"""Glances at memory: the loop that sleeps and reads, and does nothing else while nothing moves.

This is what the watcher does for hours beside a training that works near its limit, every 10 ms, so it is done in C
where the package could be built with a compiler.
"""

from __future__ import annotations

import errno
import os
import select
import time
from collections.abc import Callable
from typing import NamedTuple

CONTRACT = 2
"""Of :func:`glances`, as in ``_glances.c``: an extension of another one is not used."""
_LISTEN_EVERY_S = 0.1
_LONG_NAP_S = 0.05
MOST_TEXTS = 16
Glance = tuple[float, *tuple[int, ...]]
"""When, and the sum of each text."""
Fields = tuple[tuple[bytes, int], ...]
"""What each number of a text begins with at the start of its line, and how many times it counts."""


class Text(NamedTuple):
    """A file of the kernel's with a number on each line, and between which values their sum is nothing new."""

    fd: int
    low: int
    high: int
    offset: int
    fields: Fields


class Gauge(NamedTuple):
    """Where bytes used can be read at the price of a glance: numbers of a text, and what to add to their sum."""

    fd: int
    offset: int
    fields: Fields

    def read(self) -> int:
        """As a glance reads it."""
        return self.offset + total(os.pread(self.fd, 16383, 0), self.fields)

    def within(self, low: int, high: int) -> Text:
        """To be glanced at; from ``low`` to ``high`` it is nothing new."""
        return Text(self.fd, low, high, self.offset, self.fields)


def total(text: bytes, fields: Fields) -> int:
    """The sum of the numbers that are listed, each as often as it counts."""
    text, found = b"\n" + text, 0
    for name, weight in fields:
        start = text.find(b"\n" + name)
        if start >= 0:
            start += 1 + len(name)
            end = text.find(b"\n", start)
            found += weight * int((text[start : end if end >= 0 else None].split(None, 1) or [b""])[0])
    return found


def in_python(
    inbox: int, nap_s: float, until: float, texts: tuple[Text, ...], *,
    sleep: Callable[[float], object] = time.sleep, clock: Callable[[], float] = time.monotonic,
) -> list[Glance]:  # fmt: skip
    """Sleep and read, again and again: until the time is up, or a sum leaves its band, or somebody speaks.

    Args:
        inbox: a pipe; a message ends it within a tenth of a second. -1 for none.
        nap_s: seconds between two glances.
        until: end at this time of ``clock``.
        texts: at least one, at most 16.

    Returns:
        when they were read, and each text's sum with its offset, for each glance at which nothing was new. In C, not
        more than 128 of them.

    Raises:
        OSError: a file cannot be read, or is empty.
        ValueError: a name is not followed by a number (in C it counts as 0).
    """
    seen: list[Glance] = []
    now, listened, read = clock(), float("-inf"), os.pread
    while True:
        nap = min(nap_s, max(0.0, until - now))
        # Waiting for the pipe is a tenth dearer than sleeping, which counts where there are a hundred naps a second.
        listens = inbox >= 0 and (nap >= _LONG_NAP_S or now >= listened + _LISTEN_EVERY_S)
        if listens:
            if select.select([inbox], [], [], nap)[0]:
                return seen
            listened = now
        else:
            sleep(nap)
        now = clock()
        if now >= until:
            return seen
        found: list[int] = []
        for text in texts:
            content = read(text.fd, 16383, 0)
            if not content:
                raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))
            found.append(text.offset + total(content, text.fields))
            if not text.low <= found[-1] <= text.high:
                return seen
        seen.append((now, *found))


glances: Callable[[int, float, float, tuple[Text, ...]], list[Glance]] = in_python
WHY_NOT_COMPILED = ""
"""Empty where the loop in C is used."""
try:
    import brainenc.guard._glances as _glances
except ModuleNotFoundError:
    WHY_NOT_COMPILED = "it was not built: installing brainenc takes Linux, a C compiler and Python's headers for it"
except ImportError as error:
    WHY_NOT_COMPILED = f"it cannot be loaded: {error}"
else:
    if getattr(_glances, "CONTRACT", None) == CONTRACT:
        glances = _glances.glances
    else:
        WHY_NOT_COMPILED = "it was built for another version of brainenc; install it again"
