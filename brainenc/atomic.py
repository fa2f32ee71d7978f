"""Durable small steps on a local file system: write aside, flush, publish, flush the folder.

A file that appears under its final name is whole and survives a power cut; nothing is ever overwritten unless
:func:`replace` is asked to. Local POSIX folders only: object stores and mounts have their own rules
(``brainenc.featurestore``).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
import sys
from pathlib import Path

_RENAME_NOREPLACE = 1
_AT_FDCWD = -100


def fsync_dir(folder: str | os.PathLike[str]) -> None:
    """Flush a folder, so that names created or removed in it survive a power cut."""
    if os.name == "nt":  # Windows has no such call; NTFS journals names itself
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_dirs(folder: str | os.PathLike[str]) -> None:
    """Create a folder and its parents durably."""
    folder = Path(folder)
    missing = [p for p in (folder, *folder.parents) if not p.exists()]
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        fsync_dir(path.parent)


def partial_name(final: str | os.PathLike[str]) -> Path:
    """A name beside ``final`` that no other writer uses: ``.<name>.<id>.partial``."""
    final = Path(final)
    return final.with_name(f".{final.name}.{secrets.token_hex(6)}.partial")


def publish_new(partial: str | os.PathLike[str], final: str | os.PathLike[str]) -> bool:
    """Give a finished, flushed file its final name, unless that name is taken. Durable on return.

    Returns:
        True if ``partial`` is now ``final``; False if ``final`` existed, in which case ``partial`` is left alone.

    Raises:
        OSError: the file system knows neither hard links nor a rename that does not replace (``ENOTSUP``).
    """
    try:
        os.link(partial, final)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        if not _rename_no_replace(partial, final):
            return False
    else:
        os.unlink(partial)
    fsync_dir(Path(final).parent)
    return True


def write_new(final: str | os.PathLike[str], data: bytes) -> bool:
    """Create a small file with ``data``, durable on return, unless it exists.

    Returns:
        True if this call created it, False if it existed (its content is not looked at).
    """
    partial = _write_aside(final, data)
    try:
        return publish_new(partial, final)
    finally:
        with contextlib.suppress(FileNotFoundError):  # gone when it was published
            os.unlink(partial)


def replace(final: str | os.PathLike[str], data: bytes) -> None:
    """Write a small file, replacing what is there in one step; durable on return."""
    partial = _write_aside(final, data)
    try:
        os.replace(partial, final)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)
        raise
    fsync_dir(Path(final).parent)


def _write_aside(final: str | os.PathLike[str], data: bytes) -> Path:
    partial = partial_name(final)
    try:
        with open(partial, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)
        raise
    return partial


def _rename_no_replace(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> bool:
    """renameat2(2) with RENAME_NOREPLACE, for file systems without hard links. False: the target exists."""
    if os.name == "nt":  # a rename never replaces there
        try:
            os.rename(source, target)
        except FileExistsError:
            return False
        return True
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
    call = getattr(libc, "renameat2", None)
    if call is None:
        raise OSError(errno.ENOTSUP, "neither hard links nor a rename that does not replace", os.fspath(target))
    result = call(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), ctypes.c_uint(_RENAME_NOREPLACE))
    if result == 0:
        return True
    code = ctypes.get_errno()
    if code == errno.EEXIST:
        return False
    raise OSError(code, os.strerror(code), os.fspath(target))
