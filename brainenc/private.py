"""Folders of one's own where everybody may write, as in ``/tmp``: closed to others, refused if somebody else's."""

from __future__ import annotations

import errno
import getpass
import os
import stat
import tempfile
from pathlib import Path


def temporary(name: str) -> Path:
    """``<temporary folder>/<name>-<user>``: this user's alone; not made yet."""
    user = os.getuid() if hasattr(os, "getuid") else getpass.getuser()
    return Path(tempfile.gettempdir()) / f"{name}-{user}"


def refusal(folder: Path) -> str | None:
    """Why a folder is not to be trusted; None where it is ours and only we can write to it, or where there is none."""
    try:
        found = os.lstat(folder)  # a link may lead anywhere
    except OSError:
        return None
    if not stat.S_ISDIR(found.st_mode):
        return "is no folder"
    if not hasattr(os, "getuid"):  # Windows: a user's temporary folder is the user's own
        return None
    if found.st_uid != os.getuid():
        return f"belongs to user {found.st_uid}, not to this one"
    return "can be written to by others" if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) else None


def make(folder: Path) -> None:
    """Make a folder that only this user can look into and write to; one that is there and ours is closed to others.

    Raises:
        PermissionError: it is somebody else's, or others can write to it.
        OSError: it cannot be made.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.mkdir(folder, 0o700)
    except FileExistsError:
        if why := refusal(folder):
            raise PermissionError(errno.EACCES, f"It {why}; nothing is kept there", str(folder)) from None
        os.chmod(folder, 0o700)
