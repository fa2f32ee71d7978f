"""Which bytes a list of rows means, and their parallel copy into one buffer."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

_PIECE_BYTES = 8 << 20
"""A run of neighbouring rows is cut into pieces of about this, so that threads share a long one."""
T = TypeVar("T")
_MAX_THREADS = 8  # beyond this the memory bus is the limit on the machines measured


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring rows of one shard that go to neighbouring rows of the buffer."""

    shard: int
    row: int
    """First row within the shard."""
    count: int
    target: int
    """First row of the buffer."""


def runs(rows: np.ndarray, rows_per_shard: int, row_bytes: int, targets: np.ndarray | None = None) -> list[Run]:
    """Cut a list of rows of a collection, in the order wanted, into runs.

    Args:
        rows: of the collection.
        rows_per_shard: of the collection.
        row_bytes: bytes of one row.
        targets: rows of the buffer, one for each of ``rows``; None: 0, 1, 2 ...
    """
    if not len(rows):
        return []
    shards, local = np.divmod(rows, rows_per_shard)
    targets = np.arange(len(rows)) if targets is None else targets
    longest = max(1, _PIECE_BYTES // max(row_bytes, 1))
    breaks = np.flatnonzero((np.diff(rows) != 1) | (np.diff(shards) != 0) | (np.diff(targets) != 1)) + 1
    starts = np.concatenate([[0], breaks])
    ends = np.concatenate([breaks, [len(rows)]])
    return [
        Run(int(shards[at]), int(local[at]), int(min(longest, end - at)), int(targets[at]))
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True)
        for at in range(start, end, longest)
    ]


def default_threads() -> int:
    """As many as this process may run on, up to eight."""
    if hasattr(os, "sched_getaffinity"):
        return min(len(os.sched_getaffinity(0)), _MAX_THREADS)
    return min(os.cpu_count() or 1, _MAX_THREADS)


class _Pool:
    """One pool of threads a process, made on first use and made anew after a fork, where threads do not survive."""

    def __init__(self, name: str) -> None:
        self._name, self._size = name, 0
        self._executor: ThreadPoolExecutor | None = None
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forget)

    def get(self, threads: int) -> ThreadPoolExecutor:
        if self._executor is None or self._size < threads:
            self._executor = ThreadPoolExecutor(threads, thread_name_prefix=self._name)
            self._size = threads
        return self._executor

    def _forget(self) -> None:
        self._executor, self._size = None, 0


readers = _Pool("brainenc-gather")
fetchers = _Pool("brainenc-fetch")


def in_parallel(copy: Callable[[T], None], todo: Sequence[T], threads: int) -> None:
    """Call ``copy`` for every item, on this thread and ``threads - 1`` others; the first failure is raised."""
    threads = min(threads, len(todo))
    if threads <= 1:
        for item in todo:
            copy(item)
        return
    feed = iter(todo)  # next() of a list's iterator is one step under the interpreter's lock: threads may share it

    def work() -> None:
        for item in feed:
            copy(item)

    others = [readers.get(threads - 1).submit(work) for _ in range(threads - 1)]
    try:
        work()
    finally:
        failures = [error for error in (other.exception() for other in others) if error is not None]
    if failures:
        raise failures[0]
