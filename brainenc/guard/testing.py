"""Fakes for tests of anything that is guarded, and a real memory limit for those that want one."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from brainenc.guard.cgroup import find_mount
from brainenc.guard.messages import CheckpointAck, NullGuard, Order, WorkerReport
from brainenc.guard.policy import Meter

_names = itertools.count()


class FakeClock:
    """A clock that goes on only when it is told to."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> float:
        """Let time pass; returns the new time."""
        self.now += seconds
        return self.now


class FakeSource:
    """Readings that a test writes down: ``FakeSource(limit=1000).rising(100, to=900)`` yields meters."""

    def __init__(self, limit: int, name: str = "ram") -> None:
        self.limit, self.name = limit, name

    def at(self, fraction: float) -> Meter:
        """One reading."""
        return Meter(self.name, int(fraction * self.limit), self.limit)

    def rising(self, rate: float, *, start: float, to: float, every: float) -> Iterator[tuple[float, Meter]]:
        """(seconds, reading), from one fraction to another at ``rate`` bytes a second."""
        for i in itertools.count():
            used = start * self.limit + rate * i * every
            if used > to * self.limit:
                return
            yield i * every, Meter(self.name, int(used), self.limit)


class FakeTree:
    """A machine's ``/proc`` and ``/sys`` below a folder, with control groups of either version.

    Args:
        root: an empty folder.
        total, available: the host's memory, bytes.
    """

    def __init__(self, root: Path, *, total: int = 64 << 30, available: int = 60 << 30) -> None:
        self.root = root
        self.file("proc/meminfo", f"MemTotal: {total >> 10} kB\nMemFree: 1 kB\nMemAvailable: {available >> 10} kB\n")
        (root / "dev/shm").mkdir(parents=True)

    def file(self, path: str, text: str) -> Path:
        """Write one file."""
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        return target

    def v1(
        self, path: str, limits: Mapping[str, int], stat: Mapping[str, int], *, kmem: int = 0, mount_root: str = "/"
    ) -> None:
        """Version 1: this process is in ``path``; ``limits`` gives each group's, the others have none."""
        base = "sys/fs/cgroup/memory"
        self.file("proc/self/mountinfo", f"30 25 0:26 {mount_root} /{base} rw - cgroup cgroup rw,memory\n")
        self.file("proc/self/cgroup", f"9:cpu:/\n4:memory:{path}\n")
        for group in _ancestors(path):
            self.file(f"{base}{group}/memory.limit_in_bytes", str(limits.get(group, 9223372036854771712)))
            self.file(f"{base}{group}/memory.stat", "cache 5\n" + "".join(f"{k} {v}\n" for k, v in stat.items()))
            self.file(f"{base}{group}/memory.kmem.usage_in_bytes", str(kmem))

    def v2(
        self, path: str, limits: Mapping[str, str], stat: Mapping[str, int] | Mapping[str, Mapping[str, int]]
    ) -> None:
        """Version 2. ``limits``: group -> text of ``memory.max``; ``stat``: fields, the same for all or by group."""
        self.file("proc/self/mountinfo", "30 25 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n")
        self.file("proc/self/cgroup", f"0::{path}\n")
        for group in _ancestors(path):
            fields: Any = stat.get(group, stat)
            self.file(f"sys/fs/cgroup{group}/memory.stat", "".join(f"{k} {v}\n" for k, v in fields.items()))
            if group != "/":  # the root group has no limit file
                self.file(f"sys/fs/cgroup{group}/memory.max", limits.get(group, "max") + "\n")


class RecordingLink:
    """Stands for the way to the coordinator: keeps what was sent, answers what the test has put in ``order``."""

    def __init__(self) -> None:
        self.reports: list[WorkerReport] = []
        self.order: Order | None = None
        self.dead = False

    def post(self, report: WorkerReport) -> None:
        """Kept, unless the coordinator is dead."""
        if not self.dead:
            self.reports.append(report)

    def answers(self) -> list[Order]:
        """The order that the test has put there, again and again, as a coordinator does."""
        return [self.order] if self.order is not None and not self.dead else []

    @property
    def acks(self) -> list[CheckpointAck]:
        """The different acknowledgements that were heard, in order."""
        return list(dict.fromkeys(r.ack for r in self.reports if r.ack is not None))


class ScriptedGuard(NullGuard):
    """A :class:`~brainenc.guard.messages.StepGuard` that orders what it is told to, at the step it is told to.

    Args:
        orders: finished step -> order.
    """

    def __init__(self, orders: Mapping[int, Order] | None = None) -> None:
        self.orders = dict(orders or {})
        self.beats: list[tuple[int, int]] = []
        self.acknowledged: list[dict[str, Any]] = []
        self.asked: list[tuple[int, str]] = []
        self._pending: Order | None = None

    def pending(self) -> Order | None:
        """The order of the last step that had one, until it is acknowledged; an order to stop stays."""
        return self._pending

    def beat(self, *, epoch: int, step: int) -> None:
        """Kept in ``beats``."""
        self.beats.append((epoch, step))
        self._pending = self.orders.get(step, self._pending)

    def reserve(self, n_bytes: int, what: str) -> None:
        """Kept in ``asked``, granted."""
        self.asked.append((n_bytes, what))

    def saved(self, *, path: str, step: int, epoch: int, error: str = "") -> None:
        """Kept in ``acknowledged``."""
        self.acknowledged.append({"path": path, "step": step, "epoch": epoch, "error": error})
        if self._pending is not None and self._pending.kind != "stop":
            self._pending = None


class MemoryLimit:
    """A real control group with a memory limit, below this process's own (version 1 or 2; needs root).

    with MemoryLimit(512 << 20) as limit:
        subprocess.Popen(command, preexec_fn=limit.enter)
    """

    def __init__(self, n_bytes: int) -> None:
        mount = find_mount()
        if mount is None:
            raise OSError("this machine has no memory control group")
        self.version, self._bytes = mount.version, n_bytes
        self.folder = mount.group / f"brainenc-{os.getpid()}-{next(_names)}"

    def __enter__(self) -> MemoryLimit:
        self.folder.mkdir()
        if self.version == 1:
            self._write("memory.limit_in_bytes", self._bytes)
            self._write("memory.swappiness", 0)
        else:
            self._write("memory.max", self._bytes)
            with contextlib.suppress(OSError):  # a kernel without swap
                self._write("memory.swap.max", 0)
        return self

    def __exit__(self, *_: object) -> None:
        """End what is left inside, then remove the group."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            for pid in self.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            try:
                self.folder.rmdir()
            except OSError:
                time.sleep(0.02)
            else:
                return
        raise OSError(f"the control group {self.folder} could not be removed")

    def enter(self) -> None:
        """Put the calling process inside: for ``preexec_fn``."""
        self._write("cgroup.procs", os.getpid())

    def processes(self) -> list[int]:
        """Who is inside."""
        return [int(pid) for pid in (self.folder / "cgroup.procs").read_text().split()]

    def oom_kills(self) -> int:
        """How many processes the kernel has killed in it for memory."""
        name = "memory.oom_control" if self.version == 1 else "memory.events"
        return int(dict(line.split() for line in (self.folder / name).read_text().splitlines())["oom_kill"])

    def _write(self, name: str, value: int) -> None:
        (self.folder / name).write_text(str(value))


def can_limit_memory() -> bool:
    """May this process make control groups with a memory limit?"""
    try:
        with MemoryLimit(64 << 20):
            return True
    except OSError:
        return False


def drop_cache(paths: Iterable[Path]) -> None:
    """Flush files and drop them from the page cache: who reads them next is charged for them."""
    for path in paths:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def wait_until(condition: Callable[[], bool], timeout_s: float = 10.0) -> bool:
    """Wait for something that another process does; False when it did not happen in time."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.01)
    return condition()


def remove(folder: Path) -> None:
    """Remove a folder and what is in it."""
    shutil.rmtree(folder, ignore_errors=True)


def _ancestors(path: str) -> list[str]:
    parts = [p for p in path.split("/") if p]
    return ["/", *("/" + "/".join(parts[: i + 1]) for i in range(len(parts)))]
