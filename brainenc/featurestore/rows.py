"""Row numbers: as callers give them, by shard, and which of them can be read."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from brainenc.featurestore.schema import Manifest


def as_rows(indices: npt.ArrayLike | None, n_rows: int, where: str) -> np.ndarray:
    """A list of integers, negative ones allowed, or a mask, as non-negative row numbers.

    Raises:
        IndexError: there is no such row, or these are no rows.
    """
    chosen = np.asarray(indices)
    if chosen.dtype == bool:
        if chosen.shape != (n_rows,):
            raise IndexError(f"a mask of shape ({n_rows},) is wanted, one of {chosen.shape} came.")
        chosen = np.flatnonzero(chosen)
    if chosen.size == 0:
        return np.empty(0, np.int64)
    if chosen.ndim != 1 or chosen.dtype.kind not in "iu":
        raise IndexError(f"rows are chosen by a list of integers; this is {chosen.dtype} of shape {chosen.shape}.")
    chosen = chosen.astype(np.int64)
    if chosen.min() < -n_rows or chosen.max() >= n_rows:
        bad = chosen.max() if chosen.max() >= n_rows else chosen.min()
        raise IndexError(f"row {bad} of {where}: it has {n_rows} rows.")
    return np.where(chosen < 0, chosen + n_rows, chosen)


def per_shard(rows: np.ndarray, rows_per_shard: int) -> list[np.ndarray]:
    """Cut a list of rows wherever the shard changes."""
    return np.split(rows, np.flatnonzero(np.diff(rows // rows_per_shard)) + 1) if len(rows) else []


def present_rows(manifest: Manifest) -> np.ndarray:
    """Mask of shape (rows of the collection,): True where a row is committed and was not left out."""
    here, size = np.zeros(manifest.spec.n_rows, bool), manifest.spec.rows_per_shard
    for entry in manifest.shards:
        here[entry.shard * size : entry.shard * size + entry.rows] = True
        here[list(entry.missing)] = False
    return here
