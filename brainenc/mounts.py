"""What a folder is mounted from, as Linux tells it."""

from __future__ import annotations

import os
import re
from pathlib import Path

MOUNTINFO = Path("/proc/self/mountinfo")
NETWORK = {
    "nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "lustre", "gpfs", "beegfs", "ceph", "afs", "panfs", "wekafs",
}  # fmt: skip
"""File systems whose disk is behind a network, and that the kernel itself speaks to; FUSE mounts are another matter."""


def mount_of(real: Path, mountinfo: Path | None = None) -> tuple[str, str] | None:
    """Number and type of the mount that a path lies on; the last and longest one wins, as in the kernel.

    Args:
        real: the path without links; it need not be there yet.
        mountinfo: the table; None: that of this process.

    Returns:
        None where the system has no such table.
    """
    try:
        lines = (mountinfo or MOUNTINFO).read_text().splitlines()
    except OSError:  # not Linux
        return None
    best: tuple[int, tuple[str, str]] | None = None
    for line in lines:
        head, _, tail = line.partition(" - ")
        fields = head.split()
        point = Path(re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[4]))
        if (point == real or point in real.parents) and (best is None or len(point.parts) >= best[0]):
            best = len(point.parts), (fields[0], tail.split()[0])
    return None if best is None else best[1]


def network_file_system(folder: Path, mountinfo: Path | None = None) -> str | None:
    """Which network file system a folder (or the place where it would be made) lies on; None: on none."""
    found = mount_of(Path(os.path.realpath(folder)), mountinfo)
    return found[1] if found is not None and found[1] in NETWORK else None
