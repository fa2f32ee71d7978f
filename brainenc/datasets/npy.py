"""Writing ``.npy`` files so that a full disk is an error that says so.

``np.save`` writes arrays by ``tofile``, which reports a full disk as a short write without an error number, and a map
into a hole turns it into a SIGBUS.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt


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
