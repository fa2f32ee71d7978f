"""Memory limits of control groups, version 1 and 2, nested: what is used at each level, and what may be.

Used is what the kernel cannot take back: anonymous + shared + unreclaimable kernel memory. Page cache is charged to a
group too and fills it to the brim whenever files are read or mapped, but it is given back on demand.

Standard library only: the watcher process imports this without site-packages.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from brainenc.guard.glances import Fields, Gauge, total

UNLIMITED = 1 << 60
"""Version 1 writes about 2^63 where version 2 writes ``max``; nothing real comes near."""
_V1: Fields = ((b"total_rss ", 1), (b"total_shmem ", 1))
_V2: Fields = ((b"anon ", 1), (b"shmem ", 1), (b"sock ", 1))
_V2_WHOLE: Fields = ((b"kernel ", 1), (b"slab_reclaimable ", -1))
_V2_PARTS: Fields = (
    (b"kernel_stack ", 1), (b"pagetables ", 1), (b"sec_pagetables ", 1), (b"percpu ", 1), (b"vmalloc ", 1),
    (b"slab_unreclaimable ", 1),
)  # fmt: skip


class Mount(NamedTuple):
    """Where a memory controller is mounted, and which group is this process's."""

    version: int
    point: Path
    group: Path


class LimitedGroup:
    """One group with a limit: keeps its files open, so that a look costs a few microseconds.

    Args:
        version: of the control group interface, 1 or 2.
        folder: the group's folder.
        limit: bytes.
    """

    def __init__(self, version: int, folder: Path, limit: int) -> None:
        self.version, self.folder, self.limit = version, folder, limit
        self.name = f"cgroup v{version} {folder}"
        self._stat = os.open(folder / "memory.stat", os.O_RDONLY)
        self._kmem = _open(folder / "memory.kmem.usage_in_bytes") if version == 1 else -1
        self._listed = 0
        whole = b"\nkernel " in b"\n" + os.pread(self._stat, 16384, 0)
        self._fields = _V1 if version == 1 else _V2 + (_V2_WHOLE if whole else _V2_PARTS)

    def used(self, host_kernel_share: float = 1.0) -> int:
        """Bytes that the kernel cannot take back.

        Args:
            host_kernel_share: version 1 says how much kernel memory a group has, not how much of it could be
                reclaimed; this is the unreclaimable share on the whole host, taken for the group's.
        """
        self._listed = total(os.pread(self._stat, 16384, 0), self._fields)
        kernel = int(_number(os.pread(self._kmem, 32, 0)) * host_kernel_share) if self._kmem >= 0 else 0
        return max(0, self._listed + kernel)

    def gauge(self, used: int) -> Gauge:
        """What to read for glances after :meth:`used` has told ``used``. Kernel memory of version 1, which is not in
        the same file, stands as it was then."""
        return Gauge(self._stat, used - self._listed, self._fields)

    def refresh(self) -> None:
        """Read the limit again: ``docker update`` and Slurm change it under a running job."""
        self.limit = read_limit(self.version, self.folder)

    def pressure(self) -> Path | None:
        """The group's own pressure file, where there is one."""
        path = self.folder / "memory.pressure"
        return path if path.exists() else None

    def close(self) -> None:
        """Close the files."""
        for fd in (self._stat, self._kmem):
            if fd >= 0:
                os.close(fd)
        self._stat = self._kmem = -1


def limited_groups(root: Path = Path("/")) -> list[LimitedGroup]:
    """Every group from this process's own up to the top that has a limit, the process's own first."""
    mount = find_mount(root)
    if mount is None:
        return []
    groups = []
    folder = mount.group
    while True:
        limit = read_limit(mount.version, folder)
        if limit < UNLIMITED and (folder / "memory.stat").exists():
            groups.append(LimitedGroup(mount.version, folder, limit))
        if folder == mount.point or mount.point not in folder.parents:
            return groups
        folder = folder.parent


def find_mount(root: Path = Path("/")) -> Mount | None:
    """This process's memory group, or None where there is no memory controller."""
    mounts = _mounts(root)
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        version = 1 if "memory" in controllers.split(",") else 2 if controllers == "" else 0
        if version not in mounts or (version == 2 and 1 in mounts):
            continue
        mount_root, point = mounts[version]
        return Mount(version, point, _inside(point, mount_root, path))
    return None


def read_limit(version: int, folder: Path) -> int:
    """The hard limit of one group in bytes; at least :data:`UNLIMITED` where there is none.

    ``memory.high`` counts as well: without swap, a group above it is slowed to a crawl instead of being killed.
    """
    names = ("memory.limit_in_bytes",) if version == 1 else ("memory.max", "memory.high")
    return min(_limit(folder / name) for name in names)


def _limit(path: Path) -> int:
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdigit() else UNLIMITED


def _mounts(root: Path) -> dict[int, tuple[str, Path]]:
    """version -> (the group that is mounted, where)."""
    found: dict[int, tuple[str, Path]] = {}
    for line in _lines(root / "proc/self/mountinfo"):
        left, _, right = line.partition(" - ")
        fields, kind = left.split(), right.split()
        if len(fields) < 5 or len(kind) < 3:
            continue
        point = root / fields[4].replace("\\040", " ").lstrip("/")
        if kind[0] == "cgroup" and "memory" in kind[2].split(","):
            found.setdefault(1, (fields[3], point))
        elif kind[0] == "cgroup2":
            found.setdefault(2, (fields[3], point))
    return found


def _inside(point: Path, mount_root: str, path: str) -> Path:
    """The group's folder below the mount. In a container, the path may be the host's and the mount its own group."""
    if mount_root != "/" and path.startswith(mount_root):
        path = path[len(mount_root) :]
    parts = [part for part in path.split("/") if part not in ("", ".", "..")]  # a namespace may show "/../.."
    folder = point.joinpath(*parts)
    return folder if folder.is_dir() else point


def _number(text: bytes) -> int:
    digits = text.split(b"\n", 1)[0].strip()
    return int(digits) if digits.isdigit() else 0


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:  # no such interface on this kernel, or not for us
        return []


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY)
    except OSError:
        return -1
