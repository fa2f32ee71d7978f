"""A folder for Ray's session files that does not outlive its run for long."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_NAME = re.compile(r"be-(\d+)-(\d+)-\w+")
_LONGEST = 40  # Ray puts Unix sockets 65 characters deeper, and their paths end at 107


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A private folder with a short name, removed at the end; those of runs that were killed are removed as well."""
    root = Path(tempfile.gettempdir())
    if len(str(root)) > _LONGEST - 20:
        root = Path("/tmp")
    _sweep(root)
    folder = Path(tempfile.mkdtemp(prefix=f"be-{_user()}-{os.getpid()}-", dir=root))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # Ray's last processes may still be writing their farewell


def _sweep(root: Path) -> None:
    for folder in root.glob(f"be-{_user()}-*"):
        match = _NAME.fullmatch(folder.name)
        if match and not _alive(int(match[2])):
            shutil.rmtree(folder, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _user() -> int:
    return os.getuid() if hasattr(os, "getuid") else 0
