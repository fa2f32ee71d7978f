"""For what must not end because something beside it failed: that is logged, once for each kind, and it goes on.

The guard's threads, and training, which is worth more than a line about it.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

log = logging.getLogger(__name__)


class Endurance:
    """Of one thread. A guard that ended silently, because a callback of somebody else failed, would guard nothing.
    Only an :class:`Exception` is borne: who asks to stop is heard.

    Args:
        who: for the log.
    """

    def __init__(self, who: str) -> None:
        self._who = who
        self._told: set[tuple[str, type[Exception]]] = set()

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Go on after whatever fails inside; logged with its traceback the first time that ``what`` fails so."""
        try:
            yield
        except Exception as error:
            kind = (what, type(error))
            if kind not in self._told:
                self._told.add(kind)
                log.exception("%s goes on, although %s failed; told once.", self._who, what)
