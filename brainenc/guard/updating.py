"""A byte that a worker and its watcher share: the weights are being overwritten.

The watcher's brake makes allocations fail. In the middle of ``optimizer.step()`` that would leave weights of no step,
so it waits for the end of the update where it can: by a look at memory, as neither a pipe nor a signal tells in time.

Standard library only: the watcher process imports this.
"""

from __future__ import annotations

import contextlib
import mmap
import os


class UpdatingFlag:
    """Up while the worker updates. Linux, where the brake is; elsewhere nobody else sees it.

    Args:
        fd: the file that the worker's flag has made, inherited by its watcher; None makes one, -1 has none.
    """

    def __init__(self, fd: int | None = None) -> None:
        self._own = fd is None
        self.fd = _memory_file() if fd is None else fd
        """To be inherited; -1 where there is none."""
        self._byte: mmap.mmap | bytearray = mmap.mmap(self.fd, mmap.PAGESIZE) if self.fd >= 0 else bytearray(1)

    @property
    def up(self) -> bool:
        """An update is going on."""
        return self._byte[0] != 0

    @up.setter
    def up(self, value: bool) -> None:
        self._byte[0] = value

    def close(self) -> None:
        """Close the file, if it was made here. A hook that outlives the guard can still raise the flag."""
        fd, self.fd = self.fd, -1
        if self._own and fd >= 0:
            with contextlib.suppress(OSError):
                os.close(fd)


def _memory_file() -> int:
    """A page of shared memory without a name; -1 where that cannot be had."""
    if not hasattr(os, "memfd_create"):
        return -1
    try:
        fd = os.memfd_create("brainenc-updating")
        os.ftruncate(fd, mmap.PAGESIZE)
    except OSError:  # a sandbox that does not let it through
        return -1
    return fd
