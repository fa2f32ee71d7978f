"""What this machine is as seen from inside, and what will not work on it: for ``brainenc doctor``."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from brainenc.guard import glances
from brainenc.guard.conflicts import Surroundings, conflicts
from brainenc.guard.policy import Thresholds
from brainenc.guard.probe import Reading, take_reading
from brainenc.mounts import NETWORK, mount_of
from brainenc.units import format_bytes

GB = 1_000_000_000
_PACKAGES = ("ray", "torch", "transformers", "open_clip_torch", "timm", "numpy", "pyarrow")


@dataclass(frozen=True, kw_only=True, slots=True)
class Folder:
    """One folder that matters, and what it lies on."""

    path: str
    file_system: str
    free: int
    total: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """Facts, nothing judged."""

    system: str
    python: str
    cores: int
    """That this process may use."""
    colab: bool
    versions: dict[str, str]
    """Of the packages that matter; an absent one is not listed."""
    reading: Reading
    host_memory: int
    folders: tuple[Folder, ...]
    ray_threshold: float | None
    ray_address: str
    bytecode: bool
    """Python may write its bytecode cache."""
    why_not_compiled: str
    """Why the watcher's glances are in Python, which costs more; empty where they are in C."""

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {**asdict(self), "reading": self.reading.to_dict()}


def examine(folders: Sequence[str | os.PathLike[str]] = (".",)) -> Machine:
    """Look at this machine. Neither Ray nor torch is imported."""
    reading = take_reading(*folders)
    threshold = os.environ.get("RAY_memory_usage_threshold", "0.95")  # noqa: SIM112 - spelt so by Ray
    off = os.environ.get("RAY_memory_monitor_refresh_ms") == "0"  # noqa: SIM112
    lying = [Folder(path=s.path, file_system=file_system(s.path), free=s.free, total=s.total) for s in reading.disks]
    return Machine(
        system=platform.platform(), python=platform.python_version(), cores=_cores(),
        colab=Path("/content").is_dir() and "COLAB_RELEASE_TAG" in os.environ,
        versions=_versions(), reading=reading, host_memory=reading.levels[-1].limit,
        folders=tuple(lying),
        ray_threshold=None if off else float(threshold), ray_address=os.environ.get("RAY_ADDRESS", ""),
        bytecode=not sys.dont_write_bytecode, why_not_compiled=glances.WHY_NOT_COMPILED,
    )  # fmt: skip


def troubles(machine: Machine, thresholds: Thresholds | None = None) -> list[str]:
    """What will not work, or not well, a sentence each with the way out. Pure."""
    reading, found = machine.reading, []
    ram = reading.ram
    if ram.limit < machine.host_memory:
        found.append(
            f"Memory is limited to {format_bytes(ram.limit)} by {ram.source}; psutil, Ray's dashboard and `free` still "
            f"show the host's {format_bytes(machine.host_memory)}. brainenc goes by the limit."
        )
    if ram.limit < 4 * GB:
        found.append(
            f"{format_bytes(ram.limit)} of memory is little for Ray and torch together: use --workers 0, without Ray."
        )
    if ram.fraction > 0.7:
        found.append(f"{ram.fraction:.0%} of memory is used already, before anything has started.")
    if not reading.gpus:
        found.append("No GPU is visible: extraction and training run on the CPU. `brainenc plan` says how long.")
    for folder in machine.folders:
        found += _folder_troubles(folder)
    if reading.shm is not None and reading.shm.total < 256_000_000:
        found.append(
            f"/dev/shm has {format_bytes(reading.shm.total)}: Ray puts its object store on disk, and loader workers "
            "may die of SIGBUS. In Docker, give --shm-size=2g."
        )
    if not machine.bytecode:
        found.append(
            "PYTHONDONTWRITEBYTECODE is set: Ray's processes compile their imports each time and start two to three "
            "times slower. Unset it."
        )
    if "ray" not in machine.versions:
        found.append("Ray is not installed: `extract`, and `train` with workers, need it. Install brainenc again.")
    shm = reading.shm.total if reading.shm else 0
    around = Surroundings(limit=ram.limit, ray_threshold=machine.ray_threshold, shm=shm)
    return found + conflicts(thresholds or Thresholds(), around)


def file_system(path: str | os.PathLike[str]) -> str:
    """The kind of file system that a path lies on, ``""`` where the system does not tell."""
    found = mount_of(Path(os.path.realpath(path)))
    return found[1] if found is not None else ""


def _folder_troubles(folder: Folder) -> list[str]:
    found = []
    if folder.file_system in NETWORK:
        found.append(
            f"{folder.path} lies on {folder.file_system}, a network file system: a store there is written and read in "
            "place but not mapped, which is slower. --stage reads it through a cache on this machine's own disk."
        )
    if folder.file_system.startswith("fuse"):
        found.append(
            f"{folder.path} lies on {folder.file_system}, which has no real flush: a store there is used through "
            "local copies, and what was handed over counts as staged until a later run has seen it again."
        )
    if folder.free < 15 * GB:
        found.append(
            f"{folder.path} has {format_bytes(folder.free)} free; one DINOv2-B layer of one NSD subject takes 14.8 GB. "
            "`plan` says what yours takes."
        )
    return found


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
