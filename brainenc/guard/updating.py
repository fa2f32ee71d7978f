"""A byte that a worker and its watcher share: the weights are being overwritten.

The watcher's brake makes allocations fail. In the middle of ``optimizer.step()`` that would leave weights of no step,
so it waits for the end of the update where it can: by a look at memory, as neither a pipe nor a signal tells in time.

Standard library only: the watcher process imports this.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
from pathlib import Path

_SHARED_MEMORY = Path("/dev/shm")


class UpdatingFlag:
    """Up while the worker updates. Linux, where the brake is; elsewhere nobody else sees it.

    Args:
        fd: the file that the worker's flag has made, inherited by its watcher; None makes one, -1 has none.
    """

    def __init__(self, fd: int | None = None) -> None:
        self._own, self._maker = fd is None, os.getpid()
        self.fd = _memory_file() if fd is None else fd
        """To be inherited; -1 where there is none."""
        self._byte: mmap.mmap | bytearray = bytearray(1)
        if self.fd >= 0:
            with contextlib.suppress(OSError, ValueError):  # not the file that it should be: without, all else works
                self._byte = mmap.mmap(self.fd, mmap.PAGESIZE)
        self._up = False

    @property
    def up(self) -> bool:
        """An update of this process is going on. The byte is for the watcher: a forked child must not decide here."""
        return self._up

    @up.setter
    def up(self, value: bool) -> None:
        self._up = value
        if os.getpid() == self._maker:
            self._byte[0] = value

    @property
    def seen_up(self) -> bool:
        """For the watcher: the worker says that an update is going on."""
        return self._byte[0] != 0

    def close(self) -> None:
        """Close the file, if it was made here. A hook that outlives the guard can still raise the flag."""
        fd, self.fd = self.fd, -1
        if self._own and fd >= 0:
            with contextlib.suppress(OSError):
                os.close(fd)


def _memory_file() -> int:
    """A page of shared memory without a name; -1 where that cannot be had."""
    try:
        if hasattr(os, "memfd_create"):
            fd = os.memfd_create("brainenc-updating")
        elif _SHARED_MEMORY.is_dir():  # Pythons built for older systems lack the call: conda's, say
            with tempfile.TemporaryFile(dir=_SHARED_MEMORY) as file:
                fd = os.dup(file.fileno())
        else:
            return -1
        os.ftruncate(fd, mmap.PAGESIZE)
    except OSError:  # a sandbox that does not let it through
        return -1
    return fd
