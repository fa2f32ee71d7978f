"""What this process may use and what is used: control groups first, then the host; GPUs, shared memory, disks.

    probe = Probe(disks=["runs/a"])
    probe.ram()            # the worse of every limit above us and the host; tens of microseconds
    probe.read()           # everything, for people and reports

Used memory is never RSS and never the group's usage: both count the page cache, which a store read through maps fills.
Standard library only on Linux; elsewhere ``psutil`` tells the host's memory.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from brainenc.guard.cgroup import LimitedGroup, limited_groups
from brainenc.guard.glances import Gauge, total
from brainenc.guard.nvml import GpuUse, Nvml

_LINUX: bool = sys.platform == "linux"
_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


class MemoryUse(NamedTuple):
    """Bytes used of a limit, and whose limit it is."""

    used: int
    limit: int
    source: str

    @property
    def fraction(self) -> float:
        """0 to 1, and above where a limit was lowered under a running job."""
        return self.used / self.limit if self.limit else 0.0


class Host(NamedTuple):
    """The machine's memory in bytes, and which share of the kernel's own could not be reclaimed."""

    total: int
    available: int
    kernel_share: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Space:
    """Room in one file system, bytes."""

    path: str
    free: int
    total: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """Everything that can be known at one moment."""

    ram: MemoryUse
    """The level that is closest to its limit."""
    levels: tuple[MemoryUse, ...]
    """Every limit that counts: groups from the inside out, then the host."""
    gpus: tuple[GpuUse, ...] = ()
    process_bytes: int = 0
    """Anonymous memory of this process."""
    family_bytes: int = 0
    """The same with all its descendants (loader workers ...)."""
    pressure: tuple[float, float] | None = None
    """Percent of the last 10 s in which some, and all, tasks waited for memory. Reading files raises it too, so that it
    informs and decides nothing."""
    shm: Space | None = None
    disks: tuple[Space, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            **asdict(self),
            "ram": self.ram._asdict() | {"fraction": round(self.ram.fraction, 4)},
            "levels": [level._asdict() for level in self.levels],
            "gpus": [gpu._asdict() | {"fraction": round(gpu.fraction, 4)} for gpu in self.gpus],
        }


class Probe:
    """Reads this machine. Every source can be replaced, so that a test reads another one.

    Args:
        disks: folders whose free space matters (checkpoints, stores).
        pid: the process to account for; None is this one.
        root: where ``/proc``, ``/sys`` and ``/dev`` hang.
        nvml: the GPUs; None looks for a driver.
        host: the machine's memory; None reads ``/proc/meminfo`` or asks psutil.
    """

    def __init__(
        self, *, disks: Sequence[str | os.PathLike[str]] = (), pid: int | None = None, root: Path = Path("/"),
        nvml: Nvml | None = None, host: Callable[[], Host] | None = None,
    ) -> None:  # fmt: skip
        self._root, self._pid = root, pid
        self._disks = [Path(d) for d in disks]
        self._groups: list[LimitedGroup] = limited_groups(root) if _LINUX else []
        self._host = host or host_source(root)
        self._nvml = nvml if nvml is not None else Nvml()
        self._last_host = self._host()
        self._found: list[MemoryUse] = []
        self.levels(host=False)

    def ram(self, *, host: bool = True) -> MemoryUse:
        """The level that is closest to its limit.

        Args:
            host: look at the host as well; without, its last reading stands.
        """
        return max(self.levels(host=host), key=lambda level: level.fraction)

    def levels(self, *, host: bool = True) -> list[MemoryUse]:
        """Every limit above this process: its groups from the inside out, then the host."""
        if host:
            self._last_host = self._host()
        total, available, share = self._last_host
        self._found = [MemoryUse(g.used(share), g.limit, g.name) for g in self._groups]
        return [*self._found, MemoryUse(total - available, total, "host")]

    def gauges(self) -> list[Gauge | None]:
        """Of each of the last :meth:`levels`, how to read it again for less; None for a host that has no such text."""
        host = self._host.gauge(self._last_host.total) if isinstance(self._host, _Meminfo) else None
        return [*(g.gauge(found.used) for g, found in zip(self._groups, self._found, strict=True)), host]

    @property
    def limited(self) -> bool:
        """A control group limits this process."""
        return bool(self._groups)

    def gpus(self, slack: dict[str, int] | None = None) -> list[GpuUse]:
        """The GPUs. ``slack``: UUID -> bytes that torch holds without using them."""
        return self._nvml.look(slack)

    @property
    def watches_gpus(self) -> bool:
        """There are devices that :meth:`gpus` asks, whether they answer or not."""
        return self._nvml.watches

    def watch_gpus(self, uuids: Sequence[str]) -> None:
        """Look at these GPUs from now on; none is asked of when there are none."""
        self._nvml.watch(uuids)

    def refresh(self) -> None:
        """Read the limits again; once a second is enough."""
        for group in self._groups:
            group.refresh()

    def read(self, slack: dict[str, int] | None = None, *, limits_only: bool = False) -> Reading:
        """Everything. A millisecond: for people, reports and the account of an incident.

        Args:
            slack: as for :meth:`gpus`.
            limits_only: leave out the processes, the pressure and the file systems.
        """
        levels, gpus = self.levels(), tuple(self.gpus(slack))
        worst = max(levels, key=lambda level: level.fraction)
        if limits_only:
            return Reading(ram=worst, levels=tuple(levels), gpus=gpus)
        pid = self._pid or os.getpid()
        return Reading(
            ram=worst,
            levels=tuple(levels),
            gpus=gpus,
            process_bytes=anonymous_bytes(pid, self._root),
            family_bytes=sum(anonymous_bytes(p, self._root) for p in family(pid, self._root)),
            pressure=self._pressure(),
            shm=space(self._root / "dev/shm"),
            disks=tuple(s for s in map(space, self._disks) if s is not None),
        )

    def close(self) -> None:
        """Close the files that are kept open."""
        for group in self._groups:
            group.close()
        self._groups, self._found = [], []

    def _pressure(self) -> tuple[float, float] | None:
        own = next((path for g in self._groups if (path := g.pressure())), None)
        return read_pressure(own or self._root / "proc/pressure/memory")


def take_reading(*disks: str | os.PathLike[str]) -> Reading:
    """Everything about this machine as this process may use it, once."""
    probe = Probe(disks=disks)
    try:
        return probe.read()
    finally:
        probe.close()


def host_source(root: Path = Path("/")) -> Callable[[], Host]:
    """The machine's memory: ``/proc/meminfo`` kept open where there is one, else psutil."""
    try:
        fd = os.open(root / "proc/meminfo", os.O_RDONLY)
    except OSError:
        return _psutil_host
    return _Meminfo(fd)


class _Meminfo:
    """``/proc/meminfo``, kept open."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __call__(self) -> Host:
        return parse_meminfo(os.pread(self._fd, 8192, 0))

    def gauge(self, n_bytes: int) -> Gauge:
        """For glances at what is used of so many."""
        return Gauge(self._fd, n_bytes, ((b"MemAvailable:", -1024),))


def parse_meminfo(text: bytes) -> Host:
    """Total, available, and the unreclaimable share of the kernel's memory."""

    kept = total(text, ((b"SUnreclaim:", 1), (b"KernelStack:", 1), (b"PageTables:", 1), (b"Percpu:", 1)))
    whole = kept + total(text, ((b"SReclaimable:", 1),))
    in_all, available = (total(text, ((name, 1024),)) for name in (b"MemTotal:", b"MemAvailable:"))
    return Host(in_all, available, kept / whole if whole else 1.0)


def _psutil_host() -> Host:
    import psutil  # not on Linux: the watcher process there has no site-packages

    memory = psutil.virtual_memory()
    return Host(memory.total, memory.available)


def anonymous_bytes(pid: int, root: Path = Path("/")) -> int:
    """Anonymous memory of a process; 0 when it is gone. Outside Linux, what psutil calls unique (else resident)."""
    if _LINUX:
        try:
            fields = (root / "proc" / str(pid) / "statm").read_bytes().split()
        except OSError:
            return 0
        return (int(fields[1]) - int(fields[2])) * _PAGE
    import psutil

    try:
        info = psutil.Process(pid).memory_info()
    except psutil.Error:
        return 0
    return int(getattr(info, "private", info.rss))


def family(pid: int, root: Path = Path("/")) -> list[int]:
    """A process and all its descendants."""
    found, waiting = [], [pid]
    while waiting:
        current = waiting.pop()
        found.append(current)
        for children in (root / "proc" / str(current) / "task").glob("*/children"):
            try:
                waiting += [int(child) for child in children.read_bytes().split()]
            except OSError:  # the thread ended meanwhile
                continue
    return found


def read_pressure(path: Path) -> tuple[float, float] | None:
    """``some`` and ``full`` of the last 10 s, percent; None where the kernel does not tell."""
    try:
        lines = path.read_text().splitlines()
        some, full = (float(line.split("avg10=")[1].split()[0]) for line in lines[:2])
    except (OSError, IndexError, ValueError):
        return None
    return some, full


def space(path: Path) -> Space | None:
    """Free and total bytes where ``path`` lies, or its nearest parent that exists; None where there is nothing."""
    while not path.exists():
        if path == path.parent:
            return None
        path = path.parent
    if hasattr(os, "statvfs"):
        stat = os.statvfs(path)
        return Space(path=str(path), free=stat.f_bavail * stat.f_frsize, total=stat.f_blocks * stat.f_frsize)
    import shutil

    usage = shutil.disk_usage(path)
    return Space(path=str(path), free=usage.free, total=usage.total)


def measure_cost(probe: Probe, repeats: int = 200) -> float:
    """Seconds that one fast look costs on this machine."""
    start = time.perf_counter()
    for _ in range(repeats):
        probe.ram()
    return (time.perf_counter() - start) / repeats
