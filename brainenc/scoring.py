"""How well predictions agree with measured responses: the field's formulas, as functions from arrays to arrays.

Vocabulary: *r* is Pearson's correlation over stimuli, one number a vertex. The *noise ceiling* NC is the fraction
(0 to 1) of a vertex's variance that its stimuli can explain at all. Everything is float64 outside and streams over
the data inside, so that neither copies of the arrays nor a second pass is needed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

_ROWS, _COLUMNS = 64, 4096
"""A block of this size stays near the core, and sums of 64 single-precision terms keep r to 2e-7 (measured)."""

_STRETCH = 16 * _ROWS
"""Rows that share one shift. Longer ones would let a drift of the mean cost digits."""

_ZERO_CEILING = 1e-14
"""What the challenge puts in the place of a noise ceiling of 0."""


class StreamingPearson:
    """Pearson's r of each vertex from batches of rows, in one pass and constant memory.

    Stretches of rows are summed about a value near their own means and merged in double precision (Chan, Golub and
    LeVeque 1979), so large offsets and drifts cost no digits. Parts computed apart, by other ranks for instance, are
    joined by `merge`.

    Args:
        n_vertices: columns of the arrays to come.
        threads: how many threads share a large batch; the machine's cores when None.
    """

    def __init__(self, n_vertices: int, *, threads: int | None = None) -> None:
        self.n_vertices = n_vertices
        self.n = 0
        self._threads = threads or _cores()
        self._moments = np.zeros((5, n_vertices))  # mean x, mean y, Sxx, Syy, Sxy

    def update(self, predicted: npt.NDArray[Any], measured: npt.NDArray[Any]) -> None:
        """Add rows. Both are arrays of shape (n_stimuli, n_vertices), of any float dtype.

        Raises:
            ValueError: the shapes differ from each other or from ``n_vertices``.
        """
        if predicted.shape != measured.shape or predicted.ndim != 2 or predicted.shape[1] != self.n_vertices:
            raise ValueError(
                f"Scores of {self.n_vertices} vertices want two arrays of shape (n_stimuli, {self.n_vertices}); "
                f"predictions have {predicted.shape}, measurements {measured.shape}."
            )
        if len(predicted) == 0:
            return
        threads = self._threads if predicted.size > 4 * _ROWS * _COLUMNS else 1
        width = -(-self.n_vertices // threads)
        parts = [slice(left, left + width) for left in range(0, self.n_vertices, width)]

        def absorb(part: slice) -> None:
            _absorb(self._moments[:, part], self.n, predicted[:, part], measured[:, part])

        if threads > 1:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(absorb, parts))
        else:
            for part in parts:
                absorb(part)
        self.n += len(predicted)

    def merge(self, other: StreamingPearson) -> None:
        """Add the rows that another instance has seen."""
        if other.n_vertices != self.n_vertices:
            raise ValueError(f"Cannot merge scores of {other.n_vertices} vertices into {self.n_vertices}.")
        _merge(self._moments, self.n, other._moments, other.n)
        self.n += other.n

    def state(self) -> Floats:
        """Everything seen so far as one array of shape (6, n_vertices), to send to another process."""
        return np.vstack([np.full((1, self.n_vertices), float(self.n)), self._moments])

    @classmethod
    def from_state(cls, state: Floats) -> StreamingPearson:
        """Undo `state`."""
        made = cls(state.shape[1])
        made.n = int(state[0, 0]) if state.shape[1] else 0
        made._moments = np.array(state[1:], dtype=np.float64)
        return made

    def r(self) -> Floats:
        """Pearson's r, array of shape (n_vertices,). NaN where either side is constant or holds a NaN or infinity."""
        _, _, sxx, syy, sxy = self._moments
        with np.errstate(invalid="ignore", divide="ignore"):
            r = sxy / (np.sqrt(sxx) * np.sqrt(syy))
        r[~np.isfinite(r)] = np.nan
        clipped: Floats = np.clip(r, -1.0, 1.0)
        return clipped


def pearson(predicted: npt.NDArray[Any], measured: npt.NDArray[Any], *, threads: int | None = None) -> Floats:
    """Pearson's r over the rows of two (n_stimuli, n_vertices) arrays, one a column; NaN as in `StreamingPearson.r`."""
    stream = StreamingPearson(predicted.shape[-1], threads=threads)
    stream.update(predicted, measured)
    return stream.r()


def mean_r(r: npt.NDArray[Any]) -> float:
    """Mean correlation over vertices, NaN counted as 0. NaN only if there is no vertex at all."""
    return float(np.nan_to_num(r, nan=0.0).mean()) if len(r) else float("nan")


def val_perf(r_lh: npt.NDArray[Any], r_rh: npt.NDArray[Any]) -> float:
    """``(mean_r(lh) + mean_r(rh)) / 2``, as published: hemispheres weigh the same, whatever their size."""
    return (mean_r(r_lh) + mean_r(r_rh)) / 2


def noise_ceiling(ncsnr: npt.NDArray[Any], n1: int, n2: int, n3: int) -> Floats:
    """The challenge's noise ceiling, a fraction from 0 to 1.

    ``NC = ncsnr² / (ncsnr² + (n1/1 + n2/2 + n3/3) / (n1 + n2 + n3))``

    Args:
        ncsnr: noise-ceiling signal-to-noise ratio (signal SD / noise SD of one trial), shape (n_vertices,).
        n1: test images shown once.
        n2: test images shown twice.
        n3: test images shown three times.
    """
    if n1 + n2 + n3 <= 0:
        raise ValueError("A noise ceiling needs at least one test image: n1 + n2 + n3 is 0.")
    signal = np.square(np.asarray(ncsnr, dtype=np.float64))
    return signal / (signal + (n1 / 1 + n2 / 2 + n3 / 3) / (n1 + n2 + n3))


def nsd_noise_ceiling(ncsnr: npt.NDArray[Any], repeats: int = 3) -> Floats:
    """NSD's own definition in its own unit, percent: ``100 ncsnr² / (ncsnr² + 1/k)``."""
    signal = np.square(np.asarray(ncsnr, dtype=np.float64))
    return 100.0 * signal / (signal + 1.0 / repeats)


def noise_normalised(r: npt.NDArray[Any], ceiling: npt.NDArray[Any]) -> Floats:
    """The challenge's score of each vertex in percent: ``100 clip(max(r, 0)² / NC, 0, 1)``.

    A ceiling of 0 becomes 1e-14, as in the challenge's own code (so any positive r scores 100 there). A vertex whose
    r is NaN scores 0, as it does in `val_perf`.

    Args:
        r: shape (n_vertices,).
        ceiling: NC as a fraction from 0 to 1 (NSD's files hold percent: divide by 100), shape (n_vertices,).
    """
    r, nc = np.asarray(r, dtype=np.float64), np.asarray(ceiling, dtype=np.float64)
    if r.shape != nc.shape:
        raise ValueError(f"Correlations of shape {r.shape} and noise ceilings of shape {nc.shape} do not go together.")
    if nc.size and (np.nanmax(nc) > 1.0 or np.nanmin(nc) < 0.0):
        raise ValueError(
            f"Noise ceilings are fractions from 0 to 1, found {np.nanmin(nc):g} to {np.nanmax(nc):g}. "
            "Percent, as in NSD's own files, must be divided by 100."
        )
    positive = np.maximum(np.nan_to_num(r, nan=0.0), 0.0)
    percent: Floats = 100.0 * np.clip(np.square(positive) / np.where(nc == 0.0, _ZERO_CEILING, nc), 0.0, 1.0)
    return percent


def challenge_score(parts: Iterable[tuple[npt.NDArray[Any], npt.NDArray[Any]]]) -> float:
    """The challenge's one number: the mean of `noise_normalised` over all vertices of all hemispheres and subjects.

    Args:
        parts: (r, NC) of each hemisphere of each subject.
    """
    return float(np.concatenate([noise_normalised(r, nc) for r, nc in parts]).mean())


def roi_means(values: npt.NDArray[Any], masks: Mapping[str, Bools]) -> dict[str, float]:
    """Mean of a per-vertex score over each ROI. NaN values count as 0; a ROI without vertices is NaN, as published."""
    return {name: mean_r(values[mask]) for name, mask in masks.items()}


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _absorb(moments: Floats, n_before: int, x: npt.NDArray[Any], y: npt.NDArray[Any]) -> None:
    """Merge a batch (n, columns) into ``moments`` (5, columns) that hold ``n_before`` rows. One thread's work.

    The two scratch blocks are allocated once: fresh memory for each block costs more than all the arithmetic.
    """
    dtype = np.result_type(x, y, np.float32)
    scratch = [np.empty((_ROWS, min(_COLUMNS, x.shape[1])), dtype) for _ in range(2)]
    with np.errstate(invalid="ignore", over="ignore"):
        for left in range(0, x.shape[1], _COLUMNS):
            part = slice(left, left + _COLUMNS)
            for top in range(0, len(x), _STRETCH):
                rows = slice(top, top + _STRETCH)
                found, n = _stretch_moments(x[rows, part], y[rows, part], scratch)
                _merge(moments[:, part], n_before + top, found, n)


def _stretch_moments(x: npt.NDArray[Any], y: npt.NDArray[Any], scratch: list[npt.NDArray[Any]]) -> tuple[Floats, int]:
    """(mean x, mean y, Sxx, Syy, Sxy) of some rows, summed about one shift, and their number.

    Each block is summed in the arrays' own precision, and the blocks in double precision.
    """
    n = len(x)
    shift_x, shift_y = (_shift(values, scratch[0].dtype) for values in (x, y))
    sums = np.zeros((5, x.shape[1]))
    for top in range(0, n, _ROWS):
        rows = slice(top, min(top + _ROWS, n))
        dx, dy = (buffer[: rows.stop - top, : x.shape[1]] for buffer in scratch)
        np.subtract(x[rows], shift_x, out=dx)
        np.subtract(y[rows], shift_y, out=dy)
        sums[0] += np.add.reduce(dx, axis=0)
        sums[1] += np.add.reduce(dy, axis=0)
        for total, a, b in ((sums[2], dx, dx), (sums[3], dy, dy), (sums[4], dx, dy)):
            total += np.einsum("nv,nv->v", a, b)
    sum_x, sum_y, xx, yy, xy = sums
    centred = (xx - sum_x * sum_x / n, yy - sum_y * sum_y / n, xy - sum_x * sum_y / n)
    return np.stack([shift_x + sum_x / n, shift_y + sum_y / n, *centred]), n


def _shift(values: npt.NDArray[Any], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """The mean of up to 64 rows, so that one wild row among them does no harm.

    A power of two of them, added in pairs, is exact where all are equal: constants must give sums of 0.
    """
    n = len(values)
    count = min(64, 1 << (n.bit_length() - 1))
    total = values[np.arange(count) * n // count].astype(dtype)
    while len(total) > 1:
        total = total[::2] + total[1::2]
    mean: npt.NDArray[Any] = (total[0] / count).astype(dtype, copy=False)
    return mean


def _merge(into: Floats, n_into: int, part: Floats, n_part: int) -> None:
    """Chan's pairwise update of (mean x, mean y, Sxx, Syy, Sxy), in place."""
    total = n_into + n_part
    if total == 0:
        return
    with np.errstate(invalid="ignore", over="ignore"):
        delta = part[:2] - into[:2]
        weight = n_into * n_part / total
        into[:2] += delta * (n_part / total)
        into[2:] += part[2:]
        into[2:4] += np.square(delta) * weight
        into[4] += delta[0] * delta[1] * weight
