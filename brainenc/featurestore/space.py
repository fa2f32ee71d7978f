"""A full disk as an error that says what to do."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from brainenc.errors import NoSpace
from brainenc.units import format_bytes

FULL = (errno.ENOSPC, errno.EDQUOT)
"""What the system says when a disk or a quota is full."""


@contextlib.contextmanager
def full_disk_explained(path: Path, wanted: int | None = None) -> Iterator[None]:
    """Turn ENOSPC and EDQUOT into :class:`~brainenc.errors.NoSpace`.

    Args:
        path: what is being written.
        wanted: bytes that it takes, if known.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        need = f" {format_bytes(wanted)} are needed," if wanted else ""
        raise NoSpace(
            f"No space left for {path}:{need} {format_bytes(_free(path))} are free"
            f"{' but a quota is used up' if error.errno == errno.EDQUOT else ''}. What is sealed is safe; "
            "make space and run the same command again."
        ) from error


def _free(path: Path) -> int:
    folder = next((p for p in (path, *path.parents) if p.is_dir()), None)
    if folder is None:
        return 0
    stat = os.statvfs(folder)
    return stat.f_bavail * stat.f_frsize
