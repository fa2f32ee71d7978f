"""Disks that lose power and disks that are small, on loop devices (root only)."""

import fcntl
import os
import struct
import subprocess
import tempfile
from pathlib import Path

_FS_IOC_SHUTDOWN, _NOLOGFLUSH = 0x8004587D, 2


class LossyDisk:
    """ext4 on a loop device, with a switch that cuts its power: what was not flushed by then is gone.

    FS_IOC_SHUTDOWN without flushing the journal. It drops what was not written, but neither reorders nor tears sectors.
    """

    def __init__(self, mb=256, kind="ext4"):
        self.mb, self.kind = mb, kind

    def __enter__(self):
        self._base = Path(tempfile.mkdtemp(prefix="lossy-"))
        self._image, self.folder = self._base / "image", self._base / "mount"
        self.folder.mkdir()
        with open(self._image, "wb") as file:
            file.truncate(self.mb << 20)
        _run(f"mkfs.{self.kind}", "-q", "-F", self._image)
        self._device = _run("losetup", "-f", "--show", self._image)
        _run("mount", self._device, self.folder)
        return self

    def cut(self):
        """Power off: every later write fails."""
        fd = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, _FS_IOC_SHUTDOWN, struct.pack("I", _NOLOGFLUSH))
        finally:
            os.close(fd)

    def power_on(self):
        """Mount again; the journal is replayed."""
        _run("umount", self.folder)
        _run("mount", self._device, self.folder)

    def __exit__(self, *_):
        subprocess.run(["umount", "-l", self.folder], capture_output=True, check=False)
        subprocess.run(["losetup", "-d", self._device], capture_output=True, check=False)
        self._image.unlink()
        self.folder.rmdir()
        self._base.rmdir()


def can_mount():
    """May this process make loop devices and mount them?"""
    try:
        with LossyDisk(8):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def _run(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
