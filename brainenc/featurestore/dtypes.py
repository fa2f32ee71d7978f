"""The three storage dtypes, and the way into them that never lets an infinity reach the disk."""

from __future__ import annotations

import math
from collections.abc import Callable

import ml_dtypes
import numpy as np
import numpy.typing as npt

from brainenc.errors import UnknownName, ValueNotStorable
from brainenc.featurestore.gather import default_threads, in_parallel

LOGICAL: dict[str, np.dtype] = {
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
"""Name -> what a reader sees."""

_EXPONENT = {"float16": 0x7C00, "bfloat16": 0x7F80, "float32": 0x7F800000}
_PARALLEL = 1 << 22  # bytes from which a conversion is worth sharing
_SLICE = 1 << 17  # elements looked at in one go: the temporaries stay in the processor's cache


def logical_dtype(name: str) -> np.dtype:
    """The dtype that readers see.

    Raises:
        UnknownName: not a storage dtype.
    """
    if name not in LOGICAL:
        raise UnknownName("storage dtype", name, tuple(LOGICAL))
    return LOGICAL[name]


def storage_dtype(name: str) -> np.dtype:
    """The dtype that lies on disk: bfloat16 is stored as its bits, because neither Arrow nor ``.npy`` knows it."""
    return np.dtype("<u2") if logical_dtype(name) == ml_dtypes.bfloat16 else LOGICAL[name]


def to_storage(rows: npt.ArrayLike, name: str, name_row: Callable[[int], str] = "row {}".format) -> np.ndarray:
    """Rows in the storage dtype, C-contiguous, checked; the same memory where nothing has to change.

    Args:
        rows: array of shape (n, *row_shape).
        name: a storage dtype.
        name_row: what a message calls the row at a position.

    Raises:
        ValueNotStorable: an infinity, or a value that would become one.
    """
    rows = np.asarray(rows)
    stored = _cast(rows, logical_dtype(name))
    bits = stored.view("<u4" if name == "float32" else "<u2").reshape(len(stored), math.prod(stored.shape[1:]))
    for position, row in enumerate(bits):
        if _has_infinity(row, _EXPONENT[name]):
            _refuse(rows[position], name_row(position), name)
    return stored.view(storage_dtype(name))


def _cast(rows: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """C-contiguous rows of a dtype; in parallel, because NumPy converts to half floats slower than disks write."""
    if rows.nbytes < _PARALLEL or rows.dtype == dtype:
        with np.errstate(over="ignore"):  # what overflows is found later, with its row
            return np.ascontiguousarray(rows, dtype=dtype)
    stored = np.empty(rows.shape, dtype)

    def cast(part: slice) -> None:
        with np.errstate(over="ignore"):
            np.copyto(stored[part], rows[part], casting="unsafe")

    step = max(1, len(rows) * _PARALLEL // (4 * rows.nbytes))
    in_parallel(cast, [slice(start, start + step) for start in range(0, len(rows), step)], default_threads())
    return stored


def _has_infinity(bits: np.ndarray, exponent: int) -> bool:
    """Whether any value is infinite, by its bits: all ones in the exponent, none in the fraction, any sign."""
    mask = bits.dtype.type(exponent | (exponent & -exponent) - 1)
    return any(bool(((bits[start : start + _SLICE] & mask) == exponent).any()) for start in range(0, bits.size, _SLICE))


def _refuse(row: np.ndarray, row_name: str, name: str) -> None:
    values = np.nan_to_num(np.asarray(row, np.float64), nan=0.0, posinf=np.inf, neginf=-np.inf)
    worst = float(values.flat[np.argmax(np.abs(values))])
    wide = "bfloat16 or float32" if name == "float16" else "float32"
    advice = "the features themselves overflowed" if np.isinf(worst) else f"store this feature as {wide}"
    raise ValueNotStorable(f"{row_name} holds {worst:g}, which {name} cannot: {advice}.")
