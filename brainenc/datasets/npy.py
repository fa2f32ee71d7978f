"""Writing and reading ``.npy`` files so that a full disk, or one that went away, is an error that says so.

``np.save`` writes arrays by ``tofile``, which reports a full disk as a short write without an error number, and a map
into a hole turns it into a SIGBUS; so does a map of a file whose server does not answer.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from brainenc.errors import DataError


def save(path: Path, array: npt.NDArray[Any]) -> None:
    """Write a small array; the folder must exist."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    path.write_bytes(buffer.getbuffer())


class NpyRows:
    """A float32 ``.npy`` file written row after row."""

    def __init__(self, path: Path, n_rows: int, n_columns: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO = open(path, "wb")  # noqa: SIM115 (closed by __exit__)
        header = {"descr": "<f4", "fortran_order": False, "shape": (n_rows, n_columns)}
        np.lib.format.write_array_header_1_0(self._file, header)

    def append(self, rows: npt.NDArray[np.float32]) -> None:
        self._file.write(np.ascontiguousarray(rows, "<f4").data)

    def __enter__(self) -> NpyRows:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """What a ``.npy`` file says of the array in it."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool
    """Columns lie together, not rows."""
    offset: int
    """Of the first value, in bytes."""


def read_header(path: Path) -> Header:
    """Read the header alone, and look whether all of the array is there.

    Raises:
        ValueError: no ``.npy`` file, or one that is shorter than its header says.
    """
    with open(path, "rb") as file:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):  # later ones are for names of fields, which arrays of numbers do not have
            raise ValueError(f"it has version {version[0]}.{version[1]} of the format")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
        offset, size = file.tell(), file.seek(0, io.SEEK_END)
    wanted = offset + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if size < wanted and not dtype.hasobject:
        raise ValueError(f"it has {size} bytes, and an array of shape {shape} wants {wanted}")
    return Header(shape=shape, dtype=dtype, fortran=fortran, offset=offset)


class NpyReader:
    """Rows of a two-dimensional ``.npy`` file, read when they are asked for: an array without a map.

    For files behind a network: where the server has gone away, a read is an error that names the file, and a page
    fault under a map is a SIGBUS that kills the process. Nothing is kept, neither open nor in memory. Any thread;
    pickles as its path and header.

    Args:
        path: of the file.
        header: of it, of two dimensions, rows lying together.
    """

    ndim = 2

    def __init__(self, path: Path, header: Header) -> None:
        self.path, self.dtype, self._offset = path, header.dtype, header.offset
        self.shape: tuple[int, int] = (header.shape[0], header.shape[1])

    @property
    def itemsize(self) -> int:
        """Bytes of a value."""
        return self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> npt.NDArray[Any]:
        """``[row]``; ``[rows]``, a slice, a mask, or numbers in any order; ``[rows, columns]``, columns as a slice."""
        rows, columns = key if isinstance(key, tuple) else (key, slice(None))
        numbers = np.arange(len(self))[rows]  # what NumPy makes of it: negative numbers, those that are out of bounds
        left, right, step = columns.indices(self.shape[1])
        if step != 1:
            raise IndexError(f"{self.path} is read in stretches of columns, not every {step}th of them.")
        out = np.empty((numbers.size, max(right - left, 0)), self.dtype)
        self._read(np.atleast_1d(numbers), left, out)
        return out if numbers.ndim else out[0]

    def take(self, rows: npt.NDArray[np.int64], out: npt.NDArray[Any]) -> None:
        """Read whole rows into a C-contiguous buffer of this dtype."""
        self._read(rows, 0, out)

    def _read(self, rows: npt.NDArray[np.int64], left: int, out: npt.NDArray[Any]) -> None:
        if not out.size:
            return
        row_bytes, first = self.shape[1] * self.itemsize, self._offset + left * self.itemsize
        together = out.shape[1] == self.shape[1] and bool((np.diff(rows) == 1).all())
        with _naming(self.path), open(self.path, "rb", buffering=0) as file:
            for row, piece in ((rows[0], out),) if together else zip(rows, out, strict=True):
                self._fill(file, first + int(row) * row_bytes, piece)

    def _fill(self, file: io.FileIO, at: int, piece: npt.NDArray[Any]) -> None:
        left = piece.data.cast("B")
        file.seek(at)
        while left:
            count = file.readinto(left)
            if not count:
                raise DataError(
                    f"{self.path} ends {len(left)} bytes before rows that it had when it was opened: it was cut short "
                    "or replaced. Copy it again; a run goes on from its last checkpoint."
                )
            left = left[count:]


def open_rows(path: Path) -> npt.NDArray[Any] | NpyReader:
    """A two-dimensional array to read rows of without a map; one whose columns lie together is read whole.

    Raises:
        ValueError: as :func:`read_header`, or the array has other dimensions.
    """
    header = read_header(path)
    if len(header.shape) != 2:
        raise ValueError(f"it holds an array of shape {header.shape}, wanted 2 dimensions")
    if header.fortran or header.dtype.hasobject:
        whole: npt.NDArray[Any] = np.load(path, allow_pickle=False)
        return whole
    return NpyReader(path, header)


def take(array: npt.NDArray[Any] | NpyReader, rows: npt.NDArray[np.int64], out: npt.NDArray[Any]) -> None:
    """Rows into a buffer of the same dtype; those that are out of bounds are not looked for."""
    if isinstance(array, NpyReader):
        array.take(rows, out)
    else:
        np.take(array, rows, axis=0, out=out, mode="clip")  # "clip" lets NumPy write straight into the buffer


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """A read's own error does not say of which file."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
