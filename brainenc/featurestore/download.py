"""A whole file of any place onto local disk, in pieces and a few at a time: memory stays at a few pieces."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from brainenc.errors import TransferFailed
from brainenc.featurestore.places.base import Place

_PIECE = 8 * 2**20
_STREAMS = 4


def download(place: Place, name: str, fd: int, size: int, *, arrived: Callable[[int], None] | None = None) -> None:
    """Read ``size`` bytes of a file into an open local file. What came is not checked beyond its length.

    Args:
        place: where it lies.
        name: its name there.
        fd: where to write, from byte 0.
        size: its bytes.
        arrived: told the bytes of each piece; called from several threads.

    Raises:
        FileNotFoundError: it is not there.
        TransferFailed: it is shorter, or could not be read.
    """
    failed = threading.Event()

    def piece(start: int) -> None:
        if failed.is_set():
            return
        try:
            stop = min(start + _PIECE, size)
            data = place.read(name, start, stop)
            if len(data) != stop - start:
                raise TransferFailed(f"{place.url}/{name} ends before byte {stop}, but should have {size} bytes.")
            _write(fd, data, start)
        except BaseException:
            failed.set()
            raise
        if arrived is not None:
            arrived(len(data))

    starts = range(0, size, _PIECE)
    if len(starts) <= 1:
        for start in starts:
            piece(start)
        return
    with ThreadPoolExecutor(min(_STREAMS, len(starts)), thread_name_prefix="brainenc-fetch") as pool:
        list(pool.map(piece, starts))


def _write(fd: int, data: bytes, at: int) -> None:
    view = memoryview(data)
    while len(view):
        n = os.pwrite(fd, view, at)
        view, at = view[n:], at + n
