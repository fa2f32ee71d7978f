"""Glances: between two full looks at memory, one number every 10 ms.

This is what the watcher does for hours beside a training that works near its limit, so it is done in C where the
package could be built with a compiler, at half of the price.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable


def in_python(
    inbox: int, nap_s: float, fd: int, until: float, low: int, high: int, *,
    sleep: Callable[[float], object] = time.sleep, clock: Callable[[], float] = time.monotonic,
) -> list[tuple[float, int]]:  # fmt: skip
    """Sleep and read, again and again: until the time is up, or the number leaves its band.

    Args:
        inbox: a pipe: nothing is done when a message waits there. -1 for none.
        nap_s: seconds between two glances.
        fd: a file that holds one number.
        until: end at this time of ``clock``.
        low: the least that the number may be.
        high: the most.

    Returns:
        when it was read, and the number, for each glance but the one that ended them.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no number.
    """
    seen: list[tuple[float, int]] = []
    read = os.pread  # after each sleep no cache holds anything: every name that is looked up costs
    if inbox >= 0 and select.select([inbox], [], [], 0)[0]:
        return seen
    while True:
        sleep(nap_s)
        now = clock()
        if now >= until:
            return seen
        number = int(read(fd, 32, 0))
        if not low <= number <= high:
            return seen
        seen.append((now, number))


try:
    from brainenc.guard._glances import glances as glances
except ImportError:  # installed without a compiler, or not on Linux
    glances = in_python

COMPILED = glances is not in_python
