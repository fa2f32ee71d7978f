"""Writing one shard: rows go straight to where they belong in a private file, which then gets its name.

Nothing under a public name is ever incomplete. Memory is that of one batch of rows.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from brainenc.errors import StoreError, UsageError
from brainenc.featurestore.checksums import BlockHasher, rows_per_block
from brainenc.featurestore.dtypes import to_storage
from brainenc.featurestore.formats import shard_format
from brainenc.featurestore.inspection import LocalBytes, framed, inspect
from brainenc.featurestore.schema import CollectionSpec, Note, Receipt
from brainenc.featurestore.space import full_disk_explained

Publish = Callable[[Path, Receipt], Receipt]
"""Gives a finished partial its name and writes its receipt; returns the receipt of whoever won."""


class ShardWriter:
    """Appends the rows of one shard in order, then seals it. Made by ``Collection.shard_writer``.

    As a context manager it aborts unless it was sealed. Not for several threads at once.
    """

    def __init__(
        self, spec: CollectionSpec, shard: int, partial: Path, publish: Publish,
        *, environment: Mapping[str, Any], name_row: Callable[[int], str],
    ) -> None:  # fmt: skip
        self.shard, self._spec, self._shape = int(shard), spec, spec.shard(int(shard))
        self.rows = spec.rows(shard)
        self._environment, self._publish, self._name_row = dict(environment), publish, name_row
        self._format = shard_format(spec.format)
        self._head = self._format.head(self._shape)
        self._block_rows = rows_per_block(self._shape.row_bytes)
        self._blocks = BlockHasher(self._block_rows * self._shape.row_bytes)
        self._written, self._missing = 0, list[int]()
        self._path = partial
        self._fd = self._open(partial)

    @property
    def written(self) -> int:
        """Rows appended so far."""
        return self._written

    def append(self, rows: np.ndarray, *, missing: Sequence[int] = ()) -> None:
        """Write the next rows.

        Args:
            rows: array of shape (n, *row_shape), any dtype that casts to the collection's.
            missing: positions within ``rows`` of those to leave out on purpose; what is in them does not matter.

        Raises:
            UsageError: another shape, or more rows than the shard has.
            ValueNotStorable: a value the collection's dtype cannot hold; names the stimulus. Nothing was written.
            NoSpace: the disk is full.
        """
        rows, missing = np.asarray(rows), [int(position) for position in missing]
        first = self.rows.start + self._written
        self._check(rows, missing)
        if missing:
            rows = rows.copy()
            rows[missing] = 0
        data = to_storage(rows, self._spec.dtype, lambda position: self._name_row(first + position))
        view = memoryview(data.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
        self._blocks.update(view)
        self._pwrite(view, len(self._head) + self._written * self._shape.row_bytes)
        self._written += len(rows)
        self._missing += [first + position for position in missing]

    def seal(self, *, content_hashes: Sequence[str] | None = None) -> Receipt:
        """Flush, publish, write the receipt. Durable on return, as far as the place's flush goes.

        Args:
            content_hashes: of the image bytes that were decoded, one a row.

        Returns:
            The shard's receipt: ours, or that of another writer who was first (our copy is dropped then).

        Raises:
            StoreError: rows are lacking.
            NoSpace: the disk is full.
            CorruptData: what was read back is not what was written.
        """
        if self._written != len(self.rows):
            raise StoreError(f"shard {self.shard} has {self._written} of {len(self.rows)} rows and cannot be sealed.")
        if content_hashes is not None and len(content_hashes) != len(self.rows):
            raise UsageError(f"{len(content_hashes)} content hashes for {len(self.rows)} rows of shard {self.shard}.")
        try:
            with full_disk_explained(self._path):
                return self._publish(self._path, self._finish(content_hashes))
        finally:
            self.abort()

    def abort(self) -> None:
        """Drop what was written. Harmless when sealed, or called twice."""
        if self._fd >= 0:
            with contextlib.suppress(FileNotFoundError):  # published, or removed by hand
                if os.fstat(self._fd).st_ino == os.stat(self._path).st_ino:
                    os.unlink(self._path)
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()

    def _open(self, partial: Path) -> int:
        size = len(self._head) + self._shape.data_bytes
        with full_disk_explained(partial, size):
            fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # says that this partial's writer lives
                _allocate(fd, size)
                self._fd = fd
                self._pwrite(memoryview(self._head), 0)
            except BaseException:
                os.close(fd)
                partial.unlink(missing_ok=True)
                raise
        return fd

    def _check(self, rows: np.ndarray, missing: Sequence[int]) -> None:
        if self._fd < 0:
            raise UsageError(f"the writer of shard {self.shard} is closed.")
        if rows.shape[1:] != self._shape.row_shape or rows.ndim != len(self._shape.row_shape) + 1:
            raise UsageError(f"rows of shape {self._shape.row_shape} are wanted, an array of {rows.shape} came.")
        if self._written + len(rows) > len(self.rows):
            raise UsageError(f"shard {self.shard} has {len(self.rows)} rows; {self._written + len(rows)} came.")
        if not all(0 <= position < len(rows) for position in missing):
            raise UsageError(f"missing positions {list(missing)} are not all within a batch of {len(rows)} rows.")

    def _finish(self, content_hashes: Sequence[str] | None) -> Receipt:
        note = Note(
            collection=self._spec.checksum, shard=self.shard, rows=len(self.rows), data_offset=len(self._head),
            block_rows=self._block_rows, blocks=tuple(self._blocks.digests()), missing=tuple(self._missing),
            content_hashes=None if content_hashes is None else tuple(content_hashes), environment=self._environment,
        )  # fmt: skip
        tail, _ = framed(self._format, self._spec, note)
        end = len(self._head) + self._shape.data_bytes
        self._pwrite(memoryview(tail), end)
        os.ftruncate(self._fd, end + len(tail))
        with _flushing(self._fd, self._path):  # reading back costs nothing beside the flush
            return inspect(LocalBytes(self._path, self._fd), self._format, self._spec, self.shard)

    def _pwrite(self, data: memoryview, position: int) -> None:
        with full_disk_explained(self._path, len(data)):
            start, end = position, position + len(data)
            while position < end:
                position += os.pwrite(self._fd, data[position - start : position - start + _CHUNK], position)
                _write_back(self._fd, start, position - start)


_CHUNK = 1 << 23


def _allocate(fd: int, size: int) -> None:
    """Claim the blocks now: a full disk is found before the work, not after it."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, 0, size)


def _load_sync_file_range() -> Callable[..., int] | None:
    if sys.platform != "linux":
        return None
    call = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if call is not None:
        call.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return call


_SYNC_FILE_RANGE = _load_sync_file_range()


def _write_back(fd: int, start: int, length: int) -> None:
    """Let the disk begin with these bytes while the next are made. A hint: its failure is the flush's to report."""
    if _SYNC_FILE_RANGE is not None and length >= _CHUNK >> 3:
        _SYNC_FILE_RANGE(fd, start, length, 2)  # SYNC_FILE_RANGE_WRITE


@contextlib.contextmanager
def _flushing(fd: int, path: Path) -> Iterator[None]:
    """Flush a file in a thread while the body runs; the flush's error, if any, comes out at the end."""
    failures: list[OSError] = []

    def flush() -> None:
        try:
            os.fsync(fd)
        except OSError as error:
            failures.append(error)

    thread = threading.Thread(target=flush, name="brainenc-flush")
    thread.start()
    try:
        yield
    finally:
        thread.join()
    if failures:
        with full_disk_explained(path):
            raise failures[0]
