"""An fsspec file system that fails on order, above any other: errors, silent damage, answers lost after the deed.

fs = FaultFS(MemoryFileSystem(), Plan().on("cat_file", "short", times=2).on("pipe_file", "lost"))
place = ObjectPlace("memory://x", service=FsspecService(fs, "/x", atomic_create=True))
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field
from typing import Any

from fsspec.implementations.dirfs import DirFileSystem

LOST, SHORT, FLIP, TORN, KILL = "lost", "short", "flip", "torn", "kill"


@dataclass
class Plan:
    """What happens at which call. Rules are consumed in order; everything else passes."""

    rules: list[tuple[str, str | BaseException, int]] = field(default_factory=list)
    calls: list[tuple[str, str]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def on(self, operation: str, what: str | BaseException, times: int = 1) -> Plan:
        """The next ``times`` calls of ``operation`` go wrong: an error to raise, or LOST, SHORT, FLIP, TORN, KILL."""
        self.rules.append((operation, what, times))
        return self

    def take(self, operation: str, path: str) -> str | None:
        with self.lock:
            self.calls.append((operation, path))
            for position, (name, what, times) in enumerate(self.rules):
                if name == operation and times:
                    self.rules[position] = (name, what, times - 1)
                    break
            else:
                return None
        if what == KILL:
            os._exit(137)
        if isinstance(what, BaseException):
            raise what
        return what

    def count(self, operation: str) -> int:
        return sum(1 for name, _ in self.calls if name == operation)


class FaultFS(DirFileSystem):
    """Whole-object calls only, as a place makes them."""

    protocol = "fault"
    cachable = False

    def __init__(self, fs: Any, plan: Plan, path: str = "/") -> None:
        super().__init__(path=path, fs=fs)
        self.plan = plan

    def cat_file(self, path, start=None, end=None, **kwargs):
        what = self.plan.take("cat_file", path)
        data = super().cat_file(path, start=start, end=end, **kwargs)
        if what == SHORT:
            return data[: len(data) // 2]
        if what == FLIP:
            middle = len(data) // 2
            return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        return data

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        what = self.plan.take("pipe_file", path)
        super().pipe_file(path, value, mode=mode, **kwargs)
        if what == LOST:
            raise ConnectionResetError("the answer was lost")

    def rm_file(self, path):
        what = self.plan.take("rm_file", path)
        super().rm_file(path)
        if what == LOST:
            raise ConnectionResetError("the answer was lost")

    def info(self, path, **kwargs):
        self.plan.take("info", path)
        return super().info(path, **kwargs)
